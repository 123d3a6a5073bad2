# SPDX-License-Identifier: Apache-2.0
"""define_op(): defines every operator; the only code that uses torch.library.

An operator is four plain functions: reference (plain PyTorch), fake (shape and strides of the result),
setup_context and backward (which calls operators again, so that gradients of any order work), and optionally
a fifth, cuda, which launches a kernel.
"""
from collections.abc import Callable
from typing import Any

import torch

from dnnlib import naming
from torch_utils import custom_ops

# Of its own in the wheel, so that a process can hold a checkout beside it.
NAMESPACE = naming.PREFIX.rstrip('.') or 'stylegan2'
_LIBRARY = torch.library.Library(NAMESPACE, 'FRAGMENT')
_PLAIN_TENSORS = frozenset([torch.Tensor, torch.nn.Parameter])
Result = torch.Tensor | tuple[torch.Tensor, ...]
OPS: dict[str, 'Op'] = {}  # every operator by its name


class Op:
    """A callable operator; `overload` is its torch.library form, seen by compile, export and opcheck.

    Eager calls on plain tensors skip the dispatcher: a Python kernel behind it costs about 45 us per
    call, which exceeds the arithmetic of small layers on a CPU.
    """

    def __init__(
        self, name: str, reference: Callable, fake: Callable, setup_context: Callable, backward: Callable,
        cuda: Callable | None = None,
    ):
        self.name = name
        self.setup_context = setup_context
        self.backward = backward
        self.fake = fake
        self.native = cuda
        on_cuda = reference if cuda is None else self.run_native
        self.kernels: dict[str, Callable] = {'cpu': reference, 'cuda': on_cuda, 'meta': fake}
        self.reference = reference
        self.overload: Callable = reference

    def run(self, *args: Any) -> Result:
        """The implementation for the device of the first argument, without autograd."""
        return self.kernels.get(args[0].device.type, self.reference)(*args)

    def run_native(self, *args: Any) -> Result:
        """By the kernel if it is available and supports the arguments, else by the reference."""
        try:
            result = self.native(*args) if custom_ops.is_available(args[0].device) else None
        except custom_ops.CompileError:  # already reported by a warning
            result = None
        return self.reference(*args) if result is None else result

    def __call__(self, *args: Any) -> Result:
        """Compute with gradients of any order."""
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TENSORS:
            return self.overload(*args)
        if not torch.is_grad_enabled() or not any(_requires_grad(arg) for arg in args):
            return self.run(*args)
        return _EagerOp.apply(*args, self)


def _requires_grad(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.requires_grad


class _EagerOp(torch.autograd.Function):
    """Autograd of any Op. The op comes last, so that needs_input_grad matches the op's arguments."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Result:
        *inputs, ctx.op = args
        output = ctx.op.run(*inputs)
        ctx.op.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        return (*ctx.op.backward(ctx, *grads), None)


def define_op(
    schema: str, *, reference: Callable, fake: Callable, setup_context: Callable, backward: Callable,
    cuda: Callable | None = None,
) -> Op:
    """Register an operator in the NAMESPACE of `torch.ops` and return its callable.

    schema: name, arguments and results in the schema language, such as
    'scale(Tensor x, float gain) -> Tensor'; the first argument is a tensor.
    fake: same arguments, returns an empty tensor (a tuple of them, if there are several results) of the right
    shape, strides, dtype and device.
    setup_context(ctx, inputs, output), backward(ctx, *grads): as for torch.library.register_autograd.
    cuda: same arguments, computes the results with a kernel or returns None to leave them to the reference.
    """
    name = schema.partition('(')[0]
    op = Op(name, reference, fake, setup_context, backward, cuda)
    qualified = f'{NAMESPACE}::{name}'
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ['CPU', 'CUDA']:
        _LIBRARY.impl(name, op.run, key)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    op.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPS[name] = op
    return op


def memory_format_of(*tensors: torch.Tensor) -> torch.memory_format:
    """Memory format of the first tensor that is contiguous or channels_last; contiguous if it is both, or if
    no tensor is either.

    Results of operators get their format by this rule rather than from the strides that the arithmetic
    produces, since compilers rely on the strides of the fake kernel.
    """
    for x in tensors:
        if x.is_contiguous():
            break
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def empty_as(*tensors: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with shape, dtype and device of the first tensor, in memory_format_of(all of them)."""
    first = tensors[0]
    return torch.empty(
        first.shape, dtype=first.dtype, device=first.device, memory_format=memory_format_of(*tensors))


def laid_out_as(result: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """result in memory_format_of(tensors), copied only if necessary."""
    return result.contiguous(memory_format=memory_format_of(*tensors))
