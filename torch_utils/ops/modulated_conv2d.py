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

from torch_utils.ops import epilogue_cuda
from torch_utils.ops._registry import define_op
from torch_utils.ops.bias_act import bias_act, saves_output
from torch_utils.ops.conv2d_resample import conv2d_resample, convolve_before_filter
from torch_utils.ops.epilogue import epilogue as apply_epilogue
from torch_utils.ops.epilogue import filtered_epilogue, scale_channels
from torch_utils.ops.pixel_product import is_channels_last, pixel_product

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
    x = conv2d_resample(scale_channels(x, styles.to(x.dtype)), weight.to(x.dtype), **resample)
    if d is not None and noise is not None:
        return torch.addcmul(noise.to(x.dtype), x, d.to(x.dtype)[:, :, None, None])
    if d is not None:
        return scale_channels(x, d.to(x.dtype))
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
    x, weight = scale_channels(x, styles.to(x.dtype)), weight.to(x.dtype)
    noise = None if noise is None else noise.to(x.dtype)
    clamp = -1.0 if epilogue.clamp is None else float(epilogue.clamp)
    finish = (d, noise, bias.to(x.dtype), epilogue.act, epilogue.alpha, epilogue.gain, clamp)
    f, up = resample.get('f'), resample.get('up', 1)
    if f is None or up == 1 or resample.get('down', 1) > 1 or weight.shape[2:].numel() == 1:
        return apply_epilogue(conv2d_resample(x, weight, **resample), *finish)
    x, padding = convolve_before_filter(x, weight, **resample)
    flip_filter = False
    return filtered_epilogue(x, f, padding, flip_filter, float(up ** 2), *finish)


def modulated_product(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, bias: torch.Tensor, clamp: float | None,
) -> torch.Tensor:
    """Modulated 1x1 convolution to few channels, without demodulation, then bias and clamp: one pass over x.

    x: [N, I, H, W].  weight: [O, I, 1, 1].  styles: [N, I].  bias: [O].  Returns [N, O, H, W], dtype of x.
    The weights of all samples are small, and a product reads x as it lies. Raises ValueError as
    modulated_conv2d().
    """
    _check_styles(x, weight, styles)
    weight = _modulated_weight(weight, styles, None, x.dtype).flatten(2)  # [N, O, I]
    # Filters on a CPU want NHWC; elsewhere images are NCHW, and cuBLAS wants rows that are not 3 long.
    channels_last = x.device.type == 'cpu' and is_channels_last(x)
    y = pixel_product(x, weight, bias.to(x.dtype), channels_last)
    return bias_act(y, clamp=clamp)


def demodulation(weight: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
    """[N, O]: reciprocal norm of each sample's modulated weight per output channel (StyleGAN2, Eq. 3)."""
    return _demodulation(weight, styles, DEMODULATION_EPS)[0]


def _checked(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, styles), pre-normalised where float16 would overflow."""
    _check_styles(x, weight, styles)
    if x.dtype == torch.float16 and demodulate:
        weight = weight / (weight.abs().amax([1, 2, 3], keepdim=True) * weight[0].numel() ** 0.5)
        styles = styles / styles.abs().amax(1, keepdim=True)
    return weight, styles


def _check_styles(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor) -> None:
    if styles.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f'styles must be [N, I] = {[x.shape[0], weight.shape[1]]}, not {list(styles.shape)}')


def _grouped(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, resample: dict[str, Any],
) -> torch.Tensor:
    """One convolution with N groups, each with the weight of its sample."""
    n, _, h, w = x.shape
    d = demodulation(weight, styles) if demodulate else None
    grouped = _modulated_weight(weight, styles, d, x.dtype).flatten(0, 1)
    y = conv2d_resample(x.reshape(1, -1, h, w), grouped, groups=n, **resample)
    return y.reshape(n, weight.shape[0], *y.shape[2:])


# Demodulation coefficients d [N, O], and for the backward pass the energy [O, I] of each pair of channels.

def _demodulation_reference(
    weight: torch.Tensor, styles: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    energy = weight.square().sum([2, 3]).contiguous()
    return (styles.square() @ energy.t() + eps).rsqrt(), energy


def _demodulation_fake(
    weight: torch.Tensor, styles: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return styles.new_empty([styles.shape[0], weight.shape[0]]), weight.new_empty(weight.shape[:2])


def _demodulation_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.set_materialize_grads(False)


def _demodulation_backward(
    ctx: Any, to_d: torch.Tensor | None, to_energy: torch.Tensor | None,
) -> tuple:
    weight, styles, d, energy = ctx.saved_tensors
    to_styles = None
    if to_d is not None:
        to_square = to_d * d.pow(3) * -0.5  # of the squared norm [N, O]
        to_styles = 2 * styles * (to_square @ energy) if ctx.needs_input_grad[1] else None
        through_d = to_square.t() @ styles.square()
        to_energy = through_d if to_energy is None else to_energy + through_d
    if to_energy is None or not ctx.needs_input_grad[0]:
        return None, to_styles, None
    return weight * (2 * to_energy)[:, :, None, None], to_styles, None


# weight[o, i] * styles[n, i] * d[n, o], as [N, O, I, k, k] in another element type.

def _weight_reference(
    weight: torch.Tensor, styles: torch.Tensor, d: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:
    return (weight * _weight_scale(styles, d)).to(dtype).contiguous()


def _weight_scale(styles: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
    scale = styles[:, None] if d is None else styles[:, None] * d[:, :, None]  # [N, O, I]
    return scale[..., None, None]


def _weight_fake(
    weight: torch.Tensor, styles: torch.Tensor, d: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:
    return weight.new_empty([styles.shape[0], *weight.shape], dtype=dtype)


def _weight_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _weight_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    weight, styles, d = ctx.saved_tensors
    grad = grad.to(weight.dtype)
    to_weight = (grad * _weight_scale(styles, d)).sum(0) if ctx.needs_input_grad[0] else None
    to_scale = (grad * weight).sum([3, 4])  # [N, O, I]
    to_d = None if d is None else (to_scale * styles[:, None]).sum(2)
    to_styles = (to_scale if d is None else to_scale * d[:, :, None]).sum(1)
    return to_weight, to_styles, to_d, None


_demodulation = define_op(
    'demodulation(Tensor weight, Tensor styles, float eps) -> (Tensor, Tensor)',
    reference=_demodulation_reference, fake=_demodulation_fake, setup_context=_demodulation_setup_context,
    backward=_demodulation_backward, cuda=epilogue_cuda.demodulation,
)

_modulated_weight = define_op(
    'modulated_weight(Tensor weight, Tensor styles, Tensor? d, ScalarType dtype) -> Tensor',
    reference=_weight_reference, fake=_weight_fake, setup_context=_weight_setup_context,
    backward=_weight_backward, cuda=epilogue_cuda.modulated_weight,
)
