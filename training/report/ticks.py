# SPDX-License-Identifier: Apache-2.0
"""Ticks: when they end, when snapshots are due, and where the time goes."""
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
    """Whether a run of `total_kimg` is complete after `cur_nimg` images."""
    return cur_nimg >= total_kimg * 1000


def tick_ends(
    cur_nimg: int, tick: int, tick_start_nimg: int, total_kimg: float, kimg_per_tick: float,
) -> bool:
    """Whether the iteration that reached `cur_nimg` ends its tick. Tick 0 is one iteration long."""
    # Relative to the start of the tick, so a batch that overshoots shifts all later ticks.
    is_full = cur_nimg >= tick_start_nimg + kimg_per_tick * 1000
    return tick == 0 or is_full or is_done(cur_nimg, total_kimg)


def snapshot_due(
    tick: int, done: bool, every_ticks: int | None, every_minutes: float | None = None, minutes: float = 0.0,
) -> bool:
    """Whether a snapshot is due at the end of a tick; always at the last one, unless snapshots are off.

    every_ticks: interval, None for off. every_minutes: if given, replaces it; minutes: since the last
    snapshot. Tick 0 is always due.
    """
    # An interval in minutes bounds the loss of a crash at any training speed.
    if every_minutes is not None:
        return done or tick == 0 or minutes >= every_minutes
    return every_ticks is not None and (done or tick % every_ticks == 0)


def kimg_number(cur_nimg: int, is_taken: bool = False) -> str:
    """The number in file names: kimg, six digits.

    is_taken: a file with this number exists, so the remaining images are appended, as in 000012-480. The
    published system overwrites the file.
    """
    return f'{cur_nimg // 1000:06d}' + (f'-{cur_nimg % 1000:03d}' if is_taken else '')


def nimg_of_name(name: str, kind: str) -> int | None:
    """nimg of a file <kind><kimg_number>.<suffix>, rounded down to kimg if need be; None for other names."""
    match = re.search(rf'{kind}(\d{{6,}})(?:-(\d{{3}}))?\.\w+$', name)
    return int(match[1]) * 1000 + int(match[2] or 0) if match else None


@dataclass(frozen=True)
class TickReport:
    """Measurements of a finished tick.

    total_sec: since the start. sec_per_tick: training time; data_sec: the part of it spent waiting for data.
    maintenance_sec: between the training of the previous tick and this one (snapshots, metrics; for the
    first tick, set-up). cpu_mem_gb, peak_gpu_mem_gb: GiB. augment: probability p.
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
        # sec_per_tick includes data_sec, but not maintenance_sec.
        wall_sec = self.sec_per_tick + self.maintenance_sec
        return {name: sec / wall_sec if wall_sec > 0 else 0.0 for name, sec in seconds.items()}

    def line(self) -> str:
        """The published line, followed by the shares of data, compute and maintenance."""
        shares = [f'{name} {share:.0%}' for name, share in self.shares().items()]
        return ' '.join([self.published_line(), *shares])

    def statistics(self) -> dict[str, float]:
        """{statistic: value} in the published order; Timing/data_sec is our addition."""
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
    """Measures ticks; created when a run starts.

    elapsed_sec: training time before resuming; counts towards total_sec.
    """

    def __init__(self, cur_nimg: int = 0, elapsed_sec: float = 0.0) -> None:
        self._start_sec = time.monotonic() - elapsed_sec
        self._idle_since_sec = time.monotonic()
        self.start_tick(cur_nimg)

    def start_tick(self, cur_nimg: int) -> None:
        """Training starts or continues at `cur_nimg`; the time since the last tick was maintenance."""
        self._tick_start_sec = time.monotonic()
        # For the first tick, it includes set-up.
        self._maintenance_sec = self._tick_start_sec - self._idle_since_sec
        self._tick_start_nimg = cur_nimg
        self._data_sec = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time within this context counts as waiting for data."""
        start_sec = time.monotonic()
        try:
            yield
        finally:
            self._data_sec += time.monotonic() - start_sec

    def end_tick(
        self, tick: int, cur_nimg: int, augment: float = 0.0, device: torch.device | None = None,
    ) -> TickReport:
        """Measurements of the tick that ends now. On a GPU, synchronises and resets its peak memory."""
        # Kernels that are still queued belong to this tick.
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
    """Resident memory of this process; 0 without both /proc and the optional psutil."""
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
