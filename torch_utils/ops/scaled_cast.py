# SPDX-License-Identifier: Apache-2.0
"""A tensor times a number in another element type, in one pass: weights of layers that compute in 16 bits."""
from typing import Any

import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import native
from torch_utils.ops._registry import define_op, laid_out_as, memory_format_of


def scaled_cast(x: torch.Tensor, gain: float, dtype: torch.dtype) -> torch.Tensor:
    """x * gain as `dtype`, computed in the wider of both types. Any shape; gradients have the dtype of x."""
    return x * gain if x.dtype == dtype else _scaled_cast(x, float(gain), dtype)


def _reference(x: torch.Tensor, gain: float, dtype: torch.dtype) -> torch.Tensor:
    product = x.to(torch.promote_types(x.dtype, dtype)) * gain
    return laid_out_as(product.to(dtype), x)


def _fake(x: torch.Tensor, gain: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format_of(x))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, ctx.gain, _ = inputs
    ctx.dtype = x.dtype


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    return _scaled_cast(dy, ctx.gain, ctx.dtype), None, None


def scaled_cast_kernel(dtype: torch.dtype, out_dtype: torch.dtype, vec: int) -> Kernel:
    """One specialisation."""
    return native.kernel('scaled_cast.cu', 'scaled_cast', SCALAR_T=native.TYPE_NAMES[dtype],
                         OUT_T=native.TYPE_NAMES[out_dtype], VEC=vec)


def _cuda(x: torch.Tensor, gain: float, dtype: torch.dtype) -> torch.Tensor | None:
    is_known = native.supports(x) and dtype in native.TYPE_NAMES
    if not is_known or native.accumulator(x.dtype) != native.accumulator(dtype):
        return None
    x, y = native.packed(x), _fake(x, gain, dtype)
    vec = min(native.vector_width(x.numel(), t) for t in (x, y))
    blocks = native.blocks_for(x.numel() // vec)
    native.launch(scaled_cast_kernel(x.dtype, dtype, vec), blocks, (x, y, x.numel(), gain), x.device)
    return y


_scaled_cast = define_op(
    'scaled_cast(Tensor x, float gain, ScalarType dtype) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward, cuda=_cuda,
)
