# SPDX-License-Identifier: Apache-2.0
"""Utilities that are independent of networks: dictionaries with attributes, URLs, logs, progress, errors."""
from dnnlib import util
from dnnlib.util import EasyDict, UserError, make_cache_dir_path

__all__ = ['EasyDict', 'UserError', 'make_cache_dir_path', 'util']
