# SPDX-License-Identifier: Apache-2.0
"""A matrix for each sample, applied to all pixels: y[n, o, p] = sum_i w[n, o, i] x[n, i, p] + b[o].

This is the modulated 1x1 convolution to a few channels: one pass over x, whose memory is read as it lies.
Both operators are bilinear and each is the gradient of the other, so that gradients have every order.
"""
from typing import Any

import torch

from torch_utils.ops._registry import define_op, memory_format_of

ENOUGH_PRODUCTS = 512  # that a large device works on at the same time
PIXELS_EACH = 1024  # of a product at least; fewer do not pay for adding up the parts


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] in either memory format, viewed as [N, H * W, C]."""
    if memory_format_of(x) is torch.channels_last:
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.flatten(2).transpose(1, 2)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a gradient for x is to be laid out in NHWC."""
    return memory_format_of(x) is torch.channels_last


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


# sum_p dy[n, o, p] x[n, i, p]: [N, O, I].

def _outer_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    left, right = _pixels(dy).transpose(1, 2), _pixels(x)
    parts = parts_of(x)
    if parts == 1:
        return left.bmm(right)
    # Nothing else shares the work on a GPU where the results are few and the pixels many.
    left = left.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
    return left.bmm(right.unflatten(1, (parts, -1)).flatten(0, 1)).unflatten(0, (-1, parts)).sum(1)


def parts_of(x: torch.Tensor) -> int:
    """Into how many parts the pixels of each sample are divided: a power of two, 1 where it needs a copy."""
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
)

pixel_outer = define_op(
    'pixel_outer(Tensor dy, Tensor x) -> Tensor',
    reference=_outer_reference, fake=_outer_fake, setup_context=_outer_setup_context,
    backward=_outer_backward,
)
