# SPDX-License-Identifier: Apache-2.0
"""Launch geometry of csrc/warp.cu. Each function computes its operator, or returns None to leave a case to
the reference.
"""
from collections.abc import Sequence

import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import native

TAPS = 12  # of the filter that the kernels are compiled for
TILE = (32, 8, 1)  # threads of a block, one per pixel
MAX_SIDE = 2 ** 20  # positions are 32-bit integers


def warp(
    x: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, size: list[int], margins: list[int],
) -> torch.Tensor | None:
    """Native form of the operator warp."""
    return _launch('warp', x, f, matrix, list(x.shape[2:]), size, margins)


def warp_adjoint(
    dy: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, size: list[int], margins: list[int],
) -> torch.Tensor | None:
    """Native form of the operator warp_adjoint."""
    return _launch('warp_adjoint', dy, f, matrix, size, list(dy.shape[2:]), margins)


def warp_kernel(entry: str, dtype: torch.dtype, channels: int) -> Kernel:
    """One specialisation; entry: warp or warp_adjoint."""
    return native.kernel('warp.cu', entry, SCALAR_T=native.TYPE_NAMES[dtype], TAPS=TAPS,
                         CHUNK=min(channels, 4))


def _launch(
    entry: str, x: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, in_size: Sequence[int],
    out_size: Sequence[int], margins: Sequence[int],
) -> torch.Tensor | None:
    """in_size: of the image; out_size: of what is sampled from it; both [rows, columns]."""
    n, channels = x.shape[:2]
    x0, x1, y0, y1 = margins
    total = in_size[1] + x0 + x1, in_size[0] + y0 + y1
    fits = native.supports(x) and f.shape == (TAPS,) and f.dtype == torch.float32 and f.device == x.device
    if not fits or min(*out_size, *in_size) < 1 or max(*out_size, *total) > MAX_SIDE:
        return None
    size = out_size if entry == 'warp' else in_size
    result = torch.empty([n, channels, *size], dtype=x.dtype, device=x.device)
    tiles = native.blocks_for(size[1], TILE[0]) * native.blocks_for(size[0], TILE[1])
    native.launch(
        warp_kernel(entry, x.dtype, channels), n * tiles,
        (x.contiguous(), f.contiguous(), matrix.to(native.accumulator(x.dtype)).contiguous(), result,
         channels, *in_size, *out_size, x0, y0, *total), x.device, TILE)
    return result
