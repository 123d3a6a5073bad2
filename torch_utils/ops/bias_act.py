# SPDX-License-Identifier: Apache-2.0
"""y = clamp(act(x + b) * gain): bias, activation, gain, clamp in one, with gradients of any order."""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops._registry import define_op

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, Sec. 2


@dataclass(frozen=True)
class Activation:
    """One row of `activation_funcs`; func(x, alpha) is the activation without its gain.

    slope and curvature are act' and act'' of the smooth activations as differentiable torch code; the
    piecewise linear ones have none, since a sign is all that their derivative needs.
    """

    func: Callable[[torch.Tensor, float], torch.Tensor]
    def_alpha: float = 0.0
    def_gain: float = 1.0
    slope: Callable[[torch.Tensor], torch.Tensor] | None = None
    curvature: Callable[[torch.Tensor], torch.Tensor] | None = None


def _sigmoid_slope(u: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(u) * torch.sigmoid(-u)


def _tanh_slope(u: torch.Tensor) -> torch.Tensor:
    return 1 - torch.tanh(u).square()


def _swish_slope(u: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(u) + u * _sigmoid_slope(u)


def _swish_curvature(u: torch.Tensor) -> torch.Tensor:
    return _sigmoid_slope(u) * (2 - u * torch.tanh(u / 2))


def _exponential(scale: float, positive: float) -> Callable[[torch.Tensor], torch.Tensor]:
    # The exponent is limited first: where() would otherwise pass on inf * 0 in its own backward.
    return lambda u: torch.where(u > 0, torch.full_like(u, positive), scale * u.clamp(max=0).exp())


SELU_EXP = SELU_SCALE * SELU_ALPHA
activation_funcs: dict[str, Activation] = {
    'linear': Activation(lambda x, alpha: x),
    'relu': Activation(lambda x, alpha: F.relu(x), def_gain=math.sqrt(2)),
    'lrelu': Activation(F.leaky_relu, def_alpha=0.2, def_gain=math.sqrt(2)),
    'tanh': Activation(
        lambda x, alpha: torch.tanh(x), slope=_tanh_slope,
        curvature=lambda u: -2 * torch.tanh(u) * _tanh_slope(u)),
    'sigmoid': Activation(
        lambda x, alpha: torch.sigmoid(x), slope=_sigmoid_slope,
        curvature=lambda u: -_sigmoid_slope(u) * torch.tanh(u / 2)),
    'elu': Activation(
        lambda x, alpha: F.elu(x), slope=_exponential(1.0, 1.0), curvature=_exponential(1.0, 0.0)),
    'selu': Activation(
        lambda x, alpha: F.selu(x), slope=_exponential(SELU_EXP, SELU_SCALE),
        curvature=_exponential(SELU_EXP, 0.0)),
    'softplus': Activation(lambda x, alpha: F.softplus(x), slope=torch.sigmoid, curvature=_sigmoid_slope),
    'swish': Activation(
        lambda x, alpha: x * torch.sigmoid(x), def_gain=math.sqrt(2), slope=_swish_slope,
        curvature=_swish_curvature),
}


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
    # What torch does natively in one pass needs no operator of ours; the smooth ones take their bias so, too.
    if b is not None and (spec.slope is not None or (act == 'linear' and gain == 1)):
        x, b = x + bias_shaped(b, x.ndim, dim), None
    if act == 'linear' and clamp is None and b is None:
        return x if gain == 1 else x * gain
    return _bias_act(x, b, dim, act, alpha, gain, -1.0 if clamp is None else float(clamp))


def bias_shaped(b: torch.Tensor, ndim: int, dim: int) -> torch.Tensor:
    """b [C] viewed with `ndim` axes, its values along axis `dim`."""
    return b.reshape([-1 if i == dim else 1 for i in range(ndim)])


def saves_output(act: str, alpha: float, gain: float) -> bool:
    """Whether the slope can be told from the sign of the output, so that the input need not be kept."""
    return activation_funcs[act].slope is None and alpha >= 0 and gain > 0


def finish_(y: torch.Tensor, act: str, alpha: float, gain: float, clamp: float) -> torch.Tensor:
    """Piecewise linear activation, gain and clamp of a tensor of our own, in place."""
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
        return finish_(activation_funcs[act].func(x, alpha), 'linear', alpha, gain, clamp)
    y = x.clone() if b is None else x + bias_shaped(b, x.ndim, dim)
    return finish_(y, act, alpha, gain, clamp)


def _fake(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, b, ctx.dim, *ctx.spec = inputs
    ctx.has_bias = b is not None
    if saves_output(*ctx.spec[:3]):
        ctx.save_for_backward(output)
    else:
        ctx.save_for_backward(x if b is None else x + bias_shaped(b, x.ndim, ctx.dim))


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    dx = act_grad(dy, ctx.saved_tensors[0], *ctx.spec)
    if not (ctx.has_bias and ctx.needs_input_grad[1]):
        return dx, None, None, None, None, None, None
    others = [i for i in range(dx.ndim) if i != ctx.dim]
    db = dx.sum(others) if others else dx
    return dx, db, None, None, None, None, None


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
        dx = dx.masked_fill(y.abs() >= clamp, 0)
    return dx


def _grad_fake(
    dy: torch.Tensor, saved: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return torch.empty_like(dy)


def _grad_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    dy, saved, *ctx.spec = inputs
    ctx.save_for_backward(dy, saved)


def _grad_backward(ctx: Any, ddx: torch.Tensor) -> tuple:
    dy, saved = ctx.saved_tensors
    return act_grad(ddx, saved, *ctx.spec), _curvature(dy * ddx, saved, *ctx.spec), None, None, None, None


def _curvature(
    dy_ddx: torch.Tensor, u: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor | None:
    """dy * ddx * gain * act''(u) of a smooth activation, itself differentiable; None where act'' is zero."""
    spec = activation_funcs[act]
    if spec.curvature is None:
        return None
    result = dy_ddx * spec.curvature(u) * gain
    if clamp < 0:
        return result
    return result.masked_fill((spec.func(u, alpha) * gain).abs() >= clamp, 0)


_bias_act = define_op(
    'bias_act(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float clamp) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
)

act_grad = define_op(
    'bias_act_grad(Tensor dy, Tensor saved, str act, float alpha, float gain, float clamp) -> Tensor',
    reference=_grad_reference, fake=_grad_fake, setup_context=_grad_setup_context, backward=_grad_backward,
)
