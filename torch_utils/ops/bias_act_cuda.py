# SPDX-License-Identifier: Apache-2.0
"""Launch geometry of csrc/bias_act.cu. Each function computes its operator, or returns None to leave a case
to the reference.
"""
import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import native
from torch_utils.ops._registry import empty_as
from torch_utils.ops.activations import activation_funcs, saves_output

ACT_NUMBERS = {name: number for number, name in enumerate(activation_funcs, start=1)}  # as in activation.cuh
NO_BIAS, BIAS_PER_VECTOR, BIAS_ALONG_VECTOR = range(3)


def bias_act_kernel(
    entry: str, dtype: torch.dtype, act: str, vec: int, bias: int = NO_BIAS, has_addend: bool = False,
) -> Kernel:
    """One specialisation; entry: bias_act, bias_act_grad or bias_act_curvature."""
    addend = {'ADDEND': 1} if has_addend else {}
    return native.kernel('bias_act.cu', entry, SCALAR_T=native.TYPE_NAMES[dtype], ACT=ACT_NUMBERS[act],
                         VEC=vec, BIAS=bias, **addend)


def bias_act(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float,
    addend: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Native form of the operator bias_act; of bias_act_plus with an addend that has the shape of x."""
    if not native.supports(x, b, addend):
        return None
    y = empty_as(x)
    x, addend = native.dense(x, y), None if addend is None else native.dense(addend, y)
    step, mode, run = 1, NO_BIAS, x.numel()
    if b is not None:
        b = b.contiguous()
        step = y.stride(dim) if y.shape[dim] > 1 else x.numel()
        mode = BIAS_ALONG_VECTOR if step == 1 else BIAS_PER_VECTOR
        run = b.numel() if step == 1 else step
    vec = native.vector_width(run, x, y, b if mode == BIAS_ALONG_VECTOR else None, addend)
    count = 1 if b is None else b.numel()
    last = () if addend is None else (addend,)
    native.launch(
        bias_act_kernel('bias_act', x.dtype, act, vec, mode, addend is not None),
        native.blocks_for(x.numel() // vec),
        (x, b, y, x.numel(), step, count, float(alpha), float(gain), float(clamp), *last), x.device)
    return y


def bias_act_grad(
    dy: torch.Tensor, saved: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor | None:
    """Native form of the operator bias_act_grad."""
    if not native.supports(dy, saved) or dy.shape != saved.shape:
        return None
    dx = empty_as(saved, dy)
    dy, saved = native.dense(dy, dx), native.dense(saved, dx)
    vec = native.vector_width(dx.numel(), dy, saved, dx)
    from_output = int(saves_output(act, alpha, gain))
    native.launch(
        bias_act_kernel('bias_act_grad', dx.dtype, act, vec), native.blocks_for(dx.numel() // vec),
        (dy, saved, dx, dx.numel(), from_output, float(alpha), float(gain), float(clamp)), dx.device)
    return dx


def bias_act_curvature(
    dy: torch.Tensor, ddx: torch.Tensor, u: torch.Tensor, act: str, gain: float, clamp: float,
) -> torch.Tensor | None:
    """Native form of the operator bias_act_curvature."""
    if not native.supports(u, dy, ddx):
        return None
    result = empty_as(u)
    dy, ddx, u = (native.dense(t, result) for t in (dy, ddx, u))
    vec = native.vector_width(u.numel(), dy, ddx, u, result)
    native.launch(
        bias_act_kernel('bias_act_curvature', u.dtype, act, vec), native.blocks_for(u.numel() // vec),
        (dy, ddx, u, result, u.numel(), 0.0, float(gain), float(clamp)), u.device)
    return result
