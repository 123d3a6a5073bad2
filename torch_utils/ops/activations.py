# SPDX-License-Identifier: Apache-2.0
"""The nine activations of bias_act() with their derivatives, one row each."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, Sec. 2
SELU_EXP = SELU_SCALE * SELU_ALPHA
Derivative = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """One row of `activation_funcs`; func(x, alpha) is the activation without its gain.

    slope, curvature and jerk are the first three derivatives of the smooth activations as differentiable
    torch code; the piecewise linear ones have none, since their derivative depends on a sign only.
    """

    func: Callable[[torch.Tensor, float], torch.Tensor]
    def_alpha: float = 0.0
    def_gain: float = 1.0
    slope: Derivative | None = None
    curvature: Derivative | None = None
    jerk: Derivative | None = None


def _sigmoid_slope(u: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(u) * torch.sigmoid(-u)


def _sigmoid_curvature(u: torch.Tensor) -> torch.Tensor:
    return -_sigmoid_slope(u) * torch.tanh(u / 2)


def _sigmoid_jerk(u: torch.Tensor) -> torch.Tensor:
    slope = _sigmoid_slope(u)
    return slope * (1 - 6 * slope)


def _tanh_slope(u: torch.Tensor) -> torch.Tensor:
    return 1 - torch.tanh(u).square()


def _tanh_curvature(u: torch.Tensor) -> torch.Tensor:
    return -2 * torch.tanh(u) * _tanh_slope(u)


def _tanh_jerk(u: torch.Tensor) -> torch.Tensor:
    return _tanh_slope(u) * (6 * torch.tanh(u).square() - 2)


def _swish_slope(u: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(u) + u * _sigmoid_slope(u)


def _swish_curvature(u: torch.Tensor) -> torch.Tensor:
    return _sigmoid_slope(u) * (2 - u * torch.tanh(u / 2))


def _swish_jerk(u: torch.Tensor) -> torch.Tensor:
    return 3 * _sigmoid_curvature(u) + u * _sigmoid_jerk(u)


def _exponential(scale: float, positive: float) -> Derivative:
    # The exponent is limited first: where() would otherwise pass on inf * 0 in its own backward.
    return lambda u: torch.where(u > 0, torch.full_like(u, positive), scale * u.clamp(max=0).exp())


def _exponential_activation(
    func: Callable[[torch.Tensor, float], torch.Tensor], scale: float, positive: float,
) -> Activation:
    return Activation(func, slope=_exponential(scale, positive), curvature=_exponential(scale, 0.0),
                      jerk=_exponential(scale, 0.0))


activation_funcs: dict[str, Activation] = {
    'linear': Activation(lambda x, alpha: x),
    'relu': Activation(lambda x, alpha: F.relu(x), def_gain=math.sqrt(2)),
    'lrelu': Activation(F.leaky_relu, def_alpha=0.2, def_gain=math.sqrt(2)),
    'tanh': Activation(
        lambda x, alpha: torch.tanh(x), slope=_tanh_slope, curvature=_tanh_curvature, jerk=_tanh_jerk),
    'sigmoid': Activation(
        lambda x, alpha: torch.sigmoid(x), slope=_sigmoid_slope, curvature=_sigmoid_curvature,
        jerk=_sigmoid_jerk),
    'elu': _exponential_activation(lambda x, alpha: F.elu(x), 1.0, 1.0),
    'selu': _exponential_activation(lambda x, alpha: F.selu(x), SELU_EXP, SELU_SCALE),
    'softplus': Activation(
        lambda x, alpha: F.softplus(x), slope=torch.sigmoid, curvature=_sigmoid_slope,
        jerk=_sigmoid_curvature),
    'swish': Activation(
        lambda x, alpha: x * torch.sigmoid(x), def_gain=math.sqrt(2), slope=_swish_slope,
        curvature=_swish_curvature, jerk=_swish_jerk),
}


def saves_output(act: str, alpha: float, gain: float) -> bool:
    """Whether the sign of the output determines the slope, so that the input need not be saved."""
    return activation_funcs[act].slope is None and alpha >= 0 and gain > 0
