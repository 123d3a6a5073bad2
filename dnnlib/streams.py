# SPDX-License-Identifier: Apache-2.0
"""Output that outlives its readers: a log file beside the terminal; a terminal or pipe that may be gone."""
import contextlib
import io
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TextIO


class Logger:
    """Copies everything printed to stdout and stderr to a file, until closed.

    file_name: None for no file. file_mode: 'w' or 'a'. should_flush: write through at once. Each stream goes
    on to where it went before (the published system joins both in stdout). Progress bars are not copied. A
    terminal, pipe or file that cannot be written to any more is given up with a line on the others: printing
    must not end a long run.
    """

    def __init__(
        self, file_name: str | os.PathLike | None = None, file_mode: str = 'w', should_flush: bool = True,
    ) -> None:
        # Names of files may not be valid text.
        self._file = None if file_name is None else open(
            file_name, file_mode, encoding='utf-8', errors='backslashreplace')
        self.stdout = _Tee(sys.stdout, self._file, should_flush)
        self.stderr = _Tee(sys.stderr, self._file, should_flush)
        sys.stdout, sys.stderr = self.stdout, self.stderr

    def __enter__(self) -> 'Logger':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, text: str | bytes) -> None:
        """Write to the log and to the original stdout."""
        self.stdout.write(text)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.stdout.flush()
        self.stderr.flush()

    def close(self) -> None:
        """Restore the streams unless replaced meanwhile, and close the file. May be called repeatedly."""
        self.flush()
        # A stream that was replaced later stays replaced.
        if sys.stdout is self.stdout:
            sys.stdout = self.stdout.terminal
        if sys.stderr is self.stderr:
            sys.stderr = self.stderr.terminal
        # Other code may hold a reference to a stream, which then works without the file.
        self.stdout.file = self.stderr.file = None
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported when it was written to
                self._file.close()
            self._file = None


class _Tee(io.TextIOBase):
    """A text stream that passes everything on to `terminal` (None under pythonw) and to `file`, each until it
    cannot be written to any more.
    """

    def __init__(
        self, terminal: TextIO | None, file: TextIO | None, should_flush: bool,
    ) -> None:
        self.terminal, self.file, self._should_flush = terminal, file, should_flush
        self._is_gone = terminal is None

    def write(self, text: str | bytes) -> int:
        # Some programs write bytes.
        if isinstance(text, bytes):
            text = text.decode('utf-8', errors='replace')
        if not text:
            return 0
        # The file first: what is said of a terminal that is gone comes after the line.
        self._to_file(lambda file: file.write(text))
        self._to_terminal(lambda terminal: terminal.write(text))
        if self._should_flush:
            self.flush()
        return len(text)

    def _to_terminal(self, action: Callable[[TextIO], object]) -> None:
        if self._is_gone or self.terminal is None:
            return
        try:
            action(self.terminal)
        except OSError as error:
            self._is_gone = True
            discard_output(self.terminal)
            # Told where somebody may still read it: in the file, and on the other stream.
            line = (f'\nWarning: {getattr(self.terminal, "name", "an output")} cannot be written to any more '
                    f'({error.strerror or error}); the program continues.\n')
            self._to_file(lambda file: file.write(line))
            if sys.stderr is not None and sys.stderr is not self:
                sys.stderr.write(line)

    def _to_file(self, action: Callable[[TextIO], object]) -> None:
        if self.file is None:
            return
        try:
            action(self.file)
        except OSError as error:
            # A full disk must not abort a run that only prints.
            self.file = None
            line = f'Logging to the file has stopped: {error.strerror}\n'
            self._to_terminal(lambda terminal: terminal.write(line))

    def flush(self) -> None:
        if self.terminal is not None and not self.terminal.closed:
            self._to_terminal(lambda terminal: terminal.flush())
        self._to_file(lambda file: file.flush())

    def isatty(self) -> bool:
        return self.terminal is not None and self.terminal.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self.terminal is None:
            raise io.UnsupportedOperation('fileno')
        return self.terminal.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self.terminal, 'encoding', None) or 'utf-8'


def guarded(stream: TextIO) -> TextIO:
    """A text stream that writes to `stream` until that fails, and nowhere from then on."""
    return _Tee(stream, None, should_flush=False)


def discard_output(stream: TextIO) -> None:
    """Send what a stream still holds nowhere: Python would fail on it when it flushes the stream at exit."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(handle, stream.fileno())
        finally:
            os.close(handle)
