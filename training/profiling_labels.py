# SPDX-License-Identifier: Apache-2.0
"""Names in a profile: what an iteration is doing, written into the profiler's record while it runs."""
import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.overrides import TorchFunctionMode

from torch_utils.ops._registry import OPS, Op
from training.iteration import PhaseClock
from training.loss import MicroBatch
from training.phases import Phase

MARK, SEPARATOR = 'profile', '|'
STEP, DATA, PHASE, PASS, LAYER, OP = 'step', 'data', 'phase', 'pass', 'layer', 'op'  # kinds of labels


def label(kind: str, *names: str) -> record_function:
    """Context under which the profiler records everything as part of something with these names."""
    return record_function(SEPARATOR.join([MARK, kind, *names]))


def read_label(text: str) -> list[str] | None:
    """[kind, *names] of a label in a profile, None if the text is another event's."""
    mark, *parts = text.split(SEPARATOR)
    return parts if mark == MARK and parts else None


class LabelClock(PhaseClock):
    """For run_iteration: labels the phases instead of timing them."""

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Label what happens within this context as the phase."""
        with label(PHASE, name):
            yield


@contextlib.contextmanager
def labelled(modules: Mapping[str, torch.nn.Module], phases: Sequence[Phase]) -> Iterator[None]:
    """Label the layers of networks, the passes of phases and the operators; and split the gradients of
    convolutions, so that those of input and weight are operations of their own.

    modules: name -> network.
    """
    with contextlib.ExitStack() as stack:
        for network, module in modules.items():
            for path, submodule in module.named_modules():
                stack.callback(_label_module(submodule, network, path))
        for phase in phases:
            stack.callback(setattr, phase, 'losses', phase.losses)
            phase.losses = _label_passes(phase.losses)
        for op in OPS.values():
            stack.callback(vars(op).pop, 'run')
            vars(op)['run'] = _label_op(op)
        stack.enter_context(SplitConvolutions())
        yield


def _label_module(module: torch.nn.Module, network: str, path: str) -> Callable[[], None]:
    """Label all calls of the module; the result undoes that."""
    running: list[record_function] = []

    def enter(_module: torch.nn.Module, _inputs: Any) -> None:
        running.append(label(LAYER, network, path))
        running[-1].__enter__()

    def leave(_module: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
        running.pop().__exit__(None, None, None)

    # always_call: a layer that raises must not leave its label behind.
    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    return lambda: [hook.remove() for hook in hooks] and None


def _label_passes(
    losses: Callable[[MicroBatch], Iterator[torch.Tensor]],
) -> Callable[[MicroBatch], Iterator[torch.Tensor]]:
    def labelled_losses(batch: MicroBatch) -> Iterator[torch.Tensor]:
        remaining = losses(batch)
        for i in itertools.count():
            # Whoever takes the loss differentiates it before asking for the next: the label covers both.
            with label(PASS, str(i)):
                loss = next(remaining, None)
                if loss is None:
                    return
                yield loss
    return labelled_losses


def _label_op(op: Op) -> Callable[..., Any]:
    run = op.run

    @functools.wraps(run)
    def labelled_run(*args: Any) -> Any:
        with label(OP, op.name):
            return run(*args)
    return labelled_run


# Convolutions whose gradients are operations of their own.

def _signature(*names: str, **defaults: Any) -> inspect.Signature:
    """Of a function that is written in C++ and therefore does not tell its own."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([
        *(inspect.Parameter(name, kind) for name in names),
        *(inspect.Parameter(name, kind, default=value) for name, value in defaults.items())])


SIGNATURES = {
    torch.conv2d: _signature('input', 'weight', bias=None, stride=1, padding=0, dilation=1, groups=1),
    torch.conv_transpose2d: _signature(
        'input', 'weight', bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1),
}


class SplitConvolutions(TorchFunctionMode):
    """Within this context 2-d convolutions compute the gradients of input and weight one after the other.

    The numbers are the same, and so are the kernels: torch computes both in one operation, of two kernels.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if func in SIGNATURES and torch.is_grad_enabled():
            bound = SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            tensors = [given[name] for name in ('input', 'weight', 'bias')]
            # 'same' and 'valid' are names of paddings; nobody here uses them.
            if any(t is not None and t.requires_grad for t in tensors) and given['padding'] not in NAMED:
                is_transposed = func is torch.conv_transpose2d
                return _SplitConvolution.apply(*tensors, [
                    _pair(given['stride']), _pair(given['padding']), _pair(given['dilation']), is_transposed,
                    _pair(given.get('output_padding', 0)), given['groups']])
        return func(*args, **kwargs)


NAMED = ('same', 'valid')


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _SplitConvolution(torch.autograd.Function):
    """A convolution; spec: stride, padding, dilation, transposed, output padding, groups."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: list,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.spec, ctx.bias_sizes = spec, None if bias is None else list(bias.shape)
        return torch.convolution(x, weight, bias, *spec)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        wants = ctx.needs_input_grad
        dx = dw = db = None
        if wants[0]:
            dx, _, _ = _gradients(ctx, dy, [True, False, False])
        if wants[1] or wants[2]:
            _, dw, db = _gradients(ctx, dy, [False, *wants[1:3]])
        return dx, dw, db, None


def _gradients(ctx: Any, dy: torch.Tensor, wanted: list[bool]) -> tuple[torch.Tensor | None, ...]:
    # Differentiable itself, as gradients of gradients need it.
    gradients = torch.ops.aten.convolution_backward(dy, *ctx.saved_tensors, ctx.bias_sizes, *ctx.spec, wanted)
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))
