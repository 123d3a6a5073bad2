# SPDX-License-Identifier: Apache-2.0
"""dnnlib.resolution, under the name that sources in snapshots of version 0.1 import."""
from dnnlib.resolution import Size, height_width, levels_of, size_at, split_resolution

__all__ = ['Size', 'height_width', 'levels_of', 'size_at', 'split_resolution']
