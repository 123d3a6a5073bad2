# SPDX-License-Identifier: Apache-2.0
"""An activation with its bias and what follows it in one pass: the addition of another branch, or a filter.

y = act(x + b) * gain within +-clamp is not stored, so gradients save x instead. For piecewise linear
activations, whose second derivative is zero. Gradients of any order.
"""
from typing import Any

import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act_cuda, epilogue_cuda, upfirdn2d_cuda
from torch_utils.ops._registry import define_op, empty_as, laid_out_as
from torch_utils.ops.activations import saves_output
from torch_utils.ops.bias_act import _bias_act, act_grad, bias_shaped
from torch_utils.ops.upfirdn2d import _upfirdn2d, adjoint_padding, filter_size

ONE = [1, 1]


def is_worthwhile(x: torch.Tensor, act: str, alpha: float, gain: float) -> bool:
    """Whether these operators save time for x. On a CPU, they recompute more than they save."""
    return (custom_ops.is_available(x.device) and not torch.compiler.is_compiling()
            and saves_output(act, alpha, gain))


# act(x + b) * gain within +-clamp, plus r.

def _plus_reference(
    x: torch.Tensor, b: torch.Tensor, r: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return _bias_act.run(x, b, 1, act, alpha, gain, clamp).add_(r)


def _plus_fake(
    x: torch.Tensor, b: torch.Tensor, r: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor:
    return empty_as(x)


def _plus_cuda(
    x: torch.Tensor, b: torch.Tensor, r: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor | None:
    return bias_act_cuda.bias_act(x, b, 1, act, alpha, gain, clamp, r)


def _plus_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, b, _, *ctx.spec = inputs
    ctx.save_for_backward(x, b)


def _plus_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    x, b = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx = db = None
    if wants[0] or wants[1]:
        dx, db = input_grad(dy, x, b, wants[1], *ctx.spec)
    return dx, db if wants[1] else None, dy, None, None, None, None


# The gradient (dx, db) of act(x + b) * gain within +-clamp; db is empty if unneeded.

def _grad_reference(
    dy: torch.Tensor, x: torch.Tensor, b: torch.Tensor, wants_db: bool, act: str, alpha: float, gain: float,
    clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = _bias_act.run(x, b, 1, act, alpha, gain, clamp)
    dx = laid_out_as(act_grad.run(dy, y, act, alpha, gain, clamp), x)
    return dx, dx.sum([0, 2, 3]) if wants_db else x.new_empty(0)


def _grad_fake(
    dy: torch.Tensor, x: torch.Tensor, b: torch.Tensor, wants_db: bool, act: str, alpha: float, gain: float,
    clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_as(x), b.new_empty(b.shape if wants_db else 0)


def _grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, x, b, _, *ctx.spec = inputs
    ctx.save_for_backward(x, b)
    ctx.set_materialize_grads(False)


def _grad_backward(ctx: Any, ddx: torch.Tensor | None, ddb: torch.Tensor | None) -> tuple:
    return _to_dy(ctx, ddx, ddb), *[None] * 7


def _to_dy(ctx: Any, ddx: torch.Tensor | None, ddb: torch.Tensor | None) -> torch.Tensor | None:
    """Gradient of dy: dx and db are linear in it, with the same slopes."""
    *_, x, b = ctx.saved_tensors
    total = ddx
    if ddb is not None and ddb.numel():
        spread = bias_shaped(ddb, 4, 1)
        total = spread.expand_as(x) if ddx is None else ddx + spread
    return None if total is None else input_grad(total, x, b, False, *ctx.spec)[0]  # noqa: FBT003


# act(x + b) * gain within +-clamp, filtered (upfirdn2d at up = down = 1).

def _filter_reference(  # noqa: PLR0913 (two operators in one)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    y = _bias_act.run(x, b, 1, act, alpha, gain, clamp)
    return _upfirdn2d.run(y, f, ONE, ONE, padding, flip, 1.0)


def _filter_fake(  # noqa: PLR0913 (as above)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor:
    return _upfirdn2d.fake(empty_as(x), f, ONE, ONE, padding, flip, 1.0)


def _filter_cuda(  # noqa: PLR0913 (as above)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, b: torch.Tensor, act: str, alpha: float,
    gain: float, clamp: float,
) -> torch.Tensor | None:
    if not (0 <= alpha <= 1 and gain > 0):
        return None
    # The filter has the gain: one multiplication less for each of its inputs.
    prelude = upfirdn2d_cuda.Prelude(
        b.contiguous(), bias_act_cuda.ACT_NUMBERS[act], float(alpha), float(clamp) / gain)
    return upfirdn2d_cuda.activated_filter(x, f, padding, flip, float(gain), prelude)


def _filter_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, f, ctx.padding, ctx.flip, b, *ctx.spec = inputs
    ctx.out_size = output.shape[2:]
    ctx.save_for_backward(f, x, b)


def _filter_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    f, x, b = ctx.saved_tensors
    wants = ctx.needs_input_grad
    padding = adjoint_padding(filter_size(f), ONE, ONE, ctx.padding, x.shape[2:], ctx.out_size)
    dx, db = filtered_input_grad(dy, f, padding, not ctx.flip, x, b, wants[4], *ctx.spec)
    return dx, None, None, None, db if wants[4] else None, None, None, None, None


# Its gradient: input_grad() of the filtered dy.

def _filtered_grad_reference(  # noqa: PLR0913 (as above)
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, x: torch.Tensor, b: torch.Tensor,
    wants_db: bool, act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    filtered = _upfirdn2d.run(dy, f, ONE, ONE, padding, flip, 1.0)
    return input_grad.run(filtered, x, b, wants_db, act, alpha, gain, clamp)


def _filtered_grad_fake(  # noqa: PLR0913 (as above)
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, x: torch.Tensor, b: torch.Tensor,
    wants_db: bool, act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _grad_fake(dy, x, b, wants_db, act, alpha, gain, clamp)


def _filtered_grad_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, f, ctx.padding, ctx.flip, x, b, _, *ctx.spec = inputs
    ctx.in_size = dy.shape[2:]
    ctx.save_for_backward(f, x, b)
    ctx.set_materialize_grads(False)


def _filtered_grad_backward(ctx: Any, ddx: torch.Tensor | None, ddb: torch.Tensor | None) -> tuple:
    f, x, _ = ctx.saved_tensors
    to_filtered = _to_dy(ctx, ddx, ddb)
    if to_filtered is None:
        return tuple([None] * 11)
    padding = adjoint_padding(filter_size(f), ONE, ONE, ctx.padding, ctx.in_size, x.shape[2:])
    return _upfirdn2d(to_filtered, f, ONE, ONE, padding, not ctx.flip, 1.0), *[None] * 10


bias_act_plus = define_op(
    'bias_act_plus(Tensor x, Tensor b, Tensor r, str act, float alpha, float gain, float clamp) -> Tensor',
    reference=_plus_reference, fake=_plus_fake, setup_context=_plus_setup_context, backward=_plus_backward,
    cuda=_plus_cuda,
)

input_grad = define_op(
    'bias_act_input_grad(Tensor dy, Tensor x, Tensor b, bool wants_db, str act, float alpha, float gain, '
    'float clamp) -> (Tensor, Tensor)',
    reference=_grad_reference, fake=_grad_fake, setup_context=_grad_setup_context, backward=_grad_backward,
    cuda=epilogue_cuda.input_grad,
)

activated_filter = define_op(
    'activated_filter(Tensor x, Tensor f, int[] padding, bool flip_filter, Tensor b, str act, float alpha, '
    'float gain, float clamp) -> Tensor',
    reference=_filter_reference, fake=_filter_fake, setup_context=_filter_setup_context,
    backward=_filter_backward, cuda=_filter_cuda,
)

filtered_input_grad = define_op(
    'filtered_input_grad(Tensor dy, Tensor f, int[] padding, bool flip_filter, Tensor x, Tensor b, '
    'bool wants_db, str act, float alpha, float gain, float clamp) -> (Tensor, Tensor)',
    reference=_filtered_grad_reference, fake=_filtered_grad_fake,
    setup_context=_filtered_grad_setup_context, backward=_filtered_grad_backward,
    cuda=epilogue_cuda.filtered_input_grad,
)
