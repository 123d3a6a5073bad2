# SPDX-License-Identifier: Apache-2.0
"""Functions that run as captured CUDA graphs from their third call of a kind on, with identical results.

The first call of a kind tells what it draws on the host (host_draws), the second of a form warms up, the next
captures. A new graph is tried once beside the function itself. If a capture fails, or the graph gives other
numbers, that call and all later ones run as if there were no graphs.
"""
import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dnnlib.util import first_line
from torch_utils import host_draws

MAX_GRAPHS = 8  # of one function; a graph costs about a megabyte for every few thousand kernels
TOLERANCE = 0.02  # relative to the norm of a tensor; kernels that add in any order differ by far less


class Backend(Protocol):
    """What captures."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """function(), run in the way of a capture, so that nothing in a later capture is new."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """Let function() enqueue its work without running any of it. Returns (replay, result of function).

        replay() does the work, in the same memory. A failure raises one of Captures.errors and changes
        nothing.
        """

    def get_state(self) -> torch.Tensor:
        """Where the generator of the device stands."""

    def set_state(self, state: torch.Tensor) -> None:
        """Put the generator of the device where it stood at get_state()."""


class CudaBackend:
    """torch.cuda.CUDAGraph, all in one pool of memory: one graph of it runs at a time, nothing in it lasts.

    torch's generator of the device is part of a graph: each replay starts at its current seed and offset and
    moves it on as the captured operations would have.
    """

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device('cuda', index)
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """See Backend. Libraries keep their workspaces, and autograd its accumulation nodes, for a stream;
        those of another one would make a backward pass leave the stream that is captured.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """See Backend."""
        stream, generator_state = torch.cuda.current_stream(self.device), self.get_state()
        graph, is_captured = torch.cuda.CUDAGraph(), False
        try:
            # Threads that read images may allocate meanwhile; in the global mode that would be an error.
            with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode='thread_local'):
                result = function()
            is_captured = True
        finally:
            if not is_captured:
                self._recover(stream, generator_state)
        return graph.replay, result

    def get_state(self) -> torch.Tensor:
        """See Backend. The state is the host's: nobody waits for the device."""
        return torch.cuda.get_rng_state(self.device)

    def set_state(self, state: torch.Tensor) -> None:
        """See Backend."""
        torch.cuda.set_rng_state(state, self.device)

    def _recover(self, stream: torch.cuda.Stream, generator_state: torch.Tensor) -> None:
        """Undo what a failed capture has left: torch does so only when the end of a capture succeeds."""
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # nothing is allocated to the pool any more
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # one that no graph holds may not be used again
        if not self._can_draw():
            # The generator waits for the end of the failed capture; that of one that succeeds does as well.
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode='thread_local'):
                    torch.zeros(1, device=self.device)
            finally:
                torch.cuda.set_stream(stream)
        self.set_state(generator_state)

    def _can_draw(self) -> bool:
        try:
            torch.rand(1, device=self.device)
        except RuntimeError:
            return False
        return True


@dataclass
class Captures:
    """What the functions of a program share: the backend, until a capture fails.

    warn(line): told once why.  seconds: how long capturing and trying has taken so far.
    """

    backend: Backend | None
    warn: Callable[[str], object]
    seconds: float = 0.0

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """What a failed capture may raise."""
        return (RuntimeError,)

    def give_up(self, error: BaseException) -> None:
        """No graphs any more, because of this error."""
        self.backend = None
        # The cause is __context__; this error only reports that the capture was invalidated.
        cause = first_line(error.__context__ or error)
        self.warn(f'CUDA graphs failed ({cause}); everything goes on without graphs, with the same results, '
                  'only slower. --cuda-graphs=off does not try.')


@dataclass
class _Graph:
    """A captured call: where its inputs and draws lie, how to run it, and what it returns."""

    inputs: Sequence[torch.Tensor]
    values: host_draws.Block
    run: Callable[[], object]
    result: Any

    def replay(self, inputs: Sequence[torch.Tensor], draws: Sequence[host_draws.Draw]) -> Any:
        torch._foreach_copy_(self.inputs, inputs)  # one kernel for each type
        self.values.write(draws)
        self.run()
        # The next graph of the pool may write where this result lies.
        return self.result.clone() if isinstance(self.result, torch.Tensor) else self.result


