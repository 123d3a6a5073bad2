# SPDX-License-Identifier: Apache-2.0
"""Modulated convolution (StyleGAN2, Sec. 2.2), and the layer around it: noise, bias, activation.

Each sample's styles scale the input channels of one shared weight; demodulation divides each output channel
by the norm of its scaled weights. Scaling the activations instead of the weight gives the same numbers with
one ordinary convolution, and the norms are styles^2 @ (sum of weight^2 over the taps): no per-sample weight
is needed.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.ops import epilogue_cuda
from torch_utils.ops._registry import define_op, empty_as, laid_out_as
from torch_utils.ops.bias_act import bias_act, saves_output
from torch_utils.ops.conv2d_gradfix import wants_weight_gradients
from torch_utils.ops.conv2d_resample import conv2d_resample, convolve_before_filter
from torch_utils.ops.epilogue import epilogue as apply_epilogue
from torch_utils.ops.epilogue import filtered_epilogue, plus, scale_channels, scaled_filtered_epilogue
from torch_utils.ops.pixel_product import is_channels_last, pixel_layer, pixel_product

DEMODULATION_EPS = 1e-8  # inside the square root


@dataclass(frozen=True)
class Epilogue:
    """What follows the convolution: act(x + noise + bias), gain and clamp (None: no clamp)."""

    act: str
    alpha: float
    gain: float
    clamp: float | None


@dataclass(frozen=True)
class Modulation:
    """A layer's weight after modulation: weight [O, I, k, k], styles [N, I] and demodulation coefficients
    d [N, O], all in the dtype of the activations. styles None: the activations are already scaled by them.
    """

    weight: torch.Tensor
    styles: torch.Tensor | None
    d: torch.Tensor | None

    def applied(self) -> 'Modulation':
        """The same for activations that are already multiplied by the styles."""
        return Modulation(self.weight, None, self.d)


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
    overflow. The maxima count as constants; the published gradient through them is zero except for
    DEMODULATION_EPS. Raises ValueError if styles is not [N, I].
    """
    _check_styles(x, weight, styles)
    resample = {'f': resample_filter, 'up': up, 'down': down, 'padding': padding, 'flip_weight': flip_weight}
    if fused_modconv:
        x = _grouped(x, weight, styles, demodulate, resample)
        return x if noise is None else x + noise.to(x.dtype)
    modulation = modulate(weight, styles, x.dtype, demodulate)
    x, d = conv2d_resample(scale_channels(x, modulation.styles), modulation.weight, **resample), modulation.d
    if d is not None and noise is not None:
        return torch.addcmul(noise.to(x.dtype), x, d[:, :, None, None])
    if d is not None:
        return scale_channels(x, d)
    return x if noise is None else x + noise.to(x.dtype)


def modulate(
    weight: torch.Tensor, styles: torch.Tensor, dtype: torch.dtype, demodulate: bool = True,
) -> Modulation:
    """Cast weight [O, I, k, k] and styles [N, I] to the dtype of the activations, pre-normalised in float16
    if demodulation cancels that.
    """
    if demodulate and dtype.itemsize < weight.dtype.itemsize:
        weight, styles, d, *_ = _modulation(weight, styles, DEMODULATION_EPS, dtype == torch.float16, dtype)
        return Modulation(weight, styles, d)
    if demodulate and dtype == torch.float16:
        weight, styles = _normalised(weight, styles)
    d = demodulation(weight, styles).to(dtype) if demodulate else None
    return Modulation(weight.to(dtype), styles.to(dtype), d)


