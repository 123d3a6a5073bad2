# SPDX-License-Identifier: Apache-2.0
"""Random draws of the host that determine work on the device: made on demand, or ahead of a captured graph.

A captured graph replays its kernels whatever Python would decide next time. Code that branches on random
numbers therefore draws them through `take`, so that a tape can draw them beforehand, in the same order.
"""
import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Draw:
    """The result of a draw.

    form: determines which operations follow.  values: host tensors that these operations read; of the same
    shapes and dtypes whenever the form is the same.
    """

    form: Hashable = ()
    values: tuple[torch.Tensor, ...] = ()


ALIGNMENT = 16  # bytes, of each value in a block
DrawSource = Callable[[], Draw]
Taken = tuple[Hashable, Sequence[torch.Tensor]]  # a form, and its values on the device


@dataclass
class Recording:
    """A tape that draws everything when asked, and records the sources and forms."""

    sources: list[DrawSource] = field(default_factory=list)
    forms: list[Hashable] = field(default_factory=list)

    def take(self, source: DrawSource, device: torch.device) -> Taken:
        """As the function `take`."""
        draw = draw_from(source)
        self.sources.append(source)
        self.forms.append(draw.form)
        return moved([draw], device)[0]


class Playing:
    """A tape that returns earlier draws, in order."""

    def __init__(self, taken: Sequence[Taken]):
        self._taken = iter(taken)

    def take(self, _source: DrawSource, _device: torch.device) -> Taken:
        """The next of the draws, whatever the source. Raises RuntimeError after the last."""
        taken = next(self._taken, None)
        if taken is None:
            raise RuntimeError('more draws on the host than in the recorded run')
        return taken


@dataclass
class _State:
    tape: Recording | Playing | None = None
    is_forced: bool = False
    is_drawing: bool = False


_state = _State()


def take(source: DrawSource, device: torch.device) -> Taken:
    """(form, values on `device`) of a draw. source: draws from torch's generator of the CPU only, and may be
    called again for later runs.
    """
    if _state.tape is None:
        return moved([draw_from(source)], device)[0]
    return _state.tape.take(source, device)


def draw_from(source: DrawSource) -> Draw:
    """source(), during which is_drawing()."""
    _state.is_drawing = True
    try:
        return source()
    finally:
        _state.is_drawing = False


def is_drawing() -> bool:
    """Whether a draw is in progress, in which the host may wait for the device, e.g. to read a value."""
    return _state.is_drawing


def is_static(device: torch.device) -> bool:
    """Whether operations and shapes should not depend on the drawn values, as far as possible.

    True on a GPU, captured or not: kernels and memory are chosen by shape. On a CPU skipping work pays more.
    """
    return device.type != 'cpu' or _state.is_forced


@contextlib.contextmanager
def use(tape: Recording | Playing) -> Iterator[None]:
    """Within this context `take` uses the tape."""
    before, _state.tape = _state.tape, tape
    try:
        yield
    finally:
        _state.tape = before


@contextlib.contextmanager
def force_static() -> Iterator[None]:
    """Within this context is_static() is True on a CPU, too."""
    before, _state.is_forced = _state.is_forced, True
    try:
        yield
    finally:
        _state.is_forced = before


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without synchronizing with a GPU."""
    if device.type != 'cuda' or not tensor.numel():
        return tensor.to(device)
    # A copy is asynchronous only from pinned memory.
    return tensor.pin_memory().to(device, non_blocking=True)


def moved(draws: Sequence[Draw], device: torch.device) -> list[Taken]:
    """Forms, and values on the device, as a tape returns them."""
    if device.type == 'cuda':
        return Block(draws, device).taken
    return [(draw.form, [value.to(device) for value in draw.values]) for draw in draws]


class Block:
    """The values of draws in one buffer on the device, so that a single copy transfers all of them.

    taken: forms, and the values as views of that buffer.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device):
        values = [value for draw in draws for value in draw.values]
        ends = list(itertools.accumulate(-(-value.nbytes // ALIGNMENT) * ALIGNMENT for value in values))
        self._starts = [0, *ends][:len(values)]
        self._memory = torch.empty(ends[-1:] or [0], dtype=torch.uint8, device=device)
        places = iter(self._places(self._memory, values))
        self.taken: list[Taken] = [(draw.form, [next(places) for _ in draw.values]) for draw in draws]
        self.write(draws)

    def write(self, draws: Sequence[Draw]) -> None:
        """Overwrite the values with other draws of the same forms, without synchronizing with a GPU."""
        values = [value for draw in draws for value in draw.values]
        if not values:
            return
        # The pinned-memory allocator does not reuse a block before its asynchronous copy is done.
        host = torch.empty_like(self._memory, device='cpu', pin_memory=self._memory.is_cuda)
        for place, value in zip(self._places(host, values), values, strict=True):
            place.copy_(value)
        self._memory.copy_(host, non_blocking=True)

    def _places(self, memory: torch.Tensor, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [memory[start:start + value.nbytes].view(value.dtype).view(value.shape)
                for start, value in zip(self._starts, values, strict=True)]