@dataclass
class GraphedFunction:
    """function(*args), where args are tensors on one device and hashable values.

    It may change tensors that live as long as this, must leave nothing else behind but its result (a tensor,
    or a plain value that depends on shapes only), and may decide by random numbers of host_draws alone.
    changes(): those tensors; what is not among them is changed twice when a graph is tried.
    """

    function: Callable[..., Any]
    captures: Captures
    changes: Callable[[], Sequence[torch.Tensor]] = tuple
    max_graphs: int = MAX_GRAPHS
    _sources: dict[Hashable, list[host_draws.Source]] = field(default_factory=dict, init=False)
    _warm: set[Hashable] = field(default_factory=set, init=False)
    _inputs: dict[Hashable, list[torch.Tensor]] = field(default_factory=dict, init=False)
    _graphs: dict[Hashable, _Graph] = field(default_factory=dict, init=False)

    def __call__(self, *args: Any) -> Any:
        """The result; at first by running the function, then by replaying it."""
        if self.captures.backend is None:
            self._forget()
            return self.function(*args)
        kind = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(_kind_of, args))
        if kind not in self._sources:
            return self._record(kind, args)
        draws = [host_draws.draw_from(source) for source in self._sources[kind]]
        form = (kind, *(draw.form for draw in draws))
        if form in self._graphs:
            return self._graphs[form].replay(_tensors(args), draws)
        if form in self._warm and len(self._graphs) < self.max_graphs:
            start = time.perf_counter()
            self._capture(kind, form, args, draws)
            self.captures.seconds += time.perf_counter() - start
            if form in self._graphs:
                return self._tried(form, args, draws)
        if self.captures.backend is None or form in self._warm:
            return self._play(args, draws)
        # The warm-up compiles kernels and chooses algorithms, which a capture could not.
        self._warm.add(form)
        return self.captures.backend.warm_up(lambda: self._play(args, draws))

    @property
    def num_graphs(self) -> int:
        """How many graphs have been captured."""
        return len(self._graphs)

    def _record(self, kind: Hashable, args: Sequence[Any]) -> Any:
        tape = host_draws.Recording()
        with host_draws.use(tape):
            result = self.captures.backend.warm_up(lambda: self.function(*args))
        self._sources[kind] = tape.sources
        self._warm.add((kind, *tape.forms))
        return result

    def _play(self, args: Sequence[Any], draws: Sequence[host_draws.Draw]) -> Any:
        with host_draws.use(host_draws.Playing(host_draws.moved(draws, _device(args)))):
            return self.function(*args)

    def _tried(self, form: Hashable, args: Sequence[Any], draws: Sequence[host_draws.Draw]) -> Any:
        """The function's own result and effects; its new graph goes unless it has the same."""
        start, backend, changed = time.perf_counter(), self.captures.backend, self.changes()
        before, state = [tensor.clone() for tensor in changed], backend.get_state()

        def take_back() -> None:
            for tensor, values in zip(changed, before, strict=True):
                tensor.copy_(values)
            backend.set_state(state)

        try:
            of_graph = [self._graphs[form].replay(_tensors(args), draws)]
            of_graph += [tensor.clone() for tensor in changed]
            take_back()
            result = self._play(args, draws)
            if not all(map(_is_like, of_graph, [result, *changed])):
                raise RuntimeError('a graph gave other numbers than the same work without it')
        except self.captures.errors as error:
            take_back()
            self.captures.give_up(error)
            self._forget()
            result = self._play(args, draws)
        self.captures.seconds += time.perf_counter() - start
        return result

    def _capture(
        self, kind: Hashable, form: Hashable, args: Sequence[Any], draws: Sequence[host_draws.Draw],
    ) -> None:
        """Add the graph of a form, or give all up."""
        if kind not in self._inputs:
            self._inputs[kind] = [tensor.clone() for tensor in _tensors(args)]
        places = iter(self._inputs[kind])
        static = [next(places) if isinstance(arg, torch.Tensor) else arg for arg in args]
        values = host_draws.Block(draws, _device(args))
        try:
            with host_draws.use(host_draws.Playing(values.taken)):
                run, result = self.captures.backend.capture(lambda: self.function(*static))
        except self.captures.errors as error:
            self.captures.give_up(error)
            self._forget()
            return
        self._graphs[form] = _Graph(self._inputs[kind], values, run, result)

    def _forget(self) -> None:
        """Set memory free."""
        for held in (self._graphs, self._inputs, self._sources, self._warm):
            held.clear()


def _is_like(a: Any, b: Any) -> bool:
    """Whether two results are the same but for rounding; waits for the device."""
    if not isinstance(a, torch.Tensor):
        return a == b
    a, b = (torch.nan_to_num(x.detach().double()) for x in (a, b))
    return bool((a - b).norm() <= TOLERANCE * b.norm() + torch.finfo(torch.float32).tiny)


def _kind_of(arg: Any) -> Hashable:
    if isinstance(arg, torch.Tensor):
        return tuple(arg.shape), arg.stride(), arg.dtype
    return arg


def _tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    return [arg for arg in args if isinstance(arg, torch.Tensor)]


def _device(args: Sequence[Any]) -> torch.device:
    return _tensors(args)[0].device
