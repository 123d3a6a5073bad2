# SPDX-License-Identifier: Apache-2.0
"""Convolutions with gradients of any order that are ordinary convolutions, which are fast on a GPU.

torch's second derivatives are slow there: it differentiates the weight gradient by a convolution of the
transposed input with a kernel as large as the image, which took a fifth of a training iteration on an H200.
But y = x * w is bilinear: the gradient with respect to x is the transposed convolution of dy with w, the
gradient with respect to w is the weight gradient of the first backward pass, and so on for higher orders. On
a CPU and in compiled code torch's own convolutions are used.

`enabled` is kept for code embedded in official pickles. Unneeded weight gradients are not computed;
no_weight_gradients() marks those that autograd cannot recognise as unneeded.
"""
import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ['conv2d', 'conv_transpose2d', 'enabled', 'no_weight_gradients', 'wants_weight_gradients']

enabled = False
Pair = tuple[int, int]
_SWITCH = types.SimpleNamespace(is_on=True)


@contextlib.contextmanager
def no_weight_gradients() -> Iterator[None]:
    """Within this context weights get no gradients: for gradients with respect to other tensors, which may be
    differentiated again. Applies to all threads, since autograd uses its own.
    """
    before = _SWITCH.is_on
    _SWITCH.is_on = False
    try:
        yield
    finally:
        _SWITCH.is_on = before


def wants_weight_gradients() -> bool:
    """Whether weights get gradients: everywhere except within no_weight_gradients()."""
    return _SWITCH.is_on


def conv2d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int | Pair = 1,
    padding: int | Pair = 0, dilation: int | Pair = 1, groups: int = 1,
) -> torch.Tensor:
    """As torch.nn.functional.conv2d: [N, I, H, W] with weight [O, I // groups, kh, kw] -> [N, O, H', W']."""
    if not _is_ours(input, weight):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    form = _Form(_pair(stride), _pair(padding), _pair(dilation), (0, 0), groups, transposed=False)
    return _plus_bias(_convolve(input, weight, form), bias)


def conv_transpose2d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int | Pair = 1,
    padding: int | Pair = 0, output_padding: int | Pair = 0, groups: int = 1, dilation: int | Pair = 1,
) -> torch.Tensor:
    """As torch.nn.functional.conv_transpose2d: weight [I, O // groups, kh, kw]."""
    if not _is_ours(input, weight):
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    form = _Form(
        _pair(stride), _pair(padding), _pair(dilation), _pair(output_padding), groups, transposed=True)
    return _plus_bias(_convolve(input, weight, form), bias)


@dataclass(frozen=True)
class _Form:
    """Settings of a convolution; pairs are (rows, columns)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair
    groups: int
    transposed: bool

    def run(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The convolution. Not differentiable."""
        return torch.ops.aten.convolution(
            x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups)

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to w, of which only shape and strides are used. Not differentiable."""
        wanted = [False, True, False]
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, wanted)[1]

    def adjoint(self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> '_Form':
        """Settings of the adjoint convolution, from the gradient of y to that of x."""
        rest = (0, 0)
        if not self.transposed:
            # Several sizes of x give the same size of y.
            rest = tuple(
                size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in zip(
                    x.shape[2:], y.shape[2:], self.stride, self.padding, self.dilation, w.shape[2:],
                    strict=True))
        return _Form(
            self.stride, self.padding, self.dilation, rest, self.groups, transposed=not self.transposed)


def _is_ours(x: torch.Tensor, w: torch.Tensor) -> bool:
    return x.device.type != 'cpu' and x.ndim == 4 and x.dtype == w.dtype and not torch.compiler.is_compiling()


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


def _plus_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias[:, None, None]


def _convolve(x: torch.Tensor, w: torch.Tensor, form: _Form) -> torch.Tensor:
    """The convolution as two autograd nodes, of which a backward pass runs only those it needs.

    needs_input_grad tells which inputs required gradients in the forward pass, not what the current backward
    pass needs. So the weight gradient is a separate node, connected by a token: a tensor with the shape of y
    and no content.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or w.requires_grad):
        return form.run(x, w)
    with torch.no_grad():
        y = form.run(x, w)
    token = _ToWeight.apply(w, (x,), y.shape, form) if w.requires_grad else None
    return _Convolution.apply(x, w, token, (y,), form)


class _Convolution(torch.autograd.Function):
    """x * w with the gradient of x. The gradient of the token is dy. Tensors in a tuple get no edge."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, token: torch.Tensor | None, result: tuple, form: _Form,
    ) -> torch.Tensor:
        (y,) = result
        ctx.save_for_backward(w)
        ctx.form = form.adjoint(x, y, w)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        (w,) = ctx.saved_tensors
        wants_x, _, wants_token, *_ = ctx.needs_input_grad
        return _convolve(dy, w, ctx.form) if wants_x else None, None, dy if wants_token else None, None, None


class _ToWeight(torch.autograd.Function):
    """From the weight to the token, whose gradient is dy."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, inputs: tuple, shape: torch.Size, form: _Form) -> torch.Tensor:
        ctx.save_for_backward(w, *inputs)
        ctx.form = form
        return w.new_empty([1]).expand(shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        w, x = ctx.saved_tensors
        if not wants_weight_gradients():
            return None, None, None, None
        return _WeightGradient.apply(dy, x, w, ctx.form), None, None, None


class _WeightGradient(torch.autograd.Function):
    """Weight gradient of a convolution, bilinear in dy and x; of w only the shape is used."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, form: _Form) -> torch.Tensor:
        ctx.save_for_backward(dy, x)
        ctx.form, ctx.adjoint = form, form.adjoint(x, dy, w)
        return form.weight_gradient(dy, x, w)

    @staticmethod
    def backward(ctx: Any, ddw: torch.Tensor) -> tuple:
        dy, x = ctx.saved_tensors
        to_dy = _convolve(x, ddw, ctx.form) if ctx.needs_input_grad[0] else None
        to_x = _convolve(dy, ddw, ctx.adjoint) if ctx.needs_input_grad[1] else None
        return to_dy, to_x, None, None
