# SPDX-License-Identifier: Apache-2.0
"""Convolution with up- or downsampling, in the cheapest of several equivalent forms."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils.ops.conv2d_gradfix import conv2d, conv_transpose2d
from torch_utils.ops.upfirdn2d import filter_size, fork, pad_or_crop, parse_padding, upfirdn2d


def conv2d_resample(  # noqa: PLR0913 (published signature)
    x: torch.Tensor, w: torch.Tensor, f: torch.Tensor | None = None, up: int = 1, down: int = 1,
    padding: int | Sequence[int] = 0, groups: int = 1, flip_weight: bool = True, flip_filter: bool = False,
) -> torch.Tensor:
    """Up-sample by `up` with filter f, convolve with w, down-sample by `down` with f.

    x: [N, C, H, W].  w: [O, C // groups, kh, kw], dtype of x.  f: as upfirdn2d(); unused if up == down == 1.
    padding: int, [x, y] or [x0, x1, y0, y1] in pixels of the up-sampled image, all of it applied at the
    start.  flip_weight: True correlates (as torch does), False is a convolution.  Returns [N, O, H', W'].
    """
    kh, kw = w.shape[2:]
    x0, x1, y0, y1 = _total_padding(padding, f, up, down)
    if up == 1 and down == 1:
        return _convolve(x, w, [x0, x1, y0, y1], 1, groups, flip_weight)
    # A 1x1 kernel commutes with the filter, so it is applied at the lower resolution.
    if kh == kw == 1 and up == 1:
        x = upfirdn2d(x, f, down=down, padding=[x0, x1, y0, y1], flip_filter=flip_filter)
        return _convolve(x, w, [0] * 4, 1, groups, flip_weight)
    if kh == kw == 1 and down == 1:
        x = _convolve(x, w, [0] * 4, 1, groups, flip_weight)
        return upfirdn2d(x, f, up=up, padding=[x0, x1, y0, y1], gain=up ** 2, flip_filter=flip_filter)
    if up == 1:
        x = upfirdn2d(x, f, padding=[x0, x1, y0, y1], flip_filter=flip_filter)
        return _convolve(x, w, [0] * 4, down, groups, flip_weight)
    x, remaining = convolve_before_filter(x, w, f, up, padding, groups, flip_weight, down)
    x = upfirdn2d(x, f, padding=remaining, gain=up ** 2, flip_filter=flip_filter)
    return x if down == 1 else upfirdn2d(x, f, down=down, flip_filter=flip_filter)


def fork_down(
    x: torch.Tensor, f: torch.Tensor, down: int, flip_filter: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, x down-sampled as conv2d_resample() does before a 1x1 convolution), for two branches of a network,
    as upfirdn2d.fork().
    """
    return fork(x, f, down, _total_padding(0, f, 1, down), flip_filter)


def padding_before_down(padding: int | Sequence[int], f: torch.Tensor, down: int) -> list[int]:
    """[x0, x1, y0, y1] by which conv2d_resample() pads before it filters and down-samples by `down`."""
    return _total_padding(padding, f, 1, down)


def convolve_before_filter(
    x: torch.Tensor, w: torch.Tensor, f: torch.Tensor | None, up: int, padding: int | Sequence[int] = 0,
    groups: int = 1, flip_weight: bool = True, down: int = 1,
) -> tuple[torch.Tensor, list[int]]:
    """Upsampling without its filter: the transposed convolution, and the padding for filtering its result.

    Arguments as conv2d_resample() with up > 1. The filter that follows has gain up ** 2.
    """
    kh, kw = w.shape[2:]
    x0, x1, y0, y1 = _total_padding(padding, f, up, down)
    remaining = [x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up)]
    return _convolve_transposed(x, w, up, groups, flip_weight), remaining


def _total_padding(padding: int | Sequence[int], f: torch.Tensor | None, up: int, down: int) -> list[int]:
    """The user's padding plus that which keeps the image centred under the filters."""
    (fw, fh), (x0, x1, y0, y1) = filter_size(f), parse_padding(padding)
    if up > 1:
        x0, x1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2
        y0, y1 = y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2
        y0, y1 = y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    return [x0, x1, y0, y1]


def _convolve(
    x: torch.Tensor, w: torch.Tensor, padding: list[int], stride: int, groups: int, flip_weight: bool,
) -> torch.Tensor:
    """Strided convolution with any padding, negative (crop) included."""
    x0, x1, y0, y1 = padding
    is_product = w.shape[2:].numel() == stride == groups == 1 and not any(padding)
    if is_product and x.device.type == 'cpu' and x.is_contiguous(memory_format=torch.channels_last):
        # As a matrix product, which has less overhead per call than a convolution.
        return F.linear(x.permute(0, 2, 3, 1), w.flatten(1)).permute(0, 3, 1, 2)
    symmetric = x0 == x1 >= 0 and y0 == y1 >= 0
    if not symmetric:
        x = pad_or_crop(x, padding)
    w = w if flip_weight or w.shape[2:].numel() == 1 else w.flip([2, 3])
    return conv2d(x, w, stride=stride, padding=(y0, x0) if symmetric else 0, groups=groups)


def _convolve_transposed(
    x: torch.Tensor, w: torch.Tensor, up: int, groups: int, flip_weight: bool,
) -> torch.Tensor:
    """Convolution of the zero-stuffed x at full extent: [N, O, (H - 1) * up + kh, ...]."""
    # torch's transposed convolution flips the kernel and expects the channels of x first.
    w = w.flip([2, 3]) if flip_weight else w
    out_channels, in_per_group, kh, kw = w.shape
    if groups == 1:
        w = w.transpose(0, 1)
    else:
        w = w.reshape(groups, out_channels // groups, in_per_group, kh, kw).transpose(1, 2)
        w = w.reshape(groups * in_per_group, out_channels // groups, kh, kw)
    return conv_transpose2d(x, w, stride=up, groups=groups)
