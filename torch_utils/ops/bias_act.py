# SPDX-License-Identifier: Apache-2.0
"""y = clamp(act(x + b) * gain): fused bias, activation, gain and clamp, with gradients of any order."""
import functools
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops import bias_act_cuda, epilogue_cuda
from torch_utils.ops._registry import define_op, empty_as, laid_out_as
from torch_utils.ops.activations import Activation, activation_funcs, saves_output

__all__ = ['Activation', 'act_grad', 'activation_funcs', 'bias_act', 'bias_shaped', 'finish_', 'saves_output']

def bias_act(
    x: torch.Tensor, b: torch.Tensor | None = None, dim: int = 1, act: str = 'linear',
    alpha: float | None = None, gain: float | None = None, clamp: float | None = None, impl: str = 'cuda',
) -> torch.Tensor:
    """Add a bias along one axis, apply an activation, multiply by a gain and clamp, in this order.

    x: any shape.  b: [x.shape[dim]] or None.  act: a key of `activation_funcs`.  alpha: slope of 'lrelu'.
    gain: None is the activation's default (sqrt(2) for relu, lrelu, swish).  clamp: limit of |y|, None for
    none.  Returns the shape and dtype of x. Raises ValueError for an unknown act, a wrong bias or a negative
    clamp.
    """
    if act not in activation_funcs:
        raise ValueError(f'act={act!r} is not one of {", ".join(activation_funcs)}')
    if b is not None and (not 0 <= dim < x.ndim or b.shape != (x.shape[dim],)):
        raise ValueError(
            f'the bias must be [x.shape[dim]]; x is {list(x.shape)}, {dim=}, b is {list(b.shape)}')
    if clamp is not None and clamp < 0:
        raise ValueError(f'clamp={clamp} must not be negative')
    spec = activation_funcs[act]
    alpha = float(spec.def_alpha if alpha is None else alpha)
    gain = float(spec.def_gain if gain is None else gain)
    # Where torch needs one pass, no custom op is used; smooth activations add their bias this way, too.
    if b is not None and (spec.slope is not None or (act == 'linear' and gain == 1)):
        x, b = x + bias_shaped(b, x.ndim, dim), None
    if act == 'linear' and clamp is None and b is None:
        return x if gain == 1 else x * gain
    return _bias_act(x, b, dim, act, alpha, gain, -1.0 if clamp is None else float(clamp))


def bias_shaped(b: torch.Tensor, ndim: int, dim: int) -> torch.Tensor:
    """b [C] viewed with `ndim` axes, its values along axis `dim`."""
    return b.reshape([-1 if i == dim else 1 for i in range(ndim)])


def finish_(y: torch.Tensor, act: str, alpha: float, gain: float, clamp: float) -> torch.Tensor:
    """Piecewise linear activation, gain and clamp, in place."""
    if act != 'linear':
        F.leaky_relu_(y, alpha if act == 'lrelu' else 0.0)
    if gain != 1:
        y.mul_(gain)
    return y.clamp_(-clamp, clamp) if clamp >= 0 else y


# The operators. clamp < 0 stands for none. A smooth activation has no bias here (already in x).

