# SPDX-License-Identifier: Apache-2.0
"""A stand-in of the published package: the names that networks in pickles may use."""
from .util import EasyDict as EasyDict
