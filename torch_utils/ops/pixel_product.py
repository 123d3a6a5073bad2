# SPDX-License-Identifier: Apache-2.0
"""One matrix per sample, applied to all pixels: y[n, o, p] = sum_i w[n, o, i] x[n, i, p] + b[o].

These are the 1x1 convolutions to and from images: one pass over x, in either memory format. A weight shared
by all samples is passed as an expanded tensor. pixel_product and pixel_outer are bilinear and each other's
gradient, so gradients of any order work; pixel_layer fuses bias_act.
"""
from typing import Any

import torch

from torch_utils import custom_ops
from torch_utils.ops import pixel_product_cuda
from torch_utils.ops._registry import define_op, empty_as, memory_format_of
from torch_utils.ops.activations import activation_funcs, saves_output
from torch_utils.ops.bias_act import act_grad, act_grad_both, bias_shaped, finish_
from torch_utils.ops.epilogue import plus

ENOUGH_PRODUCTS = 512  # that keep a large GPU busy
PIXELS_EACH = 1024  # at least, per product: with fewer, adding up the parts costs more than it saves


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] in either memory format, viewed as [N, H * W, C]."""
    if memory_format_of(x) is torch.channels_last:
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.flatten(2).transpose(1, 2)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the gradient of x must be in NHWC."""
    return memory_format_of(x) is torch.channels_last