def _reference(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    if activation_funcs[act].slope is not None:
        return laid_out_as(finish_(activation_funcs[act].func(x, alpha), 'linear', alpha, gain, clamp), x)
    y = x.clone() if b is None else x + bias_shaped(b, x.ndim, dim)
    return laid_out_as(finish_(y, act, alpha, gain, clamp), x)


def _fake(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return empty_as(x)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, b, ctx.dim, *ctx.spec = inputs
    if saves_output(*ctx.spec[:3]):
        ctx.save_for_backward(output)
    else:
        ctx.save_for_backward(x if b is None else x + bias_shaped(b, x.ndim, ctx.dim))


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    (saved,) = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return act_grad(dy, saved, *ctx.spec), None, None, None, None, None, None
    if dy.ndim == 4 and ctx.dim == 1 and saves_output(*ctx.spec[:3]):
        return *act_grad_both(dy, saved, *ctx.spec), None, None, None, None, None
    dx = act_grad(dy, saved, *ctx.spec)
    others = [i for i in range(dx.ndim) if i != ctx.dim]
    return dx, dx.sum(others) if others else dx, None, None, None, None, None


def _grad_reference(
    dy: torch.Tensor, saved: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    from_output = saves_output(act, alpha, gain)
    if activation_funcs[act].slope is not None:
        dx = dy * activation_funcs[act].slope(saved) * gain
    elif act == 'linear':
        dx = dy * gain
    else:
        slope = 0.0 if act == 'relu' else alpha
        dx = torch.ops.aten.leaky_relu_backward(dy, saved, slope, from_output).mul_(gain)
    if clamp >= 0:
        y = saved if from_output else activation_funcs[act].func(saved, alpha) * gain
        limit = _rounded(clamp, y.dtype)
        dx = torch.ops.aten.hardtanh_backward(dx, y, -limit, limit)
    # In the layout of the activation: dy may be an expanded scalar.
    return laid_out_as(dx, saved, dy)


@functools.cache
def _rounded(clamp: float, dtype: torch.dtype) -> float:
    """The clamp rounded to a dtype."""
    return float(torch.tensor(clamp, dtype=dtype, device='cpu'))


def _grad_fake(
    dy: torch.Tensor, saved: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return empty_as(saved, dy)


def _grad_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    dy, saved, *ctx.spec = inputs
    ctx.save_for_backward(dy, saved)


def _grad_backward(ctx: Any, ddx: torch.Tensor) -> tuple:
    dy, saved = ctx.saved_tensors
    act, _, gain, clamp = ctx.spec
    is_curved = activation_funcs[act].curvature is not None and ctx.needs_input_grad[1]
    curvature = act_curvature(dy, ddx, saved, act, gain, clamp) if is_curved else None
    return act_grad(ddx, saved, *ctx.spec), curvature, None, None, None, None


# The same for a bias per channel, with the gradient of the bias: (dx, db) in one pass over an image.
# `y`: output of an activation for which saves_output() holds, so the second derivative is zero.

def _both_reference(
    dy: torch.Tensor, y: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = _grad_reference(dy, y, act, alpha, gain, clamp)
    return dx, dx.sum([0, 2, 3])


def _both_fake(
    dy: torch.Tensor, y: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_as(y, dy), y.new_empty(y.shape[1])


def _both_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, y, *ctx.spec = inputs
    ctx.save_for_backward(y)
    ctx.set_materialize_grads(False)


def _both_backward(ctx: Any, ddx: torch.Tensor | None, ddb: torch.Tensor | None) -> tuple:
    (y,) = ctx.saved_tensors
    total = ddx
    if ddb is not None:
        spread = bias_shaped(ddb, 4, 1)
        total = spread.expand_as(y) if ddx is None else ddx + spread
    to_dy = None if total is None else act_grad(total, y, *ctx.spec)
    return to_dy, None, None, None, None, None


# dy * ddx * gain * act''(u) of a smooth activation, zero where the clamp is active.

def _curvature_reference(
    dy: torch.Tensor, ddx: torch.Tensor, u: torch.Tensor, act: str, gain: float, clamp: float,
) -> torch.Tensor:
    product = dy * ddx * activation_funcs[act].curvature(u) * gain
    return laid_out_as(_within_clamp(product, u, act, gain, clamp), u)


def _curvature_fake(
    dy: torch.Tensor, ddx: torch.Tensor, u: torch.Tensor, act: str, gain: float, clamp: float,
) -> torch.Tensor:
    return empty_as(u)


def _curvature_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    dy, ddx, u, *ctx.spec = inputs
    ctx.save_for_backward(dy, ddx, u)


def _curvature_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (dy, ddx, u), (act, gain, clamp) = ctx.saved_tensors, ctx.spec
    wants = ctx.needs_input_grad
    to_dy = act_curvature(grad, ddx, u, *ctx.spec) if wants[0] else None
    to_ddx = act_curvature(dy, grad, u, *ctx.spec) if wants[1] else None
    if not wants[2]:
        return to_dy, to_ddx, None, None, None, None
    to_u = _within_clamp(grad * dy * ddx * activation_funcs[act].jerk(u) * gain, u, act, gain, clamp)
    return to_dy, to_ddx, to_u, None, None, None


def _within_clamp(
    values: torch.Tensor, u: torch.Tensor, act: str, gain: float, clamp: float,
) -> torch.Tensor:
    """values, but zero where act(u) * gain is clamped."""
    if clamp < 0:
        return values
    return values.masked_fill((activation_funcs[act].func(u, 0.0) * gain).abs() >= clamp, 0)


_bias_act = define_op(
    'bias_act(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float clamp) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
    cuda=bias_act_cuda.bias_act,
)

act_grad = define_op(
    'bias_act_grad(Tensor dy, Tensor saved, str act, float alpha, float gain, float clamp) -> Tensor',
    reference=_grad_reference, fake=_grad_fake, setup_context=_grad_setup_context, backward=_grad_backward,
    cuda=bias_act_cuda.bias_act_grad,
)

act_grad_both = define_op(
    'bias_act_grad_both(Tensor dy, Tensor y, str act, float alpha, float gain, float clamp) '
    '-> (Tensor, Tensor)',
    reference=_both_reference, fake=_both_fake, setup_context=_both_setup_context, backward=_both_backward,
    cuda=epilogue_cuda.act_grad_both,
)

act_curvature = define_op(
    'bias_act_curvature(Tensor dy, Tensor ddx, Tensor u, str act, float gain, float clamp) -> Tensor',
    reference=_curvature_reference, fake=_curvature_fake, setup_context=_curvature_setup_context,
    backward=_curvature_backward, cuda=bias_act_cuda.bias_act_curvature,
)
