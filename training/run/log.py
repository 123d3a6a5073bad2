# SPDX-License-Identifier: Apache-2.0
"""What a run writes for its users: log, status line, statistics, sample sheets, curves."""
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from dnnlib import progress
from dnnlib.util import Logger, UserError
from torch_utils.training_stats import Collector, Store
from training.report.curves import plot_training_curves
from training.report.fakes_over_time import write_fakes_over_time
from training.report.page import WARNING, write_progress_page
from training.report.sheet import save_image_grid
from training.report.ticks import TickReport
from training.run.sinks import open_sinks


class StatsWriter:
    """Appends statistics to stats.jsonl in the run directory, and sends them to TensorBoard, if it can be
    imported, and with `wandb` to Weights & Biases.

    start_time: of the run, in seconds since the epoch; TensorBoard shows times relative to it. Raises
    UserError if the directory is not writable, or wandb is missing.
    """

    def __init__(
        self, run_dir: str | os.PathLike, start_time: float | None = None, *, wandb: bool = False,
    ) -> None:
        self._path = Path(run_dir) / 'stats.jsonl'
        try:
            _end_last_line(self._path)
            self._file = self._path.open('a', encoding='utf-8')
        except OSError as error:
            raise UserError(f'{self._path}: cannot be written ({error.strerror or error}); check the folder, '
                            'its permissions and the free space') from error
        # They are optional: stats.jsonl holds the same numbers.
        self._sinks = open_sinks(run_dir, time.time() if start_time is None else start_time, wandb=wandb)

    def write(self, statistics: Mapping[str, Mapping[str, float]], cur_nimg: int) -> None:
        """Add one line: {name: {'num', 'mean', 'std'}, ..., 'timestamp'}.

        Non-finite values become null, as JSON requires (the published system writes a bare NaN).
        """
        now = time.time()
        line = {name: {key: _json_number(value) for key, value in moments.items()}
                for name, moments in statistics.items()}
        try:
            self._file.write(json.dumps({**line, 'timestamp': now}, allow_nan=False) + '\n')
            # Ticks are visible immediately, and survive a crash.
            self._file.flush()
            means = {name: moments['mean'] for name, moments in statistics.items() if moments['num']}
            self._add_scalars(means, cur_nimg, now)
        except OSError as error:
            # The disk may have space again at the next tick; a lost line must not abort the run.
            progress.write(f'{self._path}: cannot be written ({error.strerror}); free some space')

    def write_metrics(self, results: Mapping[str, float], cur_nimg: int) -> None:
        """Show new metric results as Metrics/<name>."""
        scalars = {f'Metrics/{name}': value for name, value in results.items()}
        self._add_scalars(scalars, cur_nimg, time.time())

    def write_sheet(self, path: str | os.PathLike, cur_nimg: int) -> None:
        """Show a sheet of generated images that was saved as `path`."""
        for sink in self._sinks:
            sink.add_sheet(path, cur_nimg)

    def _add_scalars(self, scalars: Mapping[str, float], cur_nimg: int, now: float) -> None:
        for sink in self._sinks:
            sink.add_scalars(scalars, cur_nimg, now)

    def close(self) -> None:
        """Close everything."""
        with contextlib.suppress(OSError):  # already reported by write()
            self._file.close()
        for sink in self._sinks:
            sink.close()


class RunLog:
    """The log files of a run, written by rank 0; other ranks only take part in collective updates.

    store: where losses are reported; earlier reports are not included. A context manager: until it closes,
    everything printed is copied to log.txt.  wandb: also log to Weights & Biases.
    """

    def __init__(
        self, run_dir: str | os.PathLike, rank: int = 0, store: Store | None = None, *, wandb: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._cur_nimg = 0
        # Report each plotting error once, not at every snapshot.
        self._said: set[str] = set()
        self.store = Store(rank) if store is None else store
        # Names without new values are left empty instead of repeating old values.
        self.collector = Collector(keep_previous=False, store=self.store)
        self._logger = self._writer = None
        # Only one process writes, so that lines do not mix.
        if rank == 0:
            self._writer = StatsWriter(run_dir, wandb=wandb)
            self._logger = self._open_logger()

    def _open_logger(self) -> Logger:
        path = self.run_dir / 'log.txt'
        try:
            return Logger(path, file_mode='a')
        except OSError as error:
            raise UserError(f'{path}: cannot be written ({error.strerror}); use another --outdir') from error

    def __enter__(self) -> 'RunLog':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()

    def print(self, text: str) -> None:
        """Print a line on rank 0, above any progress bars."""
        if self._writer is not None:
            progress.write(text)

    def warn(self, text: str) -> None:
        """Print a line on rank 0 that progress.html shows among the warnings."""
        self.print(f'{WARNING}{text}')

    def tick(self, report: TickReport, phase_ms: Mapping[str, float] | None = None) -> None:
        """Print the status line and write all statistics. All ranks must call it.

        phase_ms: milliseconds of the latest execution of each phase, written as Timing/<phase>.
        """
        self.print(report.line())
        self._cur_nimg = report.cur_nimg
        # Reported like losses, so that they pass through float32 and collectors as published.
        timings = {f'Timing/{name}': ms for name, ms in (phase_ms or {}).items()}
        for name, value in {**report.statistics(), **timings}.items():
            self.store.report0(name, value)
        self.collector.update()
        if self._writer is not None:
            self._writer.write(self.collector.as_dict(), report.cur_nimg)

    def write_metrics(self, results: Mapping[str, float], cur_nimg: int) -> None:
        """Show new metric results in TensorBoard and W&B; the metrics write metric-*.jsonl themselves."""
        if self._writer is not None:
            self._writer.write_metrics(results, cur_nimg)

    def save_grid(
        self, name: str, images: np.ndarray | torch.Tensor, drange: tuple[float, float],
        grid: tuple[int, int],
    ) -> None:
        """Write a sample sheet, such as fakes000100.png, to the run directory; see save_image_grid."""
        if self._writer is not None:
            save_image_grid(self.run_dir / name, images, drange, grid)
            if name.startswith('fakes'):
                self._writer.write_sheet(self.run_dir / name, self._cur_nimg)

    def plot(self, state: str = '') -> Path:
        """Draw training_curves.png and fakes_over_time.png and write progress.html from what there is so far;
        returns the path of the curves.

        state: shown on the page, such as why the run has stopped; '' while it trains.  What cannot be written
        costs a line of the log, not the run.
        """
        path = self.run_dir / 'training_curves.png'
        if self._writer is not None:
            self._show(lambda: plot_training_curves(self.run_dir / 'stats.jsonl', path))
            self._show(lambda: write_fakes_over_time(self.run_dir))
            self._show(lambda: write_progress_page(self.run_dir, state))
        return path

    def _show(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (UserError, OSError) as error:
            if str(error) not in self._said:
                self.print(f'Training continues, but {error}')
            self._said.add(str(error))

    def close(self) -> None:
        """Close all files and restore stdout and stderr. May be called repeatedly."""
        if self._writer is not None:
            self._writer.close()
        if self._logger is not None:
            self._logger.close()
        self._writer = self._logger = None


def _json_number(value: float) -> float | None:
    # JSON has neither NaN nor infinities.
    return value if math.isfinite(value) else None


def _end_last_line(path: Path) -> None:
    """Start a new line if a killed process left half of one; readers skip it then."""
    # Opening it would wait for a reader.
    if path.is_fifo():
        raise OSError('not a regular file')
    if not path.is_file() or path.stat().st_size == 0:
        return
    # Only the last byte is read: the file of a long run is large.
    with path.open('rb+') as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b'\n':
            file.write(b'\n')
