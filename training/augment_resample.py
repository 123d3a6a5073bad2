# SPDX-License-Identifier: Apache-2.0
"""The heavy part of augmentation: pictures warped and filtered, each by a matrix or filter of its own."""
import functools

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops import grid_sample_gradfix, upfirdn2d
from training import transforms

MATRIX_SIDE = 80  # longest side that a CPU resamples by matrix products; beyond, filtering is faster


def as_tensor_like(array: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """A host array as a tensor of the device and dtype of x, without waiting for a GPU."""
    tensor = torch.as_tensor(array, dtype=x.dtype)
    return tensor.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else tensor.to(x.device)


def warp(x: torch.Tensor, to_input: np.ndarray, taps: torch.Tensor) -> torch.Tensor:
    """Move pixels by matrices [N, 3, 3]: output -> input position, in pixels from the centre, y down.

    The picture, continued by reflection, is sampled at twice its resolution between two passes of the
    low-pass filter `taps` [12], which limits aliasing. x: [N, C, H, W]; so is the result.
    """
    height, width = x.shape[2:]
    slack = len(taps) // 4  # pixels that the filter reaches out on a side, at the low resolution
    x_pad = _margins(to_input[:, 0], width, height, slack)
    y_pad = _margins(to_input[:, 1, [1, 0, 2]], height, width, slack)
    x = _pad_and_upsample(x, taps, x_pad, y_pad)

    # Into units of the grid: [-1, 1] over the upsampled input and over the enlarged output. Upsampling has
    # moved the picture by half a (small) pixel.
    after = (transforms.scale(2 / x.shape[3], 2 / x.shape[2]) @ transforms.translate(-0.5, -0.5)
             @ transforms.scale(2.0, 2.0)
             @ transforms.translate((x_pad[0] - x_pad[1]) / 2, (y_pad[0] - y_pad[1]) / 2))
    out_height, out_width = 2 * (height + 2 * slack), 2 * (width + 2 * slack)
    before = (transforms.scale(0.5, 0.5) @ transforms.translate(0.5, 0.5)
              @ transforms.scale(out_width / 2, out_height / 2))
    grid = _affine_grid(as_tensor_like(after @ to_input @ before, x), out_height, out_width)
    return _crop_and_downsample(grid_sample_gradfix.grid_sample(x, grid), taps, 2 * slack)


def _affine_grid(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Positions [N, height, width, (x, y)] that matrices [N, 3, 3] make of the pixel centres of [-1, 1]^2."""
    x, y = ((torch.arange(size, dtype=matrix.dtype, device=matrix.device) * 2 + (1 - size)) / size
            for size in (width, height))
    to_xy = matrix[:, None, None, :2]  # [N, 1, 1, 2, 3]
    lines = to_xy[..., 1] * y[:, None, None] + to_xy[..., 2]  # [N, height, 1, 2]
    return torch.addcmul(lines, to_xy[..., 0], x[:, None])


def _pad_and_upsample(
    x: torch.Tensor, taps: torch.Tensor, x_pad: list[int], y_pad: list[int],
) -> torch.Tensor:
    """Continue x by reflection, [before, after] on each axis, and upsample it by 2."""
    if not _is_small(x):
        return upfirdn2d.upsample2d(F.pad(x, [*x_pad, *y_pad], mode='reflect'), taps, up=2)

    def matrix(size: int, pad: list[int]) -> torch.Tensor:
        sources = _reflected(size, *pad, x.device)
        whole = _axis_matrix(3 * size, x.dtype, tuple(taps.tolist()), is_up=True)
        part = whole[:len(sources), :2 * len(sources)]
        return x.new_zeros([size, part.shape[1]]).index_add(0, sources, part)
    return matrix(x.shape[2], y_pad).T @ (x @ matrix(x.shape[3], x_pad))


def _crop_and_downsample(x: torch.Tensor, taps: torch.Tensor, crop: int) -> torch.Tensor:
    """Downsample by 2 what is left of x without `crop` pixels on each side; the filter sees those, too."""
    if not _is_small(x):
        return upfirdn2d.downsample2d(x, taps, down=2, padding=-crop, flip_filter=True)
    x_matrix, y_matrix = (_axis_matrix(size, x.dtype, tuple(taps.tolist()), is_up=False, crop=crop)
                          for size in (x.shape[3], x.shape[2]))
    return y_matrix.T @ (x @ x_matrix)


def _is_small(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu' and max(x.shape[2:]) <= MATRIX_SIDE


@functools.lru_cache(maxsize=32)
def _axis_matrix(
    size: int, dtype: torch.dtype, taps: tuple[float, ...], is_up: bool, crop: int = 0,
) -> torch.Tensor:
    """[size, new size]: what becomes of each unit vector of that size."""
    with torch.inference_mode(mode=False):  # the result is for later calls as well
        units, f = torch.eye(size, dtype=dtype)[None, None], torch.tensor([taps])
        if is_up:
            return upfirdn2d.upsample2d(units, f, up=[2, 1])[0, 0]
        return upfirdn2d.downsample2d(units, f, down=[2, 1], padding=[-crop, 0], flip_filter=True)[0, 0]


def _reflected(size: int, before: int, after: int, device: torch.device) -> torch.Tensor:
    """Indices that continue 0 .. size - 1 on both sides by endless reflection about the first and last."""
    last = size - 1
    index = torch.arange(-before, size + after, device=device)
    return ((index + last) % (2 * last) - last).abs() if last else torch.zeros_like(index)


def _margins(row: np.ndarray, side: int, other_side: int, slack: int) -> list[int]:
    """Pixels to add before and after `side`, so that no corner of any picture comes from outside; < side.

    row [N, 3]: coefficients of this coordinate, of the other one, and offset, from output to input.
    """
    reach = np.abs(row[:, :2]) @ [(side - 1) / 2, (other_side - 1) / 2]
    wanted = np.array([(reach - row[:, 2]).max(), (reach + row[:, 2]).max()]) + 2 * slack - (side - 1) / 2
    return np.ceil(np.clip(wanted, 0, side - 1)).astype(int).tolist()


def filter_each(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Convolve each picture along x and y with a symmetric filter of its own, taps [N, odd number]."""
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
        return F.pad(x, [margin] * 4, mode='reflect')
    for dim in (2, 3):
        x = x.index_select(dim, _reflected(x.shape[dim], margin, margin, x.device))
    return x
