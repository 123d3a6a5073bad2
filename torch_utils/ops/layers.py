# SPDX-License-Identifier: Apache-2.0
"""The layers of the networks, each as few operators of this project.

Sources inside snapshots call these functions, so their signatures do not change. Programs without this module
use torch_utils.ops.plain_layers, which computes the same.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_utils.ops import modulated_conv2d as modulated
from torch_utils.ops.activated import activated_filter, bias_act_plus, is_worthwhile
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.conv2d_gradfix import conv2d
from torch_utils.ops.conv2d_resample import conv2d_resample, fork_down, padding_before_down
from torch_utils.ops.modulated_conv2d import Modulation, modulate
from torch_utils.ops.pixel_product import image_layer, is_channels_last, is_image_layer
from torch_utils.ops.scaled_cast import scaled_cast

__all__ = ['Activation', 'convolution', 'defer', 'fork_down', 'modulate', 'synthesis', 'to_image']


@dataclass(frozen=True)
class Activation:
    """act(x + bias) * gain within +-clamp, which a layer has left to the next one."""

    bias: torch.Tensor
    act: str
    gain: float
    clamp: float | None

    @property
    def spec(self) -> tuple[str, float, float, float]:
        """As the operators take it."""
        return self.act, activation_funcs[self.act].def_alpha, float(self.gain), _limit(self.clamp)


def defer(
    x: torch.Tensor, bias: torch.Tensor | None, act: str, gain: float, clamp: float | None,
) -> Activation | None:
    """What a layer with input x may leave to the next one, a down-sampling convolution, which applies it in
    the pass of its filter; None where nothing is gained.
    """
    is_possible = bias is not None and is_channels_last(x) and is_worthwhile(
        x, act, activation_funcs[act].def_alpha, gain)
    return Activation(bias, act, gain, clamp) if is_possible else None


def convolution(  # noqa: PLR0913 (all that a layer has)
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, resample_filter: torch.Tensor,
    weight_gain: float, act: str, gain: float, clamp: float | None, up: int = 1, down: int = 1,
    padding: int = 0, small: torch.Tensor | None = None, addend: torch.Tensor | None = None,
    before: Activation | None = None, is_deferred: bool = False,
) -> torch.Tensor:
    """act(conv(x, weight * weight_gain) + bias) * gain within +-clamp, up- or down-sampled with the filter.

    x: [N, I, H, W].  weight: [O, I, k, k].  bias: [O].  Returns [N, O, H * up // down, W * up // down] in the
    dtype of x.  small: what fork_down() made of x, if the caller has it; only for k = 1.  addend: added to
    the result.  before: of defer(), what x still lacks; only for down > 1 and k > 1.  is_deferred: only
    convolve, since the next layer gets the rest as its `before`.
    """
    if act == 'linear' and bias is None:
        # What scales the result may as well scale the weight: a pass over the image less.
        weight_gain, gain = weight_gain * gain, 1
    weight = scaled_cast(weight, weight_gain, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    is_piecewise = bias is not None and activation_funcs[act].slope is None
    is_alone = up == down == 1 and addend is None and not is_deferred
    if is_piecewise and is_alone and is_image_layer(x, weight):
        return image_layer(x, weight, bias, act, gain, clamp)
    if before is not None:
        x = activated_filter(
            x, resample_filter, padding_before_down(padding, resample_filter, down), False,  # noqa: FBT003
            before.bias.to(x.dtype), *before.spec)
        x = conv2d(x, weight, stride=down)
    elif small is None:
        x = conv2d_resample(
            x, weight, resample_filter, up=up, down=down, padding=padding, flip_weight=up == 1)
    else:
        x = conv2d_resample(small, weight)
    if is_deferred:
        return x
    alpha = activation_funcs[act].def_alpha
    if addend is not None and bias is not None and is_worthwhile(x, act, alpha, gain):
        return bias_act_plus(x, bias, addend, act, alpha, float(gain), _limit(clamp))
    x = bias_act(x, bias, act=act, gain=gain, clamp=clamp)
    return x if addend is None else addend + x


def _limit(clamp: float | None) -> float:
    return -1.0 if clamp is None else float(clamp)


def synthesis(  # noqa: PLR0913 (all that a layer has)
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor | None, noise: torch.Tensor | None,
    bias: torch.Tensor, resample_filter: torch.Tensor, act: str, gain: float, clamp: float | None,
    up: int = 1, padding: int = 0, fused: bool = False, modulation: Modulation | None = None,
    next_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(demodulated convolution of x + noise + bias) * gain within +-clamp (StyleGAN2, Sec. 2.2).

    x: [N, I, H, W].  weight: [O, I, k, k].  styles: [N, I].  noise: broadcasts to the result
    [N, O, H * up, W * up], which has the dtype of x.  bias: [O].
    fused: scale weights instead of activations.  Else: modulation, what modulate() made of weight and styles,
    takes the place of styles; next_scale [N, O] multiplies the result.
    """
    resample = {'up': up, 'padding': padding, 'flip_weight': up == 1}
    if fused:
        x = modulated.modulated_conv2d(
            x, weight, styles, noise, resample_filter=resample_filter, **resample)
        return bias_act(x, bias.to(x.dtype), act=act, gain=gain, clamp=clamp)
    epilogue = modulated.Epilogue(act, activation_funcs[act].def_alpha, gain, clamp)
    if modulation is None:
        modulation = modulate(weight, styles, x.dtype)
    return modulated.finished_convolution(
        x, modulation, noise, bias, epilogue, next_scale, f=resample_filter, **resample)


def to_image(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, bias: torch.Tensor, clamp: float | None,
    fused: bool = False,
) -> torch.Tensor:
    """Modulated convolution without demodulation, bias and clamp: [N, I, H, W] -> [N, O, H, W]."""
    return modulated.modulated_product(x, weight, styles, bias, clamp, fused)
