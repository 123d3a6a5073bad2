# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its number, and the files that say what the run is."""
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dnnlib.util import UserError, first_line, printable, read_regular, replace_file
from training.config import OPTIONS, TrainConfig

RUN_NUMBER = re.compile(r'\d+')
CLAIM_ATTEMPTS = 1000
OPTIONS_FILE, FLAGS_FILE = 'training_options.json', 'training_flags.json'
# Files that exist before the first image.
FIRST_FILES = {OPTIONS_FILE, FLAGS_FILE, '.lock', 'log.txt', 'stats.jsonl'}


def existing_numbers(outdir: Path) -> Iterator[int]:
    """The numbers with which subdirectories of `outdir` begin."""
    if outdir.is_dir():
        for path in outdir.iterdir():
            match = RUN_NUMBER.match(path.name)
            if match and path.is_dir():
                yield int(match[0])


def next_run_number(outdir: Path) -> int:
    """One above the highest number in use, 0 in a new folder."""
    return max(existing_numbers(outdir), default=-1) + 1


def discard_unstarted(run_dir: str | os.PathLike) -> None:
    """Remove the run directory of a refused run, unless it contains results."""
    folder = Path(run_dir)
    # If files are locked or gone, a leftover directory is harmless.
    with contextlib.suppress(OSError):
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        if files.keys() <= FIRST_FILES and not files.get('stats.jsonl'):
            shutil.rmtree(folder)


def claim_run_dir(outdir: Path, description: str) -> Path:
    """Create the run directory <number>-<description> with a unique number, also among concurrent starts.

    Raises UserError if it cannot be created.
    """
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        for _ in range(CLAIM_ATTEMPTS):
            # The directory <number> claims the number: mkdir succeeds in one process only.
            number = next_run_number(outdir)
            claim = outdir / f'{number:05d}'
            try:
                claim.mkdir()
            except FileExistsError:
                continue
            # Meanwhile, another run may have completed its claim of this number.
            if list(existing_numbers(outdir)).count(number) == 1:
                return claim.rename(outdir / f'{number:05d}-{description}')
            claim.rmdir()
    except OSError as error:
        raise UserError(f'--outdir={outdir}: cannot create a run folder ({error.strerror}); choose a folder '
                        'that you can write to') from error
    raise UserError(f'--outdir={outdir}: too many runs start at once; try again')


def save_options(config: TrainConfig, flags: Mapping[str, Any]) -> None:
    """Write training_options.json and, for --resume, the flags to the run directory, atomically."""
    given = {name: value for name, value in flags.items() if value is not None and name != 'allow_changes'}
    for name, data in ((OPTIONS_FILE, config.to_options()), (FLAGS_FILE, given)):
        with replace_file(Path(config.run_dir, name)) as partial:
            partial.write_text(json.dumps(data, indent=2) + '\n', encoding='utf-8')


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file of a run; empty if there is no such file. Raises UserError if it is none."""
    try:
        data = json.loads(read_regular(path))
        if isinstance(data, dict):
            return data
        reason = 'no dictionary'
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    raise _unusable(path, reason)


def read_flags(run_dir: Path) -> dict[str, Any]:
    """The flags that a run was started with. Raises UserError if the file is damaged or holds no flags."""
    path = run_dir / FLAGS_FILE
    flags = read_json(path)
    kinds = {option.key: option.types for option in OPTIONS}
    for name, value in flags.items():
        if type(value) not in kinds.get(name, ()):
            raise _unusable(path, f'{name!r} is no option of this program with such a value')
    return flags


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(f'--resume: {path} cannot be used ({reason}); move it away and give all options as for '
                     'a new run')


try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK_FILE = '.lock'
WAIT_SEC = 10.0  # a killed process may take this long to exit, especially on another node
POLL_SEC = 0.1
TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Context manager that locks a run directory.

    Entering raises UserError if another process still holds the lock after `wait_sec`.  note: a line for the
    user if the file system does not support locks, else None.
    """

    def __init__(self, run_dir: str | os.PathLike, wait_sec: float = WAIT_SEC) -> None:
        self._path, self._wait_sec = Path(run_dir, LOCK_FILE), wait_sec
        self._file: IO[str] | None = None
        self.note: str | None = None

    def __enter__(self) -> 'RunLock':
        deadline_sec = time.monotonic() + self._wait_sec
        try:
            self._file = self._path.open('a+', encoding='utf-8', errors='replace')
            while not self._try():
                if time.monotonic() >= deadline_sec:
                    holder = self._holder()
                    self._file.close()
                    raise UserError(f'{self._path.parent}: {holder} is training in this directory; '
                                    'wait until it ends, or stop it')
                time.sleep(POLL_SEC)
            self._write_holder()
        except OSError as error:
            self.note = (f'{self._path} cannot be locked ({error.strerror or error}): make sure that no '
                         'other program trains in this directory.')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        # The file is not deleted: it may be the lock of the next process by then. Closing releases the lock.
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self) -> bool:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, 'this system has no locks')
        try:
            # Not inherited by forked workers, which may live slightly longer; supported by NFS.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                return False
            raise
        return True

    def _write_holder(self) -> None:
        self._file.truncate(0)
        self._file.write(f'process {os.getpid()} on {socket.gethostname()}')
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        # A file of anybody's making, printed in a message.
        return printable(self._file.read(200)) or 'another program'