def finished_convolution(
    x: torch.Tensor, modulation: Modulation, noise: torch.Tensor | None, bias: torch.Tensor,
    epilogue: Epilogue, next_scale: torch.Tensor | None = None, **resample: Any,
) -> torch.Tensor:
    """A whole synthesis layer: demodulated convolution, act((x * d + noise) + bias) * gain in one operator.

    x: [N, I, H, W].  modulation: of modulate(), with x.dtype.  noise: as modulated_conv2d().  bias: [O].
    next_scale: [N, O], by which the result is multiplied on its way to memory: the next layer's styles.
    resample: f, up, padding, flip_weight of conv2d_resample().
    """
    weight, d = modulation.weight, modulation.d
    if modulation.styles is not None:
        _check_styles(x, weight, modulation.styles)
        x = scale_channels(x, modulation.styles)
    noise, bias = None if noise is None else noise.to(x.dtype), bias.to(x.dtype)
    f, up = resample.get('f'), resample.get('up', 1)
    is_piecewise = saves_output(epilogue.act, epilogue.alpha, epilogue.gain)
    clamp = -1.0 if epilogue.clamp is None else float(epilogue.clamp)
    spec = (epilogue.act, epilogue.alpha, epilogue.gain, clamp)
    if is_piecewise and f is not None and up > 1 == resample.get('down', 1) and weight.shape[2:].numel() > 1:
        x, padding = convolve_before_filter(x, weight, **resample)
        finish = (x, f, padding, False, float(up ** 2), d, noise, bias)
        if next_scale is None:
            return filtered_epilogue(*finish, *spec)
        return scaled_filtered_epilogue(*finish, next_scale, torch.is_grad_enabled(), *spec)[0]
    x = conv2d_resample(x, weight, **resample)
    if is_piecewise:
        x = apply_epilogue(x, d, noise, bias, *spec)
    else:
        x = scale_channels(x, d) if noise is None else torch.addcmul(noise, x, d[:, :, None, None])
        act, alpha, gain, _ = spec
        x = bias_act(x, bias, act=act, alpha=alpha, gain=gain, clamp=epilogue.clamp)
    return x if next_scale is None else scale_channels(x, next_scale)


def modulated_layer(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, noise: torch.Tensor | None,
    bias: torch.Tensor, epilogue: Epilogue, **resample: Any,
) -> torch.Tensor:
    """finished_convolution() of modulate(weight, styles), for sources inside snapshots of version 0.1."""
    _check_styles(x, weight, styles)
    return finished_convolution(x, modulate(weight, styles, x.dtype), noise, bias, epilogue, **resample)


def modulated_product(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, bias: torch.Tensor, clamp: float | None,
    fused_modconv: bool = False,
) -> torch.Tensor:
    """Modulated convolution to few channels, without demodulation, then bias and clamp: one pass over x.

    x: [N, I, H, W].  weight: [O, I, 1, 1]; fused_modconv is for larger ones.  styles: [N, I].
    bias: [O].  Returns [N, O, H, W] in the dtype of x. Per-sample weights are small here, and a product
    needs no copy of x. Raises ValueError as modulated_conv2d().
    """
    if weight.shape[2:].numel() > 1:
        x = modulated_conv2d(x, weight, styles, demodulate=False, fused_modconv=fused_modconv)
        return bias_act(x, bias.to(x.dtype), clamp=clamp)
    _check_styles(x, weight, styles)
    weight = _modulated_weight(weight, styles, None, x.dtype).flatten(2)  # [N, O, I]
    # Filters are faster in NHWC on a CPU; elsewhere images are NCHW.
    channels_last, bias = x.device.type == 'cpu' and is_channels_last(x), bias.to(x.dtype)
    if clamp is None:
        return pixel_product(x, weight, bias, channels_last)
    return pixel_layer(x, weight, bias, channels_last, 'linear', 0.0, 1.0, float(clamp))


def demodulation(weight: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
    """[N, O]: reciprocal norm of each sample's modulated weight per output channel (StyleGAN2, Eq. 3)."""
    return _demodulation(weight, styles, DEMODULATION_EPS)[0]


def _check_styles(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor) -> None:
    if styles.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f'styles must be [N, I] = {[x.shape[0], weight.shape[1]]}, not {list(styles.shape)}')


