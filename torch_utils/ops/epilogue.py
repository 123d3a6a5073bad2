# SPDX-License-Identifier: Apache-2.0
"""Operations around the convolution of a synthesis layer: scaling of channels before it, and after it
y = act((x * d + noise) + b) * gain within +-clamp, alone or behind a filter. Gradients of any order.
"""
from collections.abc import Sequence
from typing import Any

import torch

from torch_utils.ops import epilogue_cuda
from torch_utils.ops._registry import define_op, empty_as, laid_out_as
from torch_utils.ops.bias_act import act_grad, bias_shaped, finish_
from torch_utils.ops.upfirdn2d import _upfirdn2d, adjoint_padding, filter_size


def _columns(s: torch.Tensor) -> torch.Tensor:
    """[N, C] as [N, C, 1, 1]."""
    return s[:, :, None, None]


def plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """a + b, with None as zero."""
    return a if b is None else b if a is None else a + b


# Channels scaled one by one.

def _scale_reference(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return laid_out_as(x * _columns(s), x)


def _scale_fake(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return empty_as(x)


def _scale_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scale_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, s = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        return scale_channels_grad(dy, x, s)
    return scale_channels(dy, s), None


def _scale_grad_reference(
    dy: torch.Tensor, x: torch.Tensor, s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return laid_out_as(dy * _columns(s), x, dy), (dy * x).sum([2, 3]).contiguous()


def _scale_grad_fake(
    dy: torch.Tensor, x: torch.Tensor, s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_as(x, dy), s.new_empty(s.shape)


def _scale_grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _scale_grad_backward(ctx: Any, ddx: torch.Tensor | None, dds: torch.Tensor | None) -> tuple:
    dy, x, s = ctx.saved_tensors
    wants = ctx.needs_input_grad
    to_dy = to_x = to_s = None
    if wants[0]:
        to_dy = plus(None if ddx is None else scale_channels(ddx, s),
                      None if dds is None else scale_channels(x, dds))
    if wants[1] and dds is not None:
        to_x = scale_channels(dy, dds)
    if wants[2] and ddx is not None:
        to_s = (ddx * dy).sum([2, 3])
    return to_dy, to_x, to_s


# act((x * d + noise) + b) * gain, clamped; only for activations with saves_output().

def _reference(
    x: torch.Tensor, d: torch.Tensor, noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    y = torch.addcmul(bias_shaped(b, 4, 1), x, _columns(d))
    if noise is not None:
        y.add_(noise)
    return laid_out_as(finish_(y, act, alpha, gain, clamp), x)


def _fake(
    x: torch.Tensor, d: torch.Tensor, noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    return empty_as(x)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, d, noise, _, *ctx.spec = inputs
    ctx.noise_shape = [] if noise is None else list(noise.shape)
    ctx.save_for_backward(x, d, output)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, d, y = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:4])
    grads = epilogue_grad(dy, x, y, d, ctx.noise_shape, wants, *ctx.spec)
    return (*[g if wanted else None for g, wanted in zip(grads, wants, strict=True)], None, None, None, None)


# Its gradient (dx, dd, dnoise, db); unneeded ones are empty tensors. Without d, dx is that of x * d.

def _grad_reference(  # noqa: PLR0913 (the arguments of the forward pass, and dy)
    dy: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor, d: torch.Tensor | None,
    noise_shape: Sequence[int], wants: Sequence[bool], act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...]:
    g = act_grad.run(dy, y, act, alpha, gain, clamp)
    dd = (g * x).sum([2, 3]).contiguous() if wants[1] else y.new_empty(0)
    dnoise = _sum_to(g, noise_shape) if wants[2] else y.new_empty(0)
    db = g.sum([0, 2, 3]) if wants[3] else y.new_empty(0)
    if not wants[0]:
        return y.new_empty(0), dd, dnoise, db
    return g if d is None else g.mul_(_columns(d)), dd, dnoise, db


def _sum_to(g: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    summed = g.sum_to_size(list(shape)).contiguous()
    return summed.clone() if summed.data_ptr() == g.data_ptr() else summed


def _grad_fake(  # noqa: PLR0913 (as above)
    dy: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor, d: torch.Tensor | None,
    noise_shape: Sequence[int], wants: Sequence[bool], act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...]:
    shapes = [dy.shape, dy.shape[:2], noise_shape, dy.shape[1:2]]
    dx, *sums = [
        dy.new_empty(shape if wanted else [0]) for shape, wanted in zip(shapes, wants, strict=True)]
    return (empty_as(y, dy) if wants[0] else dx, *sums)


def _grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, x, y, d, ctx.noise_shape, ctx.wants, *ctx.spec = inputs
    ctx.save_for_backward(dy, x, y, d)
    ctx.set_materialize_grads(False)


def _grad_backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
    dy, x, y, d = ctx.saved_tensors
    to_dx, to_dd, to_dnoise, to_db = [
        c if wanted else None for c, wanted in zip(cotangents, ctx.wants, strict=True)]
    g = act_grad(dy, y, *ctx.spec)
    total = to_dx if to_dx is None or d is None else scale_channels(to_dx, d)
    if to_dd is not None:
        total = plus(total, scale_channels(x, to_dd))
    if to_dnoise is not None:
        total = plus(total, to_dnoise.expand_as(dy))
    if to_db is not None:
        total = plus(total, bias_shaped(to_db, 4, 1).expand_as(dy))
    grads = [None] * 10
    grads[0] = None if total is None else act_grad(total, y, *ctx.spec)
    grads[1] = None if to_dd is None else scale_channels(g, to_dd)
    grads[3] = None if to_dx is None or d is None else (to_dx * g).sum([2, 3])
    return tuple(grads)


# The same after a filter (upfirdn2d at up = down = 1), which follows a transposed convolution.

def _filtered_reference(  # noqa: PLR0913 (two operators in one)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, d: torch.Tensor,
    noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    filtered = _upfirdn2d.run(x, f, [1, 1], [1, 1], padding, flip, filter_gain)
    return epilogue.run(filtered, d, noise, b, act, alpha, gain, clamp)


def _filtered_fake(  # noqa: PLR0913 (as above)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, d: torch.Tensor,
    noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return _upfirdn2d.fake(x, f, [1, 1], [1, 1], padding, flip, filter_gain)


def _filtered_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, f, ctx.padding, ctx.flip, ctx.filter_gain, d, noise, _, *ctx.spec = inputs
    ctx.noise_shape = [] if noise is None else list(noise.shape)
    ctx.save_for_backward(x, f, d, output)


def _filtered_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    # sum(g * filter(x)) = sum(adjoint(g) * x): the filtered image is not needed, and one pass over
    # adjoint(g) gives both gradients.
    x, f, d, y = ctx.saved_tensors
    wants = ctx.needs_input_grad
    of_input = wants[0] or wants[5]
    g, _, dnoise, db = epilogue_grad(
        dy, None, y, None, ctx.noise_shape, [of_input, False, wants[6], wants[7]], *ctx.spec)
    dx, dd = _through_filter(ctx, g, x, f, d) if of_input else (None, None)
    return (dx, None, None, None, None, dd, dnoise if wants[6] else None, db if wants[7] else None,
            None, None, None, None)


def _through_filter(
    ctx: Any, g: torch.Tensor, x: torch.Tensor, f: torch.Tensor, d: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dd) of filter(x) * d, given its gradient g."""
    padding = adjoint_padding(filter_size(f), [1, 1], [1, 1], ctx.padding, x.shape[2:], g.shape[2:])
    return filtered_scale_grad(g, f, padding, not ctx.flip, ctx.filter_gain, x, d)


# scale_channels_grad() of the filtered dy.

def _filtered_scale_reference(
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, x: torch.Tensor,
    s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    filtered = _upfirdn2d.run(dy, f, [1, 1], [1, 1], padding, flip, filter_gain)
    return scale_channels_grad.run(filtered, x, s)


def _filtered_scale_fake(
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, x: torch.Tensor,
    s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    filtered = _upfirdn2d.fake(dy, f, [1, 1], [1, 1], padding, flip, filter_gain)
    return _scale_grad_fake(filtered, x, s)


def _filtered_scale_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, f, ctx.padding, ctx.flip, ctx.filter_gain, x, s = inputs
    ctx.save_for_backward(dy, f, x, s)
    ctx.set_materialize_grads(False)


def _filtered_scale_backward(ctx: Any, ddx: torch.Tensor | None, dds: torch.Tensor | None) -> tuple:
    dy, f, x, s = ctx.saved_tensors
    wants = ctx.needs_input_grad
    to_dy = to_x = to_s = None
    if wants[0]:
        total = plus(None if ddx is None else scale_channels(ddx, s),
                     None if dds is None else scale_channels(x, dds))
        padding = adjoint_padding(filter_size(f), [1, 1], [1, 1], ctx.padding, dy.shape[2:], x.shape[2:])
        to_dy = None if total is None else _upfirdn2d(
            total, f, [1, 1], [1, 1], padding, not ctx.flip, ctx.filter_gain)
    of_x, of_s = wants[5] and dds is not None, wants[6] and ddx is not None
    filtered = None
    if of_x or of_s:  # second derivatives are rare: computed again rather than stored
        filtered = _upfirdn2d(dy, f, [1, 1], [1, 1], ctx.padding, ctx.flip, ctx.filter_gain)
    if of_x:
        to_x = scale_channels(filtered, dds)
    if of_s:
        to_s = (ddx * filtered).sum([2, 3])
    return to_dy, None, None, None, None, to_x, to_s


# filtered_epilogue() fused with the channel scaling of the next layer: (y * s, y). Without keeps_y, y is
# empty and there is no gradient.

def _scaled_filtered_reference(  # noqa: PLR0913 (three operators in one)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, d: torch.Tensor,
    noise: torch.Tensor | None, b: torch.Tensor, s: torch.Tensor, keeps_y: bool, act: str, alpha: float,
    gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = filtered_epilogue.run(x, f, padding, flip, filter_gain, d, noise, b, act, alpha, gain, clamp)
    return (scale_channels.run(y, s), y) if keeps_y else (y.mul_(_columns(s)), y.new_empty(0))


def _scaled_filtered_fake(  # noqa: PLR0913 (as above)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, d: torch.Tensor,
    noise: torch.Tensor | None, b: torch.Tensor, s: torch.Tensor, keeps_y: bool, act: str, alpha: float,
    gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = _upfirdn2d.fake(x, f, [1, 1], [1, 1], padding, flip, filter_gain)
    return y, torch.empty_like(y) if keeps_y else y.new_empty(0)


def _scaled_filtered_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, f, ctx.padding, ctx.flip, ctx.filter_gain, d, noise, _, s, keeps_y, *ctx.spec = inputs
    assert keeps_y, 'the gradient needs y'
    ctx.noise_shape = [] if noise is None else list(noise.shape)
    ctx.save_for_backward(x, f, d, s, output[1])
    ctx.set_materialize_grads(False)


def _scaled_filtered_backward(ctx: Any, dscaled: torch.Tensor | None, dy: torch.Tensor | None) -> tuple:
    x, f, d, s, y = ctx.saved_tensors
    wants = ctx.needs_input_grad
    of_input = wants[0] or wants[5]
    dscaled = torch.zeros_like(y) if dscaled is None else dscaled
    g, dnoise, db, ds = scaled_epilogue_grad(
        dscaled, dy, y, s, ctx.noise_shape, [of_input, wants[6], wants[7], wants[8]], *ctx.spec)
    dx, dd = _through_filter(ctx, g, x, f, d) if of_input else (None, None)
    sums = [value if wanted else None for value, wanted in zip((dnoise, db, ds), wants[6:9], strict=True)]
    return (dx, None, None, None, None, dd, *sums, *[None] * 5)


# Its gradient up to the filter: g = (dscaled * s + dy) * slope, and (dnoise, db, ds); unneeded ones are
# empty tensors.

def _scaled_grad_reference(  # noqa: PLR0913 (as above)
    dscaled: torch.Tensor, dy: torch.Tensor | None, y: torch.Tensor, s: torch.Tensor,
    noise_shape: Sequence[int], wants: Sequence[bool], act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...]:
    of_y = dscaled * _columns(s)
    g = act_grad.run(of_y if dy is None else of_y.add_(dy), y, act, alpha, gain, clamp)
    empty = y.new_empty
    dnoise = _sum_to(g, noise_shape) if wants[1] else empty(0)
    db = g.sum([0, 2, 3]) if wants[2] else empty(0)
    ds = (dscaled * y).sum([2, 3]).contiguous() if wants[3] else empty(0)
    return laid_out_as(g, y, dscaled) if wants[0] else empty(0), dnoise, db, ds


def _scaled_grad_fake(  # noqa: PLR0913 (as above)
    dscaled: torch.Tensor, dy: torch.Tensor | None, y: torch.Tensor, s: torch.Tensor,
    noise_shape: Sequence[int], wants: Sequence[bool], act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...]:
    shapes = [y.shape, noise_shape, y.shape[1:2], y.shape[:2]]
    g, *sums = [y.new_empty(shape if wanted else [0]) for shape, wanted in zip(shapes, wants, strict=True)]
    return (empty_as(y, dscaled) if wants[0] else g, *sums)


def _scaled_grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    dscaled, dy, y, s, _, ctx.wants, *ctx.spec = inputs
    ctx.has_dy = dy is not None
    ctx.save_for_backward(dscaled, y, s)
    ctx.set_materialize_grads(False)


def _scaled_grad_backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
    dscaled, y, s = ctx.saved_tensors
    to_g, to_dnoise, to_db, to_ds = [
        c if wanted else None for c, wanted in zip(cotangents, ctx.wants, strict=True)]
    total = to_g
    if to_dnoise is not None:
        total = plus(total, to_dnoise.expand_as(y))
    if to_db is not None:
        total = plus(total, bias_shaped(to_db, 4, 1).expand_as(y))
    to_dscaled = to_dy = to_y = to_s = None
    if total is not None:
        to_dy = act_grad(total, y, *ctx.spec)
        if ctx.needs_input_grad[3]:
            to_dscaled, to_s = scale_channels_grad(to_dy, dscaled, s)
        else:
            to_dscaled = scale_channels(to_dy, s)
    if to_ds is not None:
        to_dscaled = plus(to_dscaled, scale_channels(y, to_ds))
        to_y = scale_channels(dscaled, to_ds)
    return (to_dscaled, to_dy if ctx.has_dy else None, to_y, to_s, *[None] * 6)


scale_channels = define_op(
    'scale_channels(Tensor x, Tensor s) -> Tensor',
    reference=_scale_reference, fake=_scale_fake, setup_context=_scale_setup_context,
    backward=_scale_backward, cuda=epilogue_cuda.scale,
)

scale_channels_grad = define_op(
    'scale_channels_grad(Tensor dy, Tensor x, Tensor s) -> (Tensor, Tensor)',
    reference=_scale_grad_reference, fake=_scale_grad_fake, setup_context=_scale_grad_setup_context,
    backward=_scale_grad_backward, cuda=epilogue_cuda.scale_grad,
)

filtered_scale_grad = define_op(
    'filtered_scale_grad(Tensor dy, Tensor f, int[] padding, bool flip_filter, float filter_gain, Tensor x, '
    'Tensor s) -> (Tensor, Tensor)',
    reference=_filtered_scale_reference, fake=_filtered_scale_fake,
    setup_context=_filtered_scale_setup_context, backward=_filtered_scale_backward,
    cuda=epilogue_cuda.filtered_scale_grad,
)

epilogue = define_op(
    'modulated_epilogue(Tensor x, Tensor d, Tensor? noise, Tensor b, str act, float alpha, float gain, '
    'float clamp) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
    cuda=epilogue_cuda.epilogue,
)

epilogue_grad = define_op(
    'modulated_epilogue_grad(Tensor dy, Tensor? x, Tensor y, Tensor? d, int[] noise_shape, bool[] wants, '
    'str act, float alpha, float gain, float clamp) -> (Tensor, Tensor, Tensor, Tensor)',
    reference=_grad_reference, fake=_grad_fake, setup_context=_grad_setup_context, backward=_grad_backward,
    cuda=epilogue_cuda.epilogue_grad,
)

filtered_epilogue = define_op(
    'filtered_epilogue(Tensor x, Tensor f, int[] padding, bool flip_filter, float filter_gain, Tensor d, '
    'Tensor? noise, Tensor b, str act, float alpha, float gain, float clamp) -> Tensor',
    reference=_filtered_reference, fake=_filtered_fake, setup_context=_filtered_setup_context,
    backward=_filtered_backward, cuda=epilogue_cuda.filtered_epilogue,
)

scaled_filtered_epilogue = define_op(
    'scaled_filtered_epilogue(Tensor x, Tensor f, int[] padding, bool flip_filter, float filter_gain, '
    'Tensor d, Tensor? noise, Tensor b, Tensor s, bool keeps_y, str act, float alpha, float gain, '
    'float clamp) -> (Tensor, Tensor)',
    reference=_scaled_filtered_reference, fake=_scaled_filtered_fake,
    setup_context=_scaled_filtered_setup_context, backward=_scaled_filtered_backward,
    cuda=epilogue_cuda.scaled_filtered_epilogue,
)

scaled_epilogue_grad = define_op(
    'scaled_epilogue_grad(Tensor dscaled, Tensor? dy, Tensor y, Tensor s, int[] noise_shape, bool[] wants, '
    'str act, float alpha, float gain, float clamp) -> (Tensor, Tensor, Tensor, Tensor)',
    reference=_scaled_grad_reference, fake=_scaled_grad_fake, setup_context=_scaled_grad_setup_context,
    backward=_scaled_grad_backward, cuda=epilogue_cuda.scaled_epilogue_grad,
)
