# SPDX-License-Identifier: Apache-2.0
"""Watches over the processes of a run: who is dead or hangs is named, and ends the run for all.

Every process tells the others, through the store of the launcher, that it lives, in which phase it is, and
how many collective operations it has entered. A process hangs if another one has entered an operation and it
has not followed for the time-out; until then nobody can tell it from one that works hard. What runs on a GPU
meanwhile is not seen: there NCCL, with the same time-out, ends the process.
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
GRACE_SEC = 5.0  # in which the launcher may find the process that is the cause of it all
LONGEST_INTERVAL_SEC = 5.0


@dataclass
class Position:
    """Where a process is: in which phase, and after how many collective operations entered.

    finish: what it should complete before it is ended, such as a file that is being written.
    """

    phase: str = 'start'
    entered: int = 0
    finish: Callable[[], None] = field(default=lambda: None)


HERE = Position()  # of this process


@dataclass(frozen=True)
class Heartbeat:
    """What a process tells of itself.  beat: another number each time."""

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
    """Finds the process that the others wait for in vain."""

    def __init__(self, timeout_sec: float) -> None:
        self._timeout_sec = timeout_sec
        self._last: dict[int, Heartbeat] = {}
        self._alive_sec: dict[int, float] = {}
        self._behind_sec: dict[int, float] = {}

    def verdict(self, reports: dict[int, Heartbeat], now_sec: float) -> str | None:
        """A sentence on the first process, by rank, that hangs or is gone, None if there is none.

        reports: by rank, of some or all processes.  now_sec: of a clock that never goes back.
        """
        furthest = max(report.entered for report in reports.values())
        for rank, report in reports.items():
            last = self._last.get(rank)
            if last is None or last.beat != report.beat:
                self._alive_sec[rank] = now_sec
            # Since when someone has waited for it, at this operation.
            if last is None or report.entered == furthest or report.entered != last.entered:
                self._behind_sec[rank] = now_sec
        self._last = dict(reports)
        for rank, report in reports.items():
            if now_sec - self._alive_sec[rank] > self._timeout_sec:
                return (f'process {rank} has not answered for {self._timeout_sec:g} seconds; its last phase '
                        f'was {report.phase}')
            if now_sec - self._behind_sec[rank] > self._timeout_sec:
                return (f'process {rank} has been in the phase {report.phase} for {self._timeout_sec:g} '
                        'seconds while others wait for it')
        return None


class Watchdog:
    """The watching thread of a process.

    advice: how the line ends that says why the run does.  timeout_sec: for the slowest thing that a process
    may do alone.
    """

    def __init__(self, rendezvous: Rendezvous, timeout_sec: float, advice: str) -> None:
        self._rank, self._advice = rendezvous.rank, advice
        # A connection of its own: a wait of the main thread would block it.
        self._store = rendezvous.reconnect(timeout_sec)
        # Rank 0 looks after all, and its neighbour after rank 0: few questions, however many processes.
        self._watched = range(rendezvous.world_size) if self._rank == 0 else range(int(self._rank == 1))
        self._judge = StallDetector(timeout_sec)
        self._interval_sec = min(timeout_sec / 20, LONGEST_INTERVAL_SEC)
        self._beat = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watchdog no longer."""
        self._is_over.set()
        self._thread.join()

    def say_failed(self) -> None:
        """Tell the others that this process ends with an error, of which it speaks itself."""
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
                # The launcher shall see the failure before it sees us leave.
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
        """End this process, whatever its main thread waits for."""
        if self._is_over.is_set():
            return
        if reason:
            os.write(STDERR, f'Error: {reason}; all processes stop{self._advice}\n'.encode())
        HERE.finish()
        os._exit(FAILED)