def _normalised(weight: torch.Tensor, styles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _factors(weight, styles)
    return weight * a[:, None, None, None], styles * b[:, None]


@torch.no_grad()
def _factors(weight: torch.Tensor, styles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [O], b [N]): factors that bring weight and styles into the range of float16."""
    peak = torch.linalg.vector_norm(weight, math.inf, dim=[1, 2, 3])
    largest_style = torch.linalg.vector_norm(styles, math.inf, dim=1)
    return (peak * weight[0].numel() ** 0.5).reciprocal(), largest_style.reciprocal()


def _grouped(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, resample: dict[str, Any],
) -> torch.Tensor:
    """One convolution with N groups, each with the weight of its sample."""
    n, _, h, w = x.shape
    if demodulate and x.dtype == torch.float16:
        weight, styles = _normalised(weight, styles)
    d = demodulation(weight, styles) if demodulate else None
    grouped = _modulated_weight(weight, styles, d, x.dtype).flatten(0, 1)
    y = conv2d_resample(x.reshape(1, -1, h, w), grouped, groups=n, **resample)
    return y.reshape(n, weight.shape[0], *y.shape[2:])


# Demodulation coefficients d [N, O], and for the backward pass the energy [O, I]: the sum of squares of the
# weight per pair of channels.

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
    factors = weight.new_empty(0), styles.new_empty(0)
    grads = _gradients(ctx, (weight, styles, d, energy, *factors), (None, None, to_d, to_energy))
    return *grads, None


# The same for 16-bit layers: (weight * a, styles * b, d) in another dtype, where a [O] and b [N] are
# _factors() for float16 (empty: none), which count as constants. d and energy are those of the products; they
# and the factors are also returned in full precision, for the gradient.

def _modulation_reference(
    weight: torch.Tensor, styles: torch.Tensor, eps: float, normalise: bool, dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    a, b = weight.new_empty(0), styles.new_empty(0)
    scaled = laid_out_as(weight, weight)
    if normalise:
        a, b = _factors(weight, styles)
        scaled, styles = scaled * a[:, None, None, None], styles * b[:, None]
    d, energy = _demodulation_reference(scaled, styles, eps)
    narrow = [t.to(dtype, copy=True) for t in (scaled, styles.contiguous(), d)]
    return (*narrow, d, energy, a, b)


def _modulation_fake(
    weight: torch.Tensor, styles: torch.Tensor, eps: float, normalise: bool, dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    (n, i), o = styles.shape, weight.shape[0]
    d, energy = styles.new_empty([n, o]), weight.new_empty([o, i])
    narrow = [torch.empty_like(t, dtype=dtype) for t in (empty_as(weight), styles.new_empty([n, i]), d)]
    return (*narrow, d, energy, *[weight.new_empty(length if normalise else 0) for length in (o, n)])


def _modulation_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:2], *output[3:])
    ctx.mark_non_differentiable(*output[5:])
    ctx.set_materialize_grads(False)


def _modulation_backward(
    ctx: Any, to_scaled: torch.Tensor | None, to_narrow_styles: torch.Tensor | None,
    to_narrow_d: torch.Tensor | None, to_d: torch.Tensor | None, to_energy: torch.Tensor | None, *_: None,
) -> tuple:
    grads = _gradients(
        ctx, ctx.saved_tensors, (to_scaled, to_narrow_styles, plus(to_narrow_d, to_d), to_energy))
    return *grads, None, None, None


def _gradients(
    ctx: Any, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(to_weight, to_styles) of either operator; None where there is no gradient."""
    to_scaled, to_styles, to_d, to_energy = grads
    of_weight = ctx.needs_input_grad[0] and wants_weight_gradients()
    wants = [of_weight and any(g is not None for g in (to_scaled, to_d, to_energy)),
             ctx.needs_input_grad[1] and any(g is not None for g in (to_styles, to_d))]
    if not any(wants):
        return None, None
    results = _modulation_grad(*saved, *grads, wants)
    return tuple(value if wanted else None for value, wanted in zip(results, wants, strict=True))


# The gradients (to_weight, to_styles) of both, given those of the results, any of which may be None; unneeded
# ones are empty tensors. d and energy are those of the scaled weight and styles; the factors a and b are
# constants.

def _times(t: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """t with each t[i] multiplied by factor[i]; t itself if there are no factors."""
    return t * factor.to(t.dtype).reshape([-1, *[1] * (t.ndim - 1)]) if factor.numel() else t


def _to_square(to_d: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Gradient of the squared norm whose reciprocal root is d."""
    return to_d * d.pow(3) * -0.5


def _modulation_grad_reference(  # noqa: PLR0913 (the arguments of the forward pass, and gradients)
    weight: torch.Tensor, styles: torch.Tensor, d: torch.Tensor, energy: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, to_scaled: torch.Tensor | None, to_styles: torch.Tensor | None,
    to_d: torch.Tensor | None, to_energy: torch.Tensor | None, wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    to_weight, of_styles = weight.new_empty(0), styles.new_empty(0)
    scaled_styles = _times(styles, b)
    square = None if to_d is None else _to_square(to_d, d)
    if wants[1]:
        through_d = None if square is None else 2 * scaled_styles * (square @ energy)
        given = None if to_styles is None else to_styles.to(styles.dtype, copy=True)
        of_styles = _times(plus(given, through_d), b).contiguous()
    if wants[0]:
        if square is not None:
            to_energy = plus(to_energy, square.t() @ scaled_styles.square())
        to_weight = None if to_scaled is None else _times(to_scaled.to(weight.dtype, copy=True), a)
        if to_energy is not None:
            rows = _times(_times(2 * to_energy, a), a)[:, :, None, None]
            to_weight = weight * rows if to_weight is None else torch.addcmul(to_weight, weight, rows)
        to_weight = laid_out_as(to_weight, weight)
    return to_weight, of_styles


def _modulation_grad_fake(  # noqa: PLR0913 (as above)
    weight: torch.Tensor, styles: torch.Tensor, d: torch.Tensor, energy: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, to_scaled: torch.Tensor | None, to_styles: torch.Tensor | None,
    to_d: torch.Tensor | None, to_energy: torch.Tensor | None, wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return (empty_as(weight) if wants[0] else weight.new_empty(0),
            styles.new_empty(styles.shape if wants[1] else 0))


def _modulation_grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.wants = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _modulation_grad_backward(
    ctx: Any, dweight: torch.Tensor | None, dstyles: torch.Tensor | None,
) -> tuple:
    weight, styles, d, energy, a, b, to_scaled, to_styles, to_d, to_energy = ctx.saved_tensors
    dweight, dstyles = dweight if ctx.wants[0] else None, dstyles if ctx.wants[1] else None
    own = _times(styles, b)
    to_own = of_square = of_energy = of_d = of_to_d = of_to_energy = rows = None
    square = None if to_d is None else _to_square(to_d, d)
    narrow = None if dstyles is None else _times(dstyles, b)
    if narrow is not None and square is not None:
        of_norms = 2 * own * narrow
        to_own, of_square = 2 * (square @ energy) * narrow, of_norms @ energy.t()
        of_energy = square.t() @ of_norms
    if dweight is not None:
        of_to_energy = _times(_times(2 * (dweight * weight).sum([2, 3]), a), a)
        if square is not None:
            to_own = plus(to_own, 2 * own * (square @ of_to_energy))
            of_square = plus(of_square, own.square() @ of_to_energy.t())
    if of_square is not None:
        of_d, of_to_d = of_square * to_d * d.square() * -1.5, of_square * d.pow(3) * -0.5
    if dweight is not None:
        rows = plus(to_energy, None if square is None else square.t() @ own.square())
    of_weight = None if rows is None else _times(_times(dweight * (2 * rows)[:, :, None, None], a), a)
    of_styles = None if to_own is None else _times(to_own, b)
    of_scaled = None if dweight is None or to_scaled is None else _times(dweight, a).to(to_scaled.dtype)
    of_narrow = None if narrow is None or to_styles is None else narrow.to(to_styles.dtype)
    of_to_d = None if of_to_d is None else of_to_d.to(to_d.dtype)
    of_to_energy = None if to_energy is None else of_to_energy
    factors = None, None
    return of_weight, of_styles, of_d, of_energy, *factors, of_scaled, of_narrow, of_to_d, of_to_energy, None


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
    if d is None:
        return to_weight, (grad * weight).sum([1, 3, 4]), None, None
    to_scale = (grad * weight).sum([3, 4])  # [N, O, I]
    to_d, to_styles = (to_scale * styles[:, None]).sum(2), (to_scale * d[:, :, None]).sum(1)
    return to_weight, to_styles, to_d, None


_demodulation = define_op(
    'demodulation(Tensor weight, Tensor styles, float eps) -> (Tensor, Tensor)',
    reference=_demodulation_reference, fake=_demodulation_fake, setup_context=_demodulation_setup_context,
    backward=_demodulation_backward, cuda=epilogue_cuda.demodulation,
)

_modulation = define_op(
    'modulation(Tensor weight, Tensor styles, float eps, bool normalise, ScalarType dtype) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    reference=_modulation_reference, fake=_modulation_fake, setup_context=_modulation_setup_context,
    backward=_modulation_backward, cuda=epilogue_cuda.modulation,
)

_modulation_grad = define_op(
    'modulation_grad(Tensor weight, Tensor styles, Tensor d, Tensor energy, Tensor a, Tensor b, '
    'Tensor? to_scaled, Tensor? to_styles, Tensor? to_d, Tensor? to_energy, bool[] wants) '
    '-> (Tensor, Tensor)',
    reference=_modulation_grad_reference, fake=_modulation_grad_fake,
    setup_context=_modulation_grad_setup_context, backward=_modulation_grad_backward,
    cuda=epilogue_cuda.modulation_grad,
)

_modulated_weight = define_op(
    'modulated_weight(Tensor weight, Tensor styles, Tensor? d, ScalarType dtype) -> Tensor',
    reference=_weight_reference, fake=_weight_fake, setup_context=_weight_setup_context,
    backward=_weight_backward, cuda=epilogue_cuda.modulated_weight,
)
