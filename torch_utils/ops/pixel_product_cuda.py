# SPDX-License-Identifier: Apache-2.0
"""Launch geometry of csrc/pixel_product.cu. Each function computes its operator, or returns None to leave a
case to the reference.
"""
from collections.abc import Sequence
from typing import Any

import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import native
from torch_utils.ops.bias_act_cuda import ACT_NUMBERS
from torch_utils.ops.epilogue_cuda import Walk

MAX_FEW = 8  # channels of an image
MAX_WEIGHTS = 64  # of the matrix, in the registers of a thread
NO_FINISH = (0.0, 1.0, -1.0)  # alpha, gain, clamp


def product(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool,
) -> torch.Tensor | None:
    """Native form of the operator pixel_product."""
    return _product(x, w, b, channels_last, None, NO_FINISH)


def layer(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, channels_last: bool, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor | None:
    """Native form of the operator pixel_layer."""
    return _product(x, w, b, channels_last, act, (float(alpha), float(gain), float(clamp)))


def outer(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Native form of the operator pixel_outer."""
    if not native.supports(dy, x) or not native.has_short_offsets(dy, x):
        return None
    o, i = dy.shape[1], x.shape[1]
    if o <= MAX_FEW and native.is_channels_last(x):
        few, many, steps = dy, x, (i, 1)
    elif i <= MAX_FEW and native.is_channels_last(dy):
        few, many, steps = x, dy, (1, i)
    else:
        return None
    few = native.packed(few)
    walk = _walk(many)
    sums = torch.empty(
        [walk.samples, walk.row_chunks, o, i], dtype=native.accumulator(x.dtype), device=x.device)
    kernel = product_kernel('few_by_many', x.dtype, walk.vec, few.shape[1])
    native.launch(
        kernel, walk.blocks, (few, many, sums, *_few_steps(few), *steps, *walk.arguments()), x.device)
    return sums.sum(1).to(x.dtype)


def layer_grad(  # noqa: PLR0913 (the operator's arguments)
    dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, wants: Sequence[bool], act: str,
    alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...] | None:
    """Native form of the operator pixel_layer_grad."""
    if not native.supports(dy, y, x, w) or x.shape[1] > MAX_FEW or not native.has_short_offsets(y):
        return None
    if not native.is_channels_last(y):
        return None
    dy, x = native.dense(dy, y), native.packed(x)
    walk = _walk(y, dy)
    if wants[0] and walk.col_chunks > 1:
        return None
    n, o, i = w.shape
    dx = torch.empty_like(x) if wants[0] else None
    exact, device = native.accumulator(x.dtype), x.device
    sum_gx = torch.empty([n, walk.row_chunks, o, i], dtype=exact, device=device) if wants[1] else None
    sum_g = torch.empty([n, walk.row_chunks, o], dtype=exact, device=device) if wants[2] else None
    kernel = product_kernel('few_to_many_grad', x.dtype, walk.vec, i, act)
    steps = *_few_steps(x), w.stride(0), w.stride(2), w.stride(1)
    native.launch(
        kernel, walk.blocks, (dy, y, x, w, dx, sum_gx, sum_g, *steps, *walk.arguments(),
                              float(alpha), float(gain), float(clamp)), device)
    dw = None if sum_gx is None else sum_gx.sum(1).to(x.dtype)
    db = None if sum_g is None else sum_g.sum((0, 1)).to(x.dtype)
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dw, db))


def product_kernel(
    entry: str, dtype: torch.dtype, vec: int, few: int, act: str | None = None, chunks: int = 1,
) -> Kernel:
    """One specialisation; entry: few_to_many, many_to_few (which has chunks), few_by_many (has no act)
    or few_to_many_grad.
    """
    finish = {} if act is None else {'FINISH': 1, 'ACT': ACT_NUMBERS[act]}
    return native.kernel('pixel_product.cu', entry, SCALAR_T=native.TYPE_NAMES[dtype], VEC=vec, FEW=few,
                         CHUNKS=chunks, **finish)


def _product(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool, act: str | None,
    numbers: tuple[float, float, float],
) -> torch.Tensor | None:
    n, i, height, width = x.shape
    o = w.shape[1]
    if not native.supports(x, w, b) or o == 0 or height * width * max(o, i) > native.MAX_OFFSET:
        return None
    to_few = o <= MAX_FEW and native.is_channels_last(x) and (o < i or not channels_last)
    if not to_few and not (i <= MAX_FEW and channels_last):
        return None
    y = torch.empty(
        [n, o, height, width], dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x, b = native.packed(x), None if b is None else b.contiguous()
    if not to_few:
        walk = _walk(y)
        arguments: tuple[Any, ...] = (x, w, b, y, *_few_steps(x), w.stride(0), w.stride(2), w.stride(1))
        kernel = product_kernel('few_to_many', x.dtype, walk.vec, i, act)
        native.launch(kernel, walk.blocks, (*arguments, *walk.arguments(), *numbers), x.device)
        return y
    walk = _walk(x)
    if o * walk.vec * walk.col_chunks > MAX_WEIGHTS:
        return None
    kernel = product_kernel('many_to_few', x.dtype, walk.vec, o, act, walk.col_chunks)
    shape = walk.rows, walk.cols, walk.lanes, walk.chunk_rows, walk.row_chunks
    steps = _few_steps(y, channels_last)
    native.launch(
        kernel, walk.samples * walk.row_chunks, (x, w, b, y, *steps, *w.stride(), *shape, *numbers), x.device)
    return y


def _walk(*many: torch.Tensor) -> Walk:
    """Over tensors [N, C, H, W], which are in NHWC."""
    n, c, h, w = many[0].shape
    return Walk(n, c, h * w, channels_last=True, vec=native.vector_width(c, *many))


def _few_steps(few: torch.Tensor, channels_last: bool | None = None) -> tuple[int, int]:
    """Elements from channel to channel and from pixel to pixel of a dense [N, C, H, W]."""
    last = native.is_channels_last(few) if channels_last is None else channels_last
    return (1, few.shape[1]) if last else (few.shape[2] * few.shape[3], 1)
