# SPDX-License-Identifier: Apache-2.0
"""Functions that run as captured CUDA graphs from their third call of a kind on, with identical results.

The first call of a kind records its draws on the host (host_draws), the second of a form warms up, the third
captures. A new graph is verified once against the eager function. If a capture fails, or the results differ,
that call and all later ones run eagerly.
"""
import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dnnlib.util import first_line
from torch_utils import host_draws

MAX_GRAPHS = 8  # per function; a graph takes about a megabyte per few thousand kernels
TOLERANCE = 0.02  # relative to the norm of a tensor; sums by atomics differ by far less


class Backend(Protocol):
    """Captures and replays functions."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """function(), run on the stream of captures, so that a later capture initializes nothing."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """Record the work that function() enqueues, without running it. Returns (replay, its result).

        replay() does the work, in the same memory. A failure raises one of Captures.errors and changes
        nothing.
        """

    def get_state(self) -> torch.Tensor:
        """State of the device's random generator."""

    def set_state(self, state: torch.Tensor) -> None:
        """Restore the state that get_state() returned."""


class CudaBackend:
    """torch.cuda.CUDAGraph, with one memory pool for all: graphs run one at a time and overwrite each other.

    The device's random generator is part of a graph: each replay starts at the current seed and offset and
    advances it as the captured operations would.
    """

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device('cuda', index)
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """See Backend. Libraries keep workspaces per stream, and autograd its accumulation nodes; those of
        another stream would make a backward pass leave the capturing stream.
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
            # Data loader threads may allocate meanwhile, which is an error in the global mode.
            with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode='thread_local'):
                result = function()
            is_captured = True
        finally:
            if not is_captured:
                self._recover(stream, generator_state)
        return graph.replay, result

    def get_state(self) -> torch.Tensor:
        """See Backend. The state is on the host: no synchronization."""
        return torch.cuda.get_rng_state(self.device)

    def set_state(self, state: torch.Tensor) -> None:
        """See Backend."""
        torch.cuda.set_rng_state(state, self.device)

    def _recover(self, stream: torch.cuda.Stream, generator_state: torch.Tensor) -> None:
        """Clean up after a failed capture: torch does so only if ending the capture succeeds."""
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # allocation to the pool may have ended already
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # a pool without graphs cannot be reused
        if not self._can_draw():
            # The generator still counts as capturing; a capture that succeeds resets it.
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
    """State shared by all graphed functions: the backend, until a capture fails.

    warn(line): called once with the reason.  seconds: spent on capturing and verifying so far.
    """

    backend: Backend | None
    warn: Callable[[str], object]
    seconds: float = 0.0

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """Exceptions that a failed capture may raise."""
        return (RuntimeError,)

    def give_up(self, error: BaseException) -> None:
        """Disable graphs, because of this error."""
        self.backend = None
        # The cause is __context__; this error only reports that the capture was invalidated.
        cause = first_line(error.__context__ or error)
        self.warn(f'CUDA graphs failed ({cause}); continuing without them: same results, but slower. '
                  'Disable them with --cuda-graphs=off.')


@dataclass
class _Graph:
    """A captured call: the memory of its inputs and draws, how to replay it, and its result."""

    inputs: Sequence[torch.Tensor]
    values: host_draws.Block
    run: Callable[[], object]
    result: Any

    def replay(self, inputs: Sequence[torch.Tensor], draws: Sequence[host_draws.Draw]) -> Any:
        torch._foreach_copy_(self.inputs, inputs)  # one kernel per dtype
        self.values.write(draws)
        self.run()
        # The next graph of the pool may overwrite this result.
        return self.result.clone() if isinstance(self.result, torch.Tensor) else self.result


@dataclass
class GraphedFunction:
    """function(*args), where args are tensors on one device and hashable values.

    Its only side effects may be in-place changes of tensors that live as long as this object; its result is a
    tensor, or a plain value that depends on shapes only; it may branch only on random numbers of host_draws.
    changes(): those tensors; any other tensor would be changed twice when a graph is verified.
    """

    function: Callable[..., Any]
    captures: Captures
    changes: Callable[[], Sequence[torch.Tensor]] = tuple
    max_graphs: int = MAX_GRAPHS
    _sources: dict[Hashable, list[host_draws.DrawSource]] = field(default_factory=dict, init=False)
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
        # The warm-up compiles kernels and chooses algorithms, which is impossible during a capture.
        self._warm.add(form)
        return self.captures.backend.warm_up(lambda: self._play(args, draws))

    @property
    def num_graphs(self) -> int:
        """Number of captured graphs."""
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
        """The eager result and effects; disables graphs unless the new one reproduces them."""
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
                raise RuntimeError('the results of a graph differ from those without it')
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
        """Add the graph of a form, or disable graphs."""
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
        """Release all graphs and their memory."""
        for held in (self._graphs, self._inputs, self._sources, self._warm):
            held.clear()


def _is_like(a: Any, b: Any) -> bool:
    """Whether two results are equal up to rounding; synchronizes with the device."""
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
