# SPDX-License-Identifier: Apache-2.0
"""Affine sampling with little aliasing: reflect, up-sample by 2, sample bilinearly (ADA, App. B).

y[n,c,r,s] = u[n,c](position), where u is x continued by reflection, `margins` [x0, x1, y0, y1] pixels on each
side, and up-sampled by 2 with a separable filter; beyond its margins it is 0. Position: matrix @ (x, y, 1),
from the pixel centres of the result to those of u, each in [-1, 1]^2. Linear in x, so that the gradient is
the adjoint and the gradient of that is the sampling itself; positions are constants.
"""
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d, warp_cuda
from torch_utils.ops._registry import define_op

MATRIX_SIDE = 80  # longest side that a CPU resamples by matrix products; beyond, filtering is faster


def is_small(size: torch.Size, device: torch.device) -> bool:
    """Whether images [..., H, W] are resampled by matrix products."""
    return device.type == 'cpu' and max(size) <= MATRIX_SIDE


@functools.lru_cache(maxsize=32)
def axis_matrix(
    size: int, dtype: torch.dtype, taps: tuple[float, ...], is_up: bool, crop: int = 0,
) -> torch.Tensor:
    """[size, new size]: the images of the unit vectors."""
    with torch.inference_mode(mode=False):  # cached for later calls
        units, f = torch.eye(size, dtype=dtype)[None, None], torch.tensor([taps])
        if is_up:
            return upfirdn2d.upsample2d(units, f, up=[2, 1])[0, 0]
        return upfirdn2d.downsample2d(units, f, down=[2, 1], padding=[-crop, 0], flip_filter=True)[0, 0]


def reflected(size: int, before: int, after: int, device: torch.device) -> torch.Tensor:
    """Indices that continue 0 .. size - 1 on both sides by endless reflection about the first and last."""
    last = size - 1
    index = torch.arange(-before, size + after, device=device)
    return ((index + last) % (2 * last) - last).abs() if last else torch.zeros_like(index)


def continued(x: torch.Tensor, margins: Sequence[int]) -> torch.Tensor:
    """Continue x by reflection, [x0, x1, y0, y1] pixels, by less than its size."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(x, list(margins), mode='reflect')
    # The gradient of F.pad adds in any order on a GPU.
    for dim, (before, after) in ((3, margins[:2]), (2, margins[2:])):
        ends = x.narrow(dim, 1, before), x.narrow(dim, x.shape[dim] - 1 - after, after)
        x = torch.cat([ends[0].flip(dim), x, ends[1].flip(dim)], dim)
    return x


def continued_grad(g: torch.Tensor, size: Sequence[int], margins: Sequence[int]) -> torch.Tensor:
    """Gradient of continued() for x of this size."""
    if not torch.are_deterministic_algorithms_enabled():
        shape = g.new_zeros([]).expand([*g.shape[:2], *size])
        return torch.ops.aten.reflection_pad2d_backward(g, shape, list(margins))
    for dim, side, (before, after) in ((2, size[0], margins[2:]), (3, size[1], margins[:2])):
        ends = g.narrow(dim, 0, before), g.narrow(dim, before + side, after)
        g = g.narrow(dim, before, side).clone()
        g.narrow(dim, 1, before).add_(ends[0].flip(dim))
        g.narrow(dim, side - 1 - after, after).add_(ends[1].flip(dim))
    return g


def _up_matrices(
    size: torch.Size, dtype: torch.dtype, f: torch.Tensor, margins: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reflection and up-sampling along x and along y, [side, 2 * (side + margins)] each."""
    def matrix(side: int, pad: list[int]) -> torch.Tensor:
        sources = reflected(side, *pad, f.device)
        whole = axis_matrix(3 * side, dtype, tuple(map(float, f.numpy())), is_up=True)
        part = whole[:len(sources), :2 * len(sources)]
        return torch.zeros([side, part.shape[1]], dtype=dtype).index_add(0, sources, part)
    return matrix(size[1], margins[:2]), matrix(size[0], margins[2:])


