# SPDX-License-Identifier: Apache-2.0
"""One program at a time trains in the folder of a run.

The lock is the operating system's, so that it goes with the process that holds it, however that ends.
"""
import errno
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from dnnlib.util import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK_FILE = '.lock'
WAIT_SEC = 10.0  # a process that was killed just now may take so long to be gone, above all elsewhere
POLL_SEC = 0.1
TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Holds the lock of a run's folder, as a context manager.

    Entering raises UserError if another process still holds it after `wait_sec`.  note: a line for the user,
    None unless the file system knows no locks, so that nothing is held.
    """

    def __init__(self, run_dir: str | os.PathLike, wait_sec: float = WAIT_SEC) -> None:
        self._path, self._wait_sec = Path(run_dir, LOCK_FILE), wait_sec
        self._file: IO[str] | None = None
        self.note: str | None = None

    def __enter__(self) -> 'RunLock':
        deadline_sec = time.monotonic() + self._wait_sec
        try:
            self._file = self._path.open('a+', encoding='utf-8')
            while not self._try():
                if time.monotonic() >= deadline_sec:
                    holder = self._holder()
                    self._file.close()
                    raise UserError(f'{self._path.parent}: {holder} trains in this folder; wait for its end, '
                                    'or stop it')
                time.sleep(POLL_SEC)
            self._write_holder()
        except OSError as error:
            self.note = (f'{self._path} cannot be locked ({error.strerror or error}): see to it that no '
                         'other program trains in this folder.')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        # The file stays: who deletes a lock may delete that of the next one. Closing it is letting go.
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self) -> bool:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, 'this system has no locks')
        try:
            # Not inherited by forked workers, which may live a little longer; known to NFS.
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
        return self._file.read(200) or 'another program'
