# SPDX-License-Identifier: Apache-2.0
"""Warping and filtering of images, each by its own matrix or filter (ADA, App. B)."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d
from training.augmentation import matrices
from training.augmentation.plain import PlainWarp

try:
    from torch_utils.ops import warp as sampling
except ImportError:  # a copy of the published torch_utils
    sampling = PlainWarp

MARGIN_SHARES = (0.5, 1.0)  # of the side: sizes of margins in the static form


@dataclass(frozen=True)
class Margins:
    """Pixels to add [before, after] on each axis; smaller than the side."""

    x: tuple[int, int]
    y: tuple[int, int]


def plan_warp(
    to_input: np.ndarray, size: tuple[int, int], num_taps: int, is_static: bool,
) -> tuple[Margins, np.ndarray]:
    """(margins, matrices [N, 3, 3] from the grid of the result to that of the enlarged input) for `warp`.

    to_input [N, 3, 3]: output -> input position, in pixels from the centre, y down.  size: (height, width).
    is_static: take one of a few sizes of margin instead of the smallest.
    """
    slack = num_taps // 4  # pixels that the filter reaches out on a side, at the low resolution
    margins = Margins(*(_margins(to_input[:, axis], axis, size[::-1], slack) for axis in (0, 1)))
    if is_static:
        margins = _rounded_up(margins, size)

    after, before = _units(margins, size, slack)
    return margins, after @ to_input @ before


@functools.lru_cache(maxsize=32)
def _units(margins: Margins, size: tuple[int, int], slack: int) -> tuple[np.ndarray, np.ndarray]:
    """(after, before), [1, 3, 3] each: after @ to_input @ before is in units of the grid, [-1, 1] over the
    upsampled input and over the enlarged output.
    """
    height, width = size
    # Upsampling has moved the image by half a (small) pixel.
    after = (matrices.scale(1 / (width + sum(margins.x)), 1 / (height + sum(margins.y)))
             @ matrices.translate(-0.5, -0.5) @ matrices.scale(2.0, 2.0)
             @ matrices.translate((margins.x[0] - margins.x[1]) / 2, (margins.y[0] - margins.y[1]) / 2))
    before = (matrices.scale(0.5, 0.5) @ matrices.translate(0.5, 0.5)
              @ matrices.scale(width + 2.0 * slack, height + 2.0 * slack))
    return after, before


def warp(x: torch.Tensor, margins: Margins, matrix: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Move pixels as planned by `plan_warp`.

    The image, continued by reflection, is sampled at twice its resolution between two passes of the
    low-pass filter `taps` [12], which limits aliasing. x: [N, C, H, W]; so is the result.
    """
    slack = len(taps) // 4
    size = [2 * (side + 2 * slack) for side in x.shape[2:]]
    x = sampling.warp(x, taps, matrix, size, [*margins.x, *margins.y])
    return _crop_and_downsample(x, taps, 2 * slack)


def _crop_and_downsample(x: torch.Tensor, taps: torch.Tensor, crop: int) -> torch.Tensor:
    """Downsample by 2 what is left of x without `crop` pixels on each side; the filter sees those, too."""
    if not sampling.is_small(x.shape[2:], x.device):
        return upfirdn2d.downsample2d(x, taps, down=2, padding=-crop, flip_filter=True)
    x_matrix, y_matrix = (
        sampling.axis_matrix(size, x.dtype, tuple(taps.tolist()), is_up=False, crop=crop)
        for size in (x.shape[3], x.shape[2]))
    return y_matrix.T @ (x @ x_matrix)


def _margins(row: np.ndarray, axis: int, size: tuple[int, int], slack: int) -> tuple[int, int]:
    """Pixels to add before and after an axis, so that no corner of any image comes from outside; < side.

    row [N, 3]: from output position (x, y, 1) to this coordinate of the input.  size: (width, height).
    """
    reach, offset = np.abs(row[:, :2]) @ ((size[0] - 1) / 2, (size[1] - 1) / 2), row[:, 2]
    side = size[axis]
    beyond = 2 * slack - (side - 1) / 2
    return tuple(math.ceil(min(max(float(wanted.max()) + beyond, 0), side - 1))
                 for wanted in (reach - offset, reach + offset))


def _rounded_up(margins: Margins, size: tuple[int, int]) -> Margins:
    """The same share of MARGIN_SHARES on all sides."""
    height, width = (side - 1 for side in size)
    for share in MARGIN_SHARES:
        x, y = math.ceil(share * width), math.ceil(share * height)
        if max(margins.x) <= x and max(margins.y) <= y:
            break
    return Margins((x, x), (y, y))


def filter_each(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Convolve each image along x and y with a symmetric filter of its own, taps [N, odd number]."""
    num, channels, height, width = x.shape
    x = _pad_reflect(x, taps.shape[1] // 2)
    weight = taps.repeat_interleave(channels, dim=0)[:, None, None]  # [N * C, 1, 1, taps]
    x = x.reshape(1, num * channels, *x.shape[2:])
    x = F.conv2d(x, weight, groups=num * channels)
    x = F.conv2d(x, weight.transpose(2, 3), groups=num * channels)
    return x.view(num, channels, height, width)


def _pad_reflect(x: torch.Tensor, margin: int) -> torch.Tensor:
    """Continue x by reflection on all sides, also by more than its own size."""
    if margin < min(x.shape[2:]):
        return sampling.continued(x, [margin] * 4)
    for dim in (2, 3):
        index = torch.arange(-margin, x.shape[dim] + margin, device=x.device)
        x = x.index_select(dim, _reflected(index, x.shape[dim] - 1))
    return x


def _reflected(index: torch.Tensor, last: int) -> torch.Tensor:
    """Indices 0 .. last after endless reflection about both ends."""
    return ((index + last) % (2 * last) - last).abs() if last else torch.zeros_like(index)
