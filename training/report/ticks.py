# SPDX-License-Identifier: Apache-2.0
"""Ticks: when one ends, what is saved then, and where its time went."""
import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dnnlib.util import format_time

GIB = 2 ** 30


def is_done(cur_nimg: int, total_kimg: float) -> bool:
    """Whether a run of `total_kimg` thousand images is over after `cur_nimg` images."""
    return cur_nimg >= total_kimg * 1000


def tick_ends(
    cur_nimg: int, tick: int, tick_start_nimg: int, total_kimg: float, kimg_per_tick: float,
) -> bool:
    """Whether the iteration that led to `cur_nimg` images ends its tick. Tick 0 is one iteration long."""
    # Counted from where the tick began, so a batch that overshoots shifts all later ticks.
    is_full = cur_nimg >= tick_start_nimg + kimg_per_tick * 1000
    return tick == 0 or is_full or is_done(cur_nimg, total_kimg)


def snapshot_due(
    tick: int, done: bool, every_ticks: int | None, every_minutes: float | None = None, minutes: float = 0.0,
) -> bool:
    """Whether the end of a tick takes a snapshot; the last tick does, if snapshots are on at all.

    every_ticks: interval, None for off. every_minutes: if given, rules instead of it; `minutes` have passed
    since the last snapshot. Tick 0 takes one either way.
    """
    # Minutes bound what a crash can cost, whatever the speed of the machine.
    if every_minutes is not None:
        return done or tick == 0 or minutes >= every_minutes
    return every_ticks is not None and (done or tick % every_ticks == 0)


def kimg_number(cur_nimg: int, is_taken: bool = False) -> str:
    """The number in names of files: thousands of images shown, six digits.

    is_taken: an earlier file of this thousand has that name, so the images beyond it follow, as in
    000012-480. The published system overwrites the earlier one.
    """
    return f'{cur_nimg // 1000:06d}' + (f'-{cur_nimg % 1000:03d}' if is_taken else '')


def nimg_of_name(name: str, kind: str) -> int | None:
    """Images shown at a file <kind><kimg_number>.<suffix>, as far as its name tells; None for other names."""
    match = re.search(rf'{kind}(\d{{6,}})(?:-(\d{{3}}))?\.\w+$', name)
    return int(match[1]) * 1000 + int(match[2] or 0) if match else None


@dataclass(frozen=True)
class TickReport:
    """A finished tick in numbers.

    total_sec: since the start. sec_per_tick: its training time; data_sec: the part of it spent waiting for
    data. maintenance_sec: between the training of the previous tick and of this one (snapshots, metrics;
    first: set-up). cpu_mem_gb, peak_gpu_mem_gb: GiB. augment: probability p.
    """

    tick: int
    cur_nimg: int
    total_sec: float
    sec_per_tick: float
    sec_per_kimg: float
    maintenance_sec: float
    cpu_mem_gb: float = 0.0
    peak_gpu_mem_gb: float = 0.0
    augment: float = 0.0
    data_sec: float = 0.0

    def published_line(self) -> str:
        """The line of the published system, character for character."""
        return ' '.join([
            f'tick {self.tick:<5d}',
            f'kimg {self.cur_nimg / 1000:<8.1f}',
            f'time {format_time(self.total_sec):<12s}',
            f'sec/tick {self.sec_per_tick:<7.1f}',
            f'sec/kimg {self.sec_per_kimg:<7.2f}',
            f'maintenance {self.maintenance_sec:<6.1f}',
            f'cpumem {self.cpu_mem_gb:<6.2f}',
            f'gpumem {self.peak_gpu_mem_gb:<6.2f}',
            f'augment {self.augment:.3f}',
        ])

    def shares(self) -> dict[str, float]:
        """Fractions of the time since the previous tick: waiting for data, computing, maintenance."""
        seconds = {'data': self.data_sec, 'compute': self.sec_per_tick - self.data_sec,
                   'maintenance': self.maintenance_sec}
        # Waiting for data is part of the training time; maintenance is not.
        wall_sec = self.sec_per_tick + self.maintenance_sec
        return {name: sec / wall_sec if wall_sec > 0 else 0.0 for name, sec in seconds.items()}

    def line(self) -> str:
        """The published line, and where the time went."""
        shares = [f'{name} {share:.0%}' for name, share in self.shares().items()]
        return ' '.join([self.published_line(), *shares])

    def statistics(self) -> dict[str, float]:
        """Statistic name -> value, in the published order; the time spent waiting for data is ours."""
        return {
            'Progress/tick': self.tick,
            'Progress/kimg': self.cur_nimg / 1000,
            'Timing/total_sec': self.total_sec,
            'Timing/sec_per_tick': self.sec_per_tick,
            'Timing/sec_per_kimg': self.sec_per_kimg,
            'Timing/maintenance_sec': self.maintenance_sec,
            'Resources/cpu_mem_gb': self.cpu_mem_gb,
            'Resources/peak_gpu_mem_gb': self.peak_gpu_mem_gb,
            'Progress/augment': self.augment,
            'Timing/total_hours': self.total_sec / 3600,
            'Timing/total_days': self.total_sec / 86400,
            'Timing/data_sec': self.data_sec,
        }


class TickClock:
    """Measures ticks: made when a run starts, told when each tick starts and ends.

    elapsed_sec: what earlier parts of a continued run took; it counts towards total_sec.
    """

    def __init__(self, cur_nimg: int = 0, elapsed_sec: float = 0.0) -> None:
        self._start_sec = time.monotonic() - elapsed_sec
        self._idle_since_sec = time.monotonic()
        self.start_tick(cur_nimg)

    def start_tick(self, cur_nimg: int) -> None:
        """Training begins or goes on, at `cur_nimg` images: what went before was maintenance."""
        self._tick_start_sec = time.monotonic()
        # The first one contains the set-up.
        self._maintenance_sec = self._tick_start_sec - self._idle_since_sec
        self._tick_start_nimg = cur_nimg
        self._data_sec = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Everything within this context counts as waiting for data."""
        start_sec = time.monotonic()
        try:
            yield
        finally:
            self._data_sec += time.monotonic() - start_sec

    def end_tick(
        self, tick: int, cur_nimg: int, augment: float = 0.0, device: torch.device | None = None,
    ) -> TickReport:
        """The numbers of the tick that ends now. On a GPU, waits for it and resets the peak of its memory."""
        # Launched work counts for this tick only once the GPU has finished it.
        peak_bytes = 0
        if device is not None and torch.device(device).type == 'cuda':
            torch.cuda.synchronize(device)
            peak_bytes = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        now_sec = self._idle_since_sec = time.monotonic()
        sec_per_tick = now_sec - self._tick_start_sec
        num_images = cur_nimg - self._tick_start_nimg
        return TickReport(
            tick=tick, cur_nimg=cur_nimg, total_sec=now_sec - self._start_sec, sec_per_tick=sec_per_tick,
            sec_per_kimg=sec_per_tick / max(num_images, 1) * 1000, maintenance_sec=self._maintenance_sec,
            cpu_mem_gb=resident_bytes() / GIB, peak_gpu_mem_gb=peak_bytes / GIB, augment=augment,
            data_sec=self._data_sec)


def resident_bytes() -> int:
    """Memory that this process holds; 0 where neither /proc nor the optional psutil tells."""
    # The second number is the resident size, in pages.
    try:
        pages = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[1])
    except OSError:
        return _resident_bytes_psutil()
    return pages * os.sysconf('SC_PAGE_SIZE')


def _resident_bytes_psutil() -> int:
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss
