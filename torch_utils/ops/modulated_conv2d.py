# SPDX-License-Identifier: Apache-2.0
"""Modulated convolution (StyleGAN2, Sec. 2.2), and the layer around it: noise, bias, activation.

Each sample's styles scale the input channels of one shared weight; demodulation divides each output channel
by the norm of its scaled weights. Scaling the activations instead of the weight gives the same numbers with
one ordinary convolution, and the norms are styles^2 @ (sum of weight^2 over the taps): no per-sample weight
is needed.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.ops._registry import define_op
from torch_utils.ops.bias_act import act_grad, bias_act, bias_shaped, finish_, saves_output
from torch_utils.ops.conv2d_resample import conv2d_resample

DEMODULATION_EPS = 1e-8  # inside the square root


@dataclass(frozen=True)
class Epilogue:
    """What follows the convolution: act(x + noise + bias), gain and clamp (None: no clamp)."""

    act: str
    alpha: float
    gain: float
    clamp: float | None


def modulated_conv2d(  # noqa: PLR0913 (published signature)
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, noise: torch.Tensor | None = None,
    up: int = 1, down: int = 1, padding: int | Sequence[int] = 0, resample_filter: torch.Tensor | None = None,
    demodulate: bool = True, flip_weight: bool = True, fused_modconv: bool = True,
) -> torch.Tensor:
    """Convolve each sample with its own modulated weight (StyleGAN2, Eq. 1 and 3).

    x: [N, I, H, W].  weight: [O, I, k, k].  styles: [N, I], multiplies the input channels.
    noise: added after demodulation; broadcasts to the result [N, O, H * up // down, ...].
    fused_modconv: one grouped convolution with per-sample weights instead of scaled activations; the same
    numbers.
    float16: weight and styles are pre-normalised by their maxima, which demodulation cancels; avoids
    overflow. Raises ValueError if styles is not [N, I].
    """
    weight, styles = _checked(x, weight, styles, demodulate)
    resample = {'f': resample_filter, 'up': up, 'down': down, 'padding': padding, 'flip_weight': flip_weight}
    if fused_modconv:
        x = _grouped(x, weight, styles, demodulate, resample)
        return x if noise is None else x + noise.to(x.dtype)
    d = demodulation(weight, styles) if demodulate else None
    x = conv2d_resample(x * _per_channel(styles, x), weight.to(x.dtype), **resample)
    if d is not None and noise is not None:
        return torch.addcmul(noise.to(x.dtype), x, _per_channel(d, x))
    if d is not None:
        return x * _per_channel(d, x)
    return x if noise is None else x + noise.to(x.dtype)


def modulated_layer(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, noise: torch.Tensor | None,
    bias: torch.Tensor, epilogue: Epilogue, **resample: Any,
) -> torch.Tensor:
    """A whole synthesis layer: demodulated convolution, act((x * d + noise) + bias) * gain in one operator.

    Arguments as modulated_conv2d(); bias: [O]; resample: f, up, padding, flip_weight of conv2d_resample().
    """
    if not saves_output(epilogue.act, epilogue.alpha, epilogue.gain):
        resample_filter = resample.pop('f', None)
        x = modulated_conv2d(
            x, weight, styles, noise, resample_filter=resample_filter, fused_modconv=False, **resample)
        return bias_act(
            x, bias.to(x.dtype), act=epilogue.act, alpha=epilogue.alpha, gain=epilogue.gain,
            clamp=epilogue.clamp)
    weight, styles = _checked(x, weight, styles, demodulate=True)
    d = demodulation(weight, styles).to(x.dtype)
    x = conv2d_resample(x * _per_channel(styles, x), weight.to(x.dtype), **resample)
    noise = None if noise is None else noise.to(x.dtype)
    clamp = -1.0 if epilogue.clamp is None else float(epilogue.clamp)
    return _epilogue(x, d, noise, bias.to(x.dtype), epilogue.act, epilogue.alpha, epilogue.gain, clamp)


def demodulation(weight: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
    """[N, O]: reciprocal norm of each sample's modulated weight per output channel (StyleGAN2, Eq. 3)."""
    energy = weight.square().sum([2, 3])  # [O, I]
    return (styles.square() @ energy.t() + DEMODULATION_EPS).rsqrt()


def _checked(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, styles), pre-normalised where float16 would overflow."""
    if styles.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f'styles must be [N, I] = {[x.shape[0], weight.shape[1]]}, not {list(styles.shape)}')
    if x.dtype == torch.float16 and demodulate:
        weight = weight / (weight.abs().amax([1, 2, 3], keepdim=True) * weight[0].numel() ** 0.5)
        styles = styles / styles.abs().amax(1, keepdim=True)
    return weight, styles


def _per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, C] as [N, C, 1, 1] in the dtype of x."""
    return values.to(x.dtype)[:, :, None, None]


def _grouped(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, resample: dict[str, Any],
) -> torch.Tensor:
    """One convolution with N groups, each with the weight of its sample."""
    n, _, h, w = x.shape
    per_sample = weight * styles[:, None, :, None, None]  # [N, O, I, k, k]
    if demodulate:
        per_sample = per_sample * demodulation(weight, styles)[:, :, None, None, None]
    grouped = per_sample.flatten(0, 1).to(x.dtype)
    y = conv2d_resample(x.reshape(1, -1, h, w), grouped, groups=n, **resample)
    return y.reshape(n, weight.shape[0], *y.shape[2:])


# The operator act((x * d + noise) + b) * gain, clamped; only for activations whose slope the output tells.

def _reference(
    x: torch.Tensor, d: torch.Tensor, noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    y = torch.addcmul(bias_shaped(b, 4, 1), x, d[:, :, None, None])
    if noise is not None:
        y.add_(noise)
    return finish_(y, act, alpha, gain, clamp)


def _fake(
    x: torch.Tensor, d: torch.Tensor, noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, d, noise, _, *ctx.spec = inputs
    ctx.noise_shape = None if noise is None else noise.shape
    ctx.save_for_backward(x, d, output)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, d, y = ctx.saved_tensors
    g = act_grad(dy, y, *ctx.spec)
    dx = g * d[:, :, None, None] if ctx.needs_input_grad[0] else None
    dd = (g * x).sum([2, 3]) if ctx.needs_input_grad[1] else None
    dnoise = g.sum_to_size(ctx.noise_shape) if ctx.needs_input_grad[2] else None
    db = g.sum([0, 2, 3]) if ctx.needs_input_grad[3] else None
    return dx, dd, dnoise, db, None, None, None, None


_epilogue = define_op(
    'modulated_epilogue(Tensor x, Tensor d, Tensor? noise, Tensor b, str act, float alpha, float gain, '
    'float clamp) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
)
