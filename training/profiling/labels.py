# SPDX-License-Identifier: Apache-2.0
"""Labels in a profile: phases, passes, layers and operators, recorded while an iteration runs."""
import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """Context whose events the profiler records under these names."""
    return record_function(SEPARATOR.join([MARK, kind, *names]))


def read_label(text: str) -> list[str] | None:
    """[kind, *names] of a label in a profile, None for other events."""
    mark, *parts = text.split(SEPARATOR)
    return parts if mark == MARK and parts else None


class LabelClock(PhaseClock):
    """For run_iteration: labels the phases instead of timing them."""

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Label everything within this context as the phase."""
        with label(PHASE, name):
            yield


@contextlib.contextmanager
def labelled(modules: Mapping[str, torch.nn.Module], phases: Sequence[Phase]) -> Iterator[None]:
    """Label the layers of networks, the passes of phases and the operators; and split the gradients of
    convolutions, so that those of input and weight are separate operations.

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
    """Label all calls of the module; returns a function that undoes it."""
    running: list[record_function] = []

    def enter(_module: torch.nn.Module, _inputs: Any) -> None:
        running.append(label(LAYER, network, path))
        running[-1].__enter__()

    def leave(_module: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
        running.pop().__exit__(None, None, None)

    # always_call: a layer that raises must not leave its label open.
    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    return lambda: [hook.remove() for hook in hooks] and None


def _label_passes(
    losses: Callable[[MicroBatch], Iterator[torch.Tensor]],
) -> Callable[[MicroBatch], Iterator[torch.Tensor]]:
    def labelled_losses(batch: MicroBatch) -> Iterator[torch.Tensor]:
        remaining = losses(batch)
        for i in itertools.count():
            # The caller differentiates a loss before it requests the next, so the label covers both.
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


# Convolutions whose gradients are separate operations.

def _signature(*names: str, **defaults: Any) -> inspect.Signature:
    """Signature of a function that is written in C++ and cannot be inspected."""
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
    """Within this context the gradients of 2-d convolutions by input and by weight are separate operations.

    Results and kernels are the same: torch calls both kernels in one operation. As there, only the requested
    gradients are computed.
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
            # A padding may also be a string, which is not used here.
            if any(t is not None and t.requires_grad for t in tensors) and not isinstance(
                    given['padding'], str):
                with torch.no_grad():
                    result = func(*args, **kwargs)
                return _with_gradients(result, _ConvolutionCall(*tensors, (
                    _pair(given['stride']), _pair(given['padding']), _pair(given['dilation']),
                    func is torch.conv_transpose2d, _pair(given.get('output_padding', 0)), given['groups'])))
        return func(*args, **kwargs)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


@dataclass(frozen=True)
class _ConvolutionCall:
    """A convolution.  spec: stride, padding, dilation, transposed, output padding, groups."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    spec: tuple

    def gradients(self, dy: torch.Tensor, wanted: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
        """The requested gradients by input, weight and bias; differentiable again."""
        sizes = None if self.bias is None else list(self.bias.shape)
        found = torch.ops.aten.convolution_backward(dy, self.x, self.weight, sizes, *self.spec, list(wanted))
        return tuple(g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True))


def _with_gradients(result: torch.Tensor, call: _ConvolutionCall) -> torch.Tensor:
    """The result of a convolution, linked to its arguments by one autograd node per gradient.

    A node's tensor arguments are only those whose gradient it computes, because autograd evaluates a node if
    any of its tensors leads to a requested gradient.
    """
    parts = []
    if call.x.requires_grad:
        parts.append(_DataGradient.apply(call.x, call, result.shape))
    if call.weight.requires_grad or (call.bias is not None and call.bias.requires_grad):
        parts.append(_WeightGradient.apply(call.weight, call.bias, call, result.shape))
    return _Result.apply([result], *parts)


def _placeholder(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of the given shape that takes no memory."""
    return like.new_empty([1] * len(shape)).expand(shape)


class _DataGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _ConvolutionCall, shape: torch.Size) -> torch.Tensor:
        ctx.call = call
        return _placeholder(x, shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        return ctx.call.gradients(dy, [True, False, False])[0], None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, call: _ConvolutionCall, shape: torch.Size,
    ) -> torch.Tensor:
        ctx.call = call
        return _placeholder(weight, shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        return *ctx.call.gradients(dy, [False, *ctx.needs_input_grad[:2]])[1:], None, None


class _Result(torch.autograd.Function):
    """Passes the gradient to all parts. The result is in a list, so that it is not a tensor argument."""

    @staticmethod
    def forward(ctx: Any, result: list[torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
        ctx.num_parts = len(parts)
        return result[0]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        return None, *[dy] * ctx.num_parts
