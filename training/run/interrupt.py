# SPDX-License-Identifier: Apache-2.0
"""Stopping a run from outside, in time to save it: signals and the clock.

SIGTERM, SIGINT (Ctrl-C), SIGHUP (a terminal that is closed) and SIGUSR1 ask the run to stop: it finishes its
iteration, saves itself and leaves with STOPPED, the status by which sysexits.h means "try again later".
Slurm: start train.py with --resume=latest in a script that calls `scontrol requeue $SLURM_JOB_ID` on status
75, and let the signal come early by `sbatch --signal=USR1@120`. Kubernetes: a Job makes another pod, and its
podFailurePolicy, which needs the restartPolicy Never, can leave status 75 out of the count. torchrun always
leaves with 1 where a process left with anything but 0, and names the 75 in its report; with --max-restarts it
starts a process that alone was asked to stop again, except after --time-limit, which counts for the whole
launch. A second signal stops the process at once with 128 + the signal's number, 130 for Ctrl-C. Before the
handlers are set, train.py leaves with STOPPED at the first signal, as nothing has been trained.
"""
import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from torch_utils import distributed

STDERR = 2  # the file descriptor
ASKED = b'\nStopping after this iteration; a second signal stops at once, without saving.\n'
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')
                if hasattr(signal, name))
# Ctrl-C reaches every process of a terminal, and a launcher passes it on once more: one request.
SAME_REQUEST_SEC = 1.0


class Interrupt:
    """Watches for signals, as a context manager, and for the clock.

    time_limit_sec: ask to stop this many seconds after `start_sec` (time.monotonic(); default: now), or None
    for never. The handlers are those of the whole process, and only the main thread can set them.
    """

    def __init__(self, time_limit_sec: float | None = None, start_sec: float | None = None):
        start_sec = time.monotonic() if start_sec is None else start_sec
        self._deadline_sec = None if time_limit_sec is None else start_sec + time_limit_sec
        self._pid = os.getpid()
        self._signal: int | None = None
        self._signal_sec = 0.0
        self._before: dict[int, object] = {}
        self._answer: Callable[[], int] | None = None

    def __enter__(self) -> 'Interrupt':
        for number in SIGNALS:
            # nohup has a run ignore that its terminal is closed.
            if signal.Signals(number).name != 'SIGHUP' or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A data worker, forked after the handlers were set: ignores Ctrl-C.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now_sec = time.monotonic()
        if self._signal is None:
            self._signal, self._signal_sec = number, now_sec
            # An iteration can take minutes on a CPU. A terminal that is gone must not end the run.
            if distributed.rank() == 0:
                with contextlib.suppress(OSError):
                    os.write(STDERR, ASKED)
        elif now_sec - self._signal_sec > SAME_REQUEST_SEC:
            # Must not block. A partially written snapshot is not listed.
            os.write(STDERR, b'Stopped at once, without saving.\n')
            os._exit(128 + number)

    @property
    def reason(self) -> str | None:
        """Why this process should stop; None if it should not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline_sec is not None and time.monotonic() >= self._deadline_sec:
            return '--time-limit'
        return None

    def should_stop(self, also: bool = False) -> bool:
        """Whether the run stops after this iteration. All processes call it and get the same answer.

        also: this process has another reason. With several processes the decision lags one iteration behind:
        it is exchanged between CPUs during the next iteration, so that no process or GPU waits.
        """
        is_asked = also or self.reason is not None
        if distributed.world_size() == 1:
            return is_asked
        answer, self._answer = self._answer, distributed.start_max(int(is_asked))
        return answer is not None and answer() > 0
