# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose gradients of every order are convolutions that a GPU is fast at.

The gradient of a convolution's gradient is where torch's own are slow there: what belongs to the weight is
computed as a convolution of the transposed input with a kernel as large as the image, which on an H200 took
a fifth of a training iteration. But y = x * w is bilinear: with respect to x the gradient is the transposed
convolution of dy with w, with respect to w the same product of dy and x that the first backward pass needs,
and so on. On a CPU torch's own are faster, and compilers know them.

`enabled` is kept for code embedded in official pickles. Weight gradients that nobody asks for are not
computed; where autograd cannot know that, no_weight_gradients() tells.
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
    """Within it, differentiation sends nothing back to the weights: for gradients of other things, which may
    be differentiated again. Counts for all threads, since autograd has its own.
    """
    before = _SWITCH.is_on
    _SWITCH.is_on = False
    try:
        yield
    finally:
        _SWITCH.is_on = before


def wants_weight_gradients() -> bool:
    """Whether gradients go back to weights: everywhere but within no_weight_gradients()."""
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
    """What distinguishes one convolution from another; pairs are (rows, columns)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair
    groups: int
    transposed: bool

    def run(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The convolution, without gradients."""
        return torch.ops.aten.convolution(
            x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups)

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The gradient of the weight, of which only shape and strides matter, without gradients."""
        wanted = [False, True, False]
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, wanted)[1]

    def adjoint(self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> '_Form':
        """Of the convolution that takes y's gradient to x's, where this one takes x to y."""
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
    """The convolution as two nodes, of which autograd runs only those that lead to what is asked for.

    A Python function is told what required gradients in the forward pass, not what is asked for now. So the
    gradient of the weight is a node of its own, connected by a tensor that has the shape of y and no content.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or w.requires_grad):
        return form.run(x, w)
    with torch.no_grad():
        y = form.run(x, w)
    token = _ToWeight.apply(w, (x,), y.shape, form) if w.requires_grad else None
    return _Convolution.apply(x, w, token, (y,), form)


class _Convolution(torch.autograd.Function):
    """x * w, which is y, with the gradient of x; the token's is that of y. What is in a tuple has no edge."""

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
    """From the weight to a token; what comes back to the token is dy."""

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
    """The gradient of a convolution's weight, bilinear in dy and x; w only has the shape."""

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
