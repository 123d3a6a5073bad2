# SPDX-License-Identifier: Apache-2.0
"""Watchdog of the processes of a run: names a dead or hung rank and aborts all ranks.

Every process publishes heartbeats in the launcher's store: its phase and the number of collectives entered. A
process counts as hung if it has not entered a collective within the time-out after another one has; before
that it cannot be told from a busy one. Hangs on a GPU are not seen here: NCCL aborts them, after the same
time-out.
"""
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from torch_utils.processes.rendezvous import Rendezvous

STDERR = 2  # the file descriptor
FAILED = 1  # exit status
GRACE_SEC = 5.0  # for the launcher to report the process that failed first
LONGEST_INTERVAL_SEC = 5.0


@dataclass
class Position:
    """Progress of a process: its phase, and the number of collectives entered.

    finish: called before the process is aborted, e.g. to complete a file being written.
    """

    phase: str = 'start'
    entered: int = 0
    finish: Callable[[], None] = field(default=lambda: None)


HERE = Position()  # of this process


@dataclass(frozen=True)
class Heartbeat:
    """Published by a process at each interval.  beat: a counter."""

    beat: int
    entered: int
    phase: str

    def encode(self) -> str:
        """As a value of the store."""
        return f'{self.beat} {self.entered} {self.phase}'

    @classmethod
    def decode(cls, value: bytes) -> 'Heartbeat':
        """From a value of the store."""
        beat, entered, phase = value.decode().split(' ', 2)
        return cls(int(beat), int(entered), phase)


class StallDetector:
    """Finds a process that is gone or stalls the others."""

    def __init__(self, timeout_sec: float) -> None:
        self._timeout_sec = timeout_sec
        self._last: dict[int, Heartbeat] = {}
        self._alive_sec: dict[int, float] = {}
        self._behind_sec: dict[int, float] = {}

    def verdict(self, reports: dict[int, Heartbeat], now_sec: float) -> str | None:
        """Error message about the lowest rank that is hung or gone; None if there is none.

        reports: by rank, of some or all processes.  now_sec: of a monotonic clock.
        """
        furthest = max(report.entered for report in reports.values())
        for rank, report in reports.items():
            last = self._last.get(rank)
            if last is None or last.beat != report.beat:
                self._alive_sec[rank] = now_sec
            # Since when another process has waited for it at this collective.
            if last is None or report.entered == furthest or report.entered != last.entered:
                self._behind_sec[rank] = now_sec
        self._last = dict(reports)
        for rank, report in reports.items():
            if now_sec - self._alive_sec[rank] > self._timeout_sec:
                return (f'process {rank} has not responded for {self._timeout_sec:g} seconds; its last phase '
                        f'was {report.phase}')
            if now_sec - self._behind_sec[rank] > self._timeout_sec:
                return (f'process {rank} has stalled the others for {self._timeout_sec:g} seconds in the '
                        f'phase {report.phase}')
        return None


class Watchdog:
    """The watchdog thread of a process.

    advice: appended to the error message.  timeout_sec: must exceed the longest task that one process does
    while the others wait.
    """

    def __init__(self, rendezvous: Rendezvous, timeout_sec: float, advice: str) -> None:
        self._rank, self._advice = rendezvous.rank, advice
        # A separate connection: a blocking wait of the main thread would block this thread, too.
        self._store = rendezvous.reconnect(timeout_sec)
        # Rank 0 watches all ranks, and rank 1 watches rank 0: few requests for any number of processes.
        self._watched = range(rendezvous.world_size) if self._rank == 0 else range(int(self._rank == 1))
        self._judge = StallDetector(timeout_sec)
        self._interval_sec = min(timeout_sec / 20, LONGEST_INTERVAL_SEC)
        self._beat = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._is_over.set()
        self._thread.join()

    def say_failed(self) -> None:
        """Tell the other ranks that this process exits with an error that it reports itself."""
        self._store.compare_set('verdict', '', 'failed')

    def _run(self) -> None:
        lost_sec = None
        while not self._is_over.wait(self._interval_sec):
            try:
                self._look()
                lost_sec = None
            except dist.DistError:
                lost_sec = time.monotonic() if lost_sec is None else lost_sec
                if time.monotonic() - lost_sec > GRACE_SEC:
                    self._end('the launcher is gone' if self._rank == 0 else '')

    def _look(self) -> None:
        self._beat += 1
        own = Heartbeat(self._beat, HERE.entered, HERE.phase)
        self._store.set(f'at/{self._rank}', own.encode())
        if self._store.check(['verdict']):
            if self._store.get('verdict') == b'failed':
                # The launcher must see that failure before it sees this process exit.
                self._is_over.wait(GRACE_SEC)
            self._end('')
        keys = [f'at/{rank}' for rank in self._watched]
        if not keys or not self._store.check(keys):
            return
        reports = dict(zip(self._watched, map(Heartbeat.decode, self._store.multi_get(keys)), strict=True))
        verdict = self._judge.verdict({**reports, self._rank: own}, time.monotonic())
        if verdict is not None:
            judge = self._store.compare_set('verdict', '', str(self._rank))
            self._end(verdict if judge.decode() == str(self._rank) else '')

    def _end(self, reason: str) -> None:
        """Abort this process, whatever its main thread is waiting for."""
        if self._is_over.is_set():
            return
        if reason:
            os.write(STDERR, f'Error: {reason}; all processes stop{self._advice}\n'.encode())
        HERE.finish()
        os._exit(FAILED)