def is_image_layer(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether convolving x [N, I, H, W] with weight [O, I, kh, kw] uses our kernel.

    Otherwise, and in compiled code, it is an ordinary convolution.
    """
    is_small = weight.shape[2:].numel() == 1 and x.shape[1] <= pixel_product_cuda.MAX_FEW
    return (is_small and not torch.compiler.is_compiling() and _wants_channels_last(x)
            and custom_ops.is_available(x.device))


def image_layer(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, act: str, gain: float, clamp: float | None,
) -> torch.Tensor:
    """1x1 convolution of an image, bias, activation, gain and clamp: x [N, I, H, W] -> [N, O, H, W].

    weight: [O, I, 1, 1].  bias: [O].  act: 'linear', 'relu' or 'lrelu'.  All of one dtype.
    """
    alpha = float(activation_funcs[act].def_alpha)
    assert saves_output(act, alpha, gain), f'{act} with gain {gain} is curved or turns signs'
    w = weight.flatten(1).expand(x.shape[0], -1, -1)
    return pixel_layer(
        x, w, bias, _wants_channels_last(x), act, alpha, gain, -1.0 if clamp is None else float(clamp))


def _wants_channels_last(x: torch.Tensor) -> bool:
    # The strides of a single channel show the requested layout.
    return is_channels_last(x) or (x.shape[1] == 1 == x.stride(1))


def _reference(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool,
) -> torch.Tensor:
    n, _, height, width = x.shape
    pixels = _pixels(x)
    if channels_last:
        turned = w.transpose(1, 2)
        y = pixels.bmm(turned) if b is None else torch.baddbmm(b, pixels, turned)  # [N, H * W, O]
        return y.view(n, height, width, w.shape[1]).permute(0, 3, 1, 2)
    turned = pixels.transpose(1, 2)
    y = w.bmm(turned) if b is None else torch.baddbmm(b[:, None], w, turned)  # [N, O, H * W]
    return y.view(n, w.shape[1], height, width)


def _fake(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool,
) -> torch.Tensor:
    shape = [x.shape[0], w.shape[1], *x.shape[2:]]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(channels_last))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, w = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx = pixel_product(dy, w.transpose(1, 2), None, is_channels_last(x)) if wants[0] else None
    dw = pixel_outer(dy, x) if wants[1] else None
    return dx, dw, dy.sum([0, 2, 3]) if wants[2] else None, None


# act(product) * gain within +-clamp, for activations with saves_output().

def _layer_reference(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, channels_last: bool, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    return finish_(_reference(x, w, b, channels_last), act, alpha, gain, clamp)


def _layer_fake(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, channels_last: bool, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    return _fake(x, w, b, channels_last)


def _layer_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, w, _, _, *ctx.spec = inputs
    ctx.save_for_backward(x, w, output)


def _layer_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, w, y = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    if x.shape[1] < y.shape[1]:
        grads = pixel_layer_grad(dy, y, x, w, wants, *ctx.spec)
        grads = [grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)]
        return *grads, None, None, None, None, None
    # An intermediate result as large as an image is cheap.
    g, db = act_grad_both(dy, y, *ctx.spec) if wants[2] else (act_grad(dy, y, *ctx.spec), None)
    dx = pixel_product(g, w.transpose(1, 2), None, is_channels_last(x)) if wants[0] else None
    return dx, pixel_outer(g, x) if wants[1] else None, db, None, None, None, None, None


# Its gradient (dx, dw, db), for few channels of x, without storing that of the product; unneeded ones are
# empty tensors.

def _layer_grad_reference(  # noqa: PLR0913 (the arguments of the forward pass, and dy)
    dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, wants: list[bool], act: str,
    alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...]:
    if wants[2]:
        g, db = act_grad_both.run(dy, y, act, alpha, gain, clamp)
    else:
        g, db = act_grad.run(dy, y, act, alpha, gain, clamp), y.new_empty(0)
    dw = pixel_outer.run(g, x) if wants[1] else y.new_empty(0)
    if not wants[0]:
        return y.new_empty(0), dw, db
    return pixel_product.run(g, w.transpose(1, 2), None, is_channels_last(x)), dw, db


def _layer_grad_fake(  # noqa: PLR0913 (as above)
    dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, wants: list[bool], act: str,
    alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...]:
    dx = empty_as(x) if wants[0] else x.new_empty(0)
    return dx, w.new_empty(w.shape if wants[1] else [0]), w.new_empty(w.shape[1] if wants[2] else 0)


def _layer_grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, y, x, w, ctx.wants, *ctx.spec = inputs
    ctx.save_for_backward(dy, y, x, w)
    ctx.set_materialize_grads(False)


def _layer_grad_backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
    dy, y, x, w = ctx.saved_tensors
    to_dx, to_dw, to_db = [
        c if wanted else None for c, wanted in zip(cotangents, ctx.wants, strict=True)]
    wants, last = ctx.needs_input_grad, is_channels_last(y)
    g = act_grad(dy, y, *ctx.spec)
    # The gradient of g, in which dx, dw and db are linear; then that of dy.
    total = None if to_dx is None else pixel_product(to_dx, w, to_db, last)
    if to_dw is not None:
        total = plus(total, pixel_product(x, to_dw, None if total is not None else to_db, last))
    if total is None and to_db is not None:
        total = bias_shaped(to_db, 4, 1).expand_as(y)
    to_dy = None if total is None else act_grad(total, y, *ctx.spec)
    to_x = to_w = None
    if to_dw is not None and wants[2]:
        to_x = pixel_product(g, to_dw.transpose(1, 2), None, is_channels_last(x))
    if to_dx is not None and wants[3]:
        to_w = pixel_outer(g, to_dx)
    return to_dy, None, to_x, to_w, None, None, None, None, None


# sum_p dy[n, o, p] x[n, i, p]: [N, O, I].

def _outer_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    left, right = _pixels(dy).transpose(1, 2), _pixels(x)
    parts = parts_of(x)
    if parts == 1:
        return left.bmm(right)
    # With few results and many pixels, a GPU is idle unless the pixels are divided.
    left = left.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
    return left.bmm(right.unflatten(1, (parts, -1)).flatten(0, 1)).unflatten(0, (-1, parts)).sum(1)


def parts_of(x: torch.Tensor) -> int:
    """Number of parts of the pixels of each sample: a power of two; 1 if dividing them needs a copy."""
    n, pixels = x.shape[0], x.shape[2] * x.shape[3]
    if x.device.type == 'cpu' or not is_channels_last(x):
        return 1
    parts = 1
    while n * parts < ENOUGH_PRODUCTS and pixels % (2 * parts) == 0 and pixels >= 2 * parts * PIXELS_EACH:
        parts *= 2
    return parts


def _outer_fake(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([x.shape[0], dy.shape[1], x.shape[1]])


def _outer_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    dy, x = ctx.saved_tensors
    wants = ctx.needs_input_grad
    to_dy = pixel_product(x, grad, None, is_channels_last(dy)) if wants[0] else None
    return to_dy, pixel_product(dy, grad.transpose(1, 2), None, is_channels_last(x)) if wants[1] else None


pixel_product = define_op(
    'pixel_product(Tensor x, Tensor w, Tensor? b, bool channels_last) -> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
    cuda=pixel_product_cuda.product,
)

pixel_layer = define_op(
    'pixel_layer(Tensor x, Tensor w, Tensor b, bool channels_last, str act, float alpha, float gain, '
    'float clamp) -> Tensor',
    reference=_layer_reference, fake=_layer_fake, setup_context=_layer_setup_context,
    backward=_layer_backward, cuda=pixel_product_cuda.layer,
)

pixel_layer_grad = define_op(
    'pixel_layer_grad(Tensor dy, Tensor y, Tensor x, Tensor w, bool[] wants, str act, float alpha, '
    'float gain, float clamp) -> (Tensor, Tensor, Tensor)',
    reference=_layer_grad_reference, fake=_layer_grad_fake, setup_context=_layer_grad_setup_context,
    backward=_layer_grad_backward, cuda=pixel_product_cuda.layer_grad,
)

pixel_outer = define_op(
    'pixel_outer(Tensor dy, Tensor x) -> Tensor',
    reference=_outer_reference, fake=_outer_fake, setup_context=_outer_setup_context,
    backward=_outer_backward, cuda=pixel_product_cuda.outer,
)