def _grid(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Positions [N, height, width, (x, y)] that matrices [N, 3, 3] make of the pixel centres of [-1, 1]^2."""
    x, y = ((torch.arange(size, dtype=matrix.dtype, device=matrix.device) * 2 + (1 - size)) / size
            for size in (width, height))
    to_xy = matrix[:, None, None, :2]  # [N, 1, 1, 2, 3]
    lines = to_xy[..., 1] * y[:, None, None] + to_xy[..., 2]  # [N, height, 1, 2]
    return torch.addcmul(lines, to_xy[..., 0], x[:, None])


def _computed(x: torch.Tensor) -> torch.Tensor:
    """x in the precision of the arithmetic, without gaps."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _reference(
    x: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, size: list[int], margins: list[int],
) -> torch.Tensor:
    dtype, x = x.dtype, _computed(x)
    if is_small(x.shape[2:], x.device):
        x_matrix, y_matrix = _up_matrices(x.shape[2:], x.dtype, f, margins)
        x = y_matrix.T @ (x @ x_matrix)
    else:
        x = upfirdn2d.upsample2d(continued(x, margins), f, up=2)
    grid = _grid(matrix.to(x.dtype), *size)
    y = F.grid_sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    return y.to(dtype).contiguous()


def _fake(
    x: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, size: list[int], margins: list[int],
) -> torch.Tensor:
    return x.new_empty([*x.shape[:2], *size])


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, f, matrix, ctx.size, ctx.margins = inputs
    ctx.save_for_backward(f, matrix)
    ctx.in_size = list(x.shape[2:])


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    return warp_adjoint(dy, *ctx.saved_tensors, ctx.in_size, ctx.margins), None, None, None, None


# The adjoint. size: of the image that was sampled.

def _adjoint_reference(
    dy: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, size: list[int], margins: list[int],
) -> torch.Tensor:
    dtype, dy = dy.dtype, _computed(dy)
    padded = [size[0] + sum(margins[2:]), size[1] + sum(margins[:2])]
    grid = _grid(matrix.to(dy.dtype), *dy.shape[2:])
    # The values of the sampled image do not matter.
    nothing = dy.new_zeros([]).expand([*dy.shape[:2], *(2 * side for side in padded)])
    bilinear = zeros = align_corners = 0
    g, _ = torch.ops.aten.grid_sampler_2d_backward(
        dy, nothing, grid, bilinear, zeros, align_corners, [True, False])
    if is_small(size, dy.device):
        x_matrix, y_matrix = _up_matrices(size, g.dtype, f, margins)
        return ((y_matrix @ g) @ x_matrix.T).to(dtype).contiguous()
    up = [2, 2]
    before, after = (len(f) + 1) // 2, (len(f) - 2) // 2  # the padding of upsample2d
    padding = upfirdn2d.adjoint_padding(
        (len(f), len(f)), up, [1, 1], [before, after] * 2, padded, g.shape[2:])
    flip_filter = True
    g = upfirdn2d.upfirdn2d(g, f, down=up, padding=padding, flip_filter=flip_filter, gain=4)
    return continued_grad(g, size, margins).to(dtype).contiguous()


def _adjoint_backward(ctx: Any, v: torch.Tensor) -> tuple:
    return warp(v, *ctx.saved_tensors, ctx.in_size, ctx.margins), None, None, None, None


warp = define_op(
    'warp(Tensor x, Tensor f, Tensor matrix, int[] size, int[] margins) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward, cuda=warp_cuda.warp,
)

warp_adjoint = define_op(
    'warp_adjoint(Tensor dy, Tensor f, Tensor matrix, int[] size, int[] margins) -> Tensor',
    reference=_adjoint_reference, fake=_fake, setup_context=_setup_context, backward=_adjoint_backward,
    cuda=warp_cuda.warp_adjoint,
)
