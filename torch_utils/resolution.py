# SPDX-License-Identifier: Apache-2.0
"""Alias of dnnlib.resolution, which the source code in snapshots of version 0.1 imports by this name."""
from dnnlib.resolution import Size, height_width, levels_of, size_at, split_resolution

__all__ = ['Size', 'height_width', 'levels_of', 'size_at', 'split_resolution']
