# SPDX-License-Identifier: Apache-2.0
"""A closer look at a phase that produced values which are not finite: where did the first one appear?"""
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from training.phases import Phase


@dataclass(frozen=True)
class Finding:
    """The first place with a value that is not finite.

    kind: 'weight', 'activation', 'loss' or 'gradient'.  where: dotted name of the layer or tensor, as in
    named_modules; '' for the loss itself.  is_half: whether the values are float16 or bfloat16.
    """

    kind: str
    where: str
    is_half: bool = False


@dataclass(frozen=True)
class _Call:
    """A finished call of a module, and whether its outputs are finite: a bool scalar on their device."""

    name: str
    module: torch.nn.Module
    is_finite: torch.Tensor
    is_half: bool


class Examination:
    """Context manager for Phase.examination: watches up to `max_runs` runs, then takes itself away.

    modules: name -> network; all their submodules are watched.  buffers: name -> tensor, further causes to
    be looked at.  found: called once, with the Finding or, if nothing turned up in any run, None.
    Every watched run waits for the device.
    """

    def __init__(
        self, phase: Phase, modules: Mapping[str, torch.nn.Module], buffers: Mapping[str, torch.Tensor],
        found: Callable[[Finding | None], object], max_runs: int = 32,
    ):
        self.phase, self.modules, self.buffers = phase, dict(modules), dict(buffers)
        self.found, self.runs_left = found, max_runs
        self._calls: list[_Call] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> None:
        for name, module in _all_modules(self.modules):
            handle = module.register_forward_hook(self._recorder(name))
            self._hooks.callback(handle.remove)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self._hooks.close()
        calls, self._calls = self._calls, []
        if error is not None:
            return
        finding = self._diagnose(calls)
        self.runs_left -= 1
        if finding is not None or self.runs_left <= 0:
            self.phase.examination = contextlib.nullcontext()
            self.found(finding)

    def _recorder(self, name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def record(module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            tensors = [t.detach() for t in (outputs if isinstance(outputs, tuple) else (outputs,))
                       if isinstance(t, torch.Tensor)]
            if tensors:
                is_half = any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
                self._calls.append(_Call(name, module, _all_finite(tensors), is_half))
        return record

    def _diagnose(self, calls: Sequence[_Call]) -> Finding | None:
        """What came first: an activation, a tensor of self.buffers, or else the gradient of a parameter."""
        # A submodule finishes before the module that contains it, so the first is also the innermost.
        first = _first([call.is_finite for call in calls])
        if first is not None:
            return _explain(calls[first])
        causes = {**self.buffers, '': self.phase.total_loss}
        first = _first([_all_finite([tensor]) for tensor in causes.values()])
        if first is not None:
            return Finding('loss', list(causes)[first])
        return self._diagnose_gradients(calls)

    def _diagnose_gradients(self, calls: Sequence[_Call]) -> Finding | None:
        """The gradient that is computed first: backward passes go from the last call to the first."""
        calls_by_name = {call.name: i for i, call in enumerate(calls)}
        names = _parameter_names(self.modules)
        rows = []
        for parameter, view in zip(self.phase.gradients.parameters, self.phase.gradients.views, strict=True):
            name = names[parameter]
            # What was not called has no gradient.
            rows.append((calls_by_name.get(name.rpartition('.')[0], -1), name, view))
        rows.sort(key=lambda row: row[0], reverse=True)
        first = _first([_all_finite([view]) for _, _, view in rows])
        if first is None:
            return None
        last_call, name, _ = rows[first]
        return Finding('gradient', name, last_call >= 0 and calls[last_call].is_half)


def _all_modules(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    for network, module in modules.items():
        for name, submodule in module.named_modules():
            yield f'{network}.{name}' if name else network, submodule


def _parameter_names(modules: Mapping[str, torch.nn.Module]) -> dict[torch.nn.Parameter, str]:
    return {parameter: f'{network}.{name}'
            for network, module in modules.items() for name, parameter in module.named_parameters()}


def _all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.detach().isfinite().all() for t in tensors]).all()


def _first(are_finite: Sequence[torch.Tensor]) -> int | None:
    """Index of the first that is False, or None; waits for the device once."""
    if not are_finite:
        return None
    values = torch.stack(list(are_finite)).tolist()
    return values.index(False) if False in values else None


def _explain(call: _Call) -> Finding:
    """Whether the layer's own weights are to blame."""
    own = [*call.module.named_parameters(recurse=False), *call.module.named_buffers(recurse=False)]
    broken = _first([_all_finite([tensor]) for _, tensor in own])
    if broken is not None:
        return Finding('weight', f'{call.name}.{own[broken][0]}')
    return Finding('activation', call.name, call.is_half)
