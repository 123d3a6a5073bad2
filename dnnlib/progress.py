# SPDX-License-Identifier: Apache-2.0
"""Progress of long tasks on stderr: a bar with an ETA in a terminal, occasional lines elsewhere."""
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from dnnlib.streams import guarded

LINE_INTERVAL_SEC = 10.0
# Visible bars, which printing must clear.
_active: list['Progress'] = []


class _Bar(tqdm):
    """tqdm without its monitor thread, which conflicts with forked workers."""

    monitor_interval = 0


class Progress:
    """A running total that shows itself; an iterable and a context manager. Made by `progress`."""

    def __init__(
        self, iterable: Iterable[Any] | None, total: int | None, desc: str, unit: str, initial: int,
        show: bool,
    ) -> None:
        self._iterable = iterable
        self.total, self.desc, self.unit = total, desc, unit
        self.n = self._initial = initial
        self._postfix = ''
        self._is_closed, self._is_shown = False, show
        self._start_sec = self._last_line_sec = time.monotonic()
        terminal = _terminal() if show else None
        self._bar = None if terminal is None else _make_bar(self, terminal)
        if self._bar is not None:
            _active.append(self)

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise TypeError('progress(total=...) counts by update(); give it an iterable to loop over')
        with self:
            for item in self._iterable:
                yield item
                self.update(1)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count n more, up to the total: the last batch may be larger than what remains."""
        n = n if self.total is None else max(min(n, self.total - self.n), 0)
        self.n += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last_line_sec >= LINE_INTERVAL_SEC:
            self._print_line()

    def restart(self) -> None:
        """Count from the start again."""
        self.n = self._initial
        if self._bar is not None:
            self._bar.reset()

    def set_postfix_str(self, text: str) -> None:
        """Show `text` after the numbers from now on."""
        self._postfix = text
        if self._bar is not None:
            # The next update draws it.
            self._bar.set_postfix_str(text, refresh=False)

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        write(text)

    def close(self) -> None:
        """Show the final state and stop; may be called more than once."""
        if self._is_closed:
            return
        self._is_closed = True
        # The last line shows that the task is done.
        if self._bar is None:
            self._print_line()
            return
        _active.remove(self)
        self._bar.close()

    def line(self) -> str:
        """The state as text: 'Reading: 300/1000 img (30%), 150.0 img/s, 00:02 elapsed, ETA 00:04'."""
        elapsed = time.monotonic() - self._start_sec
        # Excludes work done before this process started.
        rate = (self.n - self._initial) / elapsed if elapsed > 0 else 0.0
        parts = [f'{self.n} {self.unit}' if not self.total else
                 f'{self.n}/{self.total} {self.unit} ({self.n / self.total:.0%})']
        parts += [f'{rate:.1f} {self.unit}/s', f'{tqdm.format_interval(elapsed)} elapsed']
        if self.total and rate > 0 and self.n < self.total:
            parts.append(f'ETA {tqdm.format_interval((self.total - self.n) / rate)}')
        if self._postfix:
            parts.append(self._postfix)
        return (f'{self.desc}: ' if self.desc else '') + ', '.join(parts)

    def _print_line(self) -> None:
        self._last_line_sec = time.monotonic()
        if self._is_shown and sys.stderr is not None:  # None under pythonw
            print(self.line(), file=sys.stderr, flush=True)


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str = '', unit: str = 'it',
    initial: int = 0, show: bool = True,
) -> Progress:
    """Show the progress of a long task: loop over the result, or enter it (`with`) and call its `update`.

    total: final count, by default len(iterable) if it has one; None if unknown.  initial: count at the start.
    show: False to count silently, as all ranks but one do. In a terminal this is a bar with an ETA; elsewhere
    a line every LINE_INTERVAL_SEC and one at the end.
    """
    # Iterables without a length, such as generators, get no ETA.
    if total is None and hasattr(iterable, '__len__'):
        total = len(iterable)
    return Progress(iterable, total, desc, unit, initial, show)


def write(text: str) -> None:
    """Print a line to stdout, above the visible bars."""
    # A bar is redrawn in place: text in between would leave parts of it behind.
    for bar in _active:
        bar._bar.clear()
    print(text, flush=True)
    for bar in _active:
        bar._bar.refresh()


def _terminal() -> TextIO | None:
    """The terminal to draw bars on, or None. Unwraps loggers that copy stderr: bars must not go to a file."""
    stream = sys.stderr
    while hasattr(stream, 'terminal'):
        stream = stream.terminal
    return stream if stream is not None and stream.isatty() else None


def _make_bar(state: Progress, terminal: TextIO) -> _Bar:
    # A terminal that is closed must not end the task.
    return _Bar(total=state.total, desc=state.desc, unit=state.unit, initial=state.n, file=guarded(terminal),
                dynamic_ncols=True, leave=True)
