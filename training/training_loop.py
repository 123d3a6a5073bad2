# SPDX-License-Identifier: Apache-2.0
"""The training loop: build a run from its configuration, then iterate, report and save."""
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dnnlib.progress import Progress, progress
from dnnlib.util import UserError
from metrics.metric_utils import all_processes
from metrics.training_metrics import TrainingMetrics
from torch_utils import custom_ops, distributed, misc
from torch_utils.misc import keep_freed_memory
from torch_utils.processes import watchdog
from torch_utils.processes.consistency import check_agreement
from torch_utils.training_stats import Store
from training.accelerate import use_graphs
from training.batches import AHEAD, Batches, Lookahead, draw_labels
from training.capacity.memory import compile_kernels, fit_to_memory
from training.config import TrainConfig
from training.config.systems import SYSTEM_FORMS
from training.dataset import ImageFolderDataset
from training.formats.pickled import HostCopies, copy_networks
from training.guards import DiversityProbe, Guards
from training.iteration import PhaseClock, run_iteration
from training.report.sheet import SampleSheet
from training.report.ticks import TickClock, is_done, kimg_number, snapshot_due, tick_ends
from training.run.folder import RunLock
from training.run.interrupt import STOPPED, Interrupt
from training.run.log import RunLog
from training.run.manifest import FAKES
from training.run.resume import ResumeRequest, missing_metrics, open_state, rewind_records
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload
from training.state import build_state
from training.systems.table import SYSTEMS

ADVICE = '; --resume=latest resumes from the last snapshot'
FINISH_SEC = 20  # for the snapshot that is being written when the run aborts


def train(config: TrainConfig, request: ResumeRequest | None = None) -> None:
    """Train as configured in the existing folder config.run_dir, until config.total_kimg.

    request: the training state to resume from, None for a new run. A run that is asked to stop early saves a
    training state and exits with status interrupt.STOPPED.

    With config.num_gpus > 1 this is one of that many processes, started by torchrun or distributed.launch().
    Raises UserError for what the user can fix: no such device, an unreadable image, a full disk.
    """
    device = misc.pick_device(config.device)
    custom_ops.set_mode(config.ops)
    with distributed.Group(device, config.num_gpus, config.timeout_sec, ADVICE) as group:
        keep_freed_memory(group.device)
        is_first = distributed.rank() == 0
        # Locked before anything in the run directory changes.
        with RunLock(config.run_dir) if is_first else contextlib.nullcontext() as lock:
            if is_first and lock.note is not None:
                print(f'Note: {lock.note}')
            is_complete = _train(config, group.device, request)
    if not is_complete:
        sys.exit(STOPPED)


def _train(config: TrainConfig, device: torch.device, request: ResumeRequest | None) -> bool:
    """Train on a device, as one process of the group. Returns whether the run is done."""
    config, saved = config.for_device(device.type), None
    if request is not None:
        config, saved = open_state(request, config)
        if distributed.rank() == 0:
            rewind_records(config.run_dir, saved)
    # Reduced on the CPU: the values are there already when they are read.
    store = Store(distributed.rank(), torch.device('cpu') if config.num_gpus > 1 else None)
    with Interrupt(config.time_limit_sec) as interrupt, RunLog(
            config.run_dir, rank=distributed.rank(), store=store, wandb=config.wandb) as log:
        return Training(config, device, log, saved).run(interrupt)


class Training:
    """A run in progress: its dataset, state, phases and records.

    saved: content of the training state to resume from, None for a new run.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, log: RunLog, saved: Mapping[str, Any] | None = None,
    ):
        misc.set_gpu_arithmetic(config.cudnn_benchmark, config.allow_tf32)
        self.config, self.device, self.log, self.is_resumed = config, device, log, saved is not None
        self.dataset = ImageFolderDataset(**config.data.kwargs())
        # Weights that the training state replaces need not be fetched.
        fresh = config if saved is None else dataclasses.replace(config, resume_pkl=None)
        state = self.state = build_state(
            fresh, self.dataset.label_dim, self.dataset.num_channels, device, log.store)
        if saved is not None:
            state.load_state_dict(saved)
        self.saved_nimg = -1 if saved is None else state.cur_nimg  # of the last training state
        self.phases = SYSTEMS[config.system].phases(config, state.loss, state.G_opt, state.D_opt)
        self.phase_clock = PhaseClock(device)
        self.tick_clock = TickClock(state.cur_nimg, state.elapsed_sec)
        self.start_sec = time.monotonic() - state.elapsed_sec
        self.metrics = self._metrics(config.metrics)
        self.copies = HostCopies()
        self.is_writer = distributed.rank() == 0
        self.writer = SnapshotWriter(
            config.run_dir, config.keep, next(iter(config.metrics), None),
            config.snapshot_formats) if self.is_writer else None
        if self.writer is not None:
            watchdog.HERE.finish = lambda: self.writer.wait_for_files(FINISH_SEC)
        self.sheet = SampleSheet(self.dataset, state.G.z_dim, config.random_seed, device)
        probe = None
        if self.is_writer:
            probe = DiversityProbe(self.sheet.reals, self.sheet.z, self.sheet.c, config.batch_gpu)
        self.guards = Guards(state, self.phases, probe, SYSTEM_FORMS[config.system].unused)
        self.last_snapshot_sec = time.monotonic()

    def run(self, interrupt: Interrupt) -> bool:
        """Iterate until done, or asked to stop, and save everything. Returns whether it is done."""
        try:
            self._introduce()
            is_complete = self._run(interrupt)
        finally:
            # Let the background writer finish, also after an error.
            self._finish_writing()
        if self.writer is not None and self.writer.has_failed:
            raise UserError(f'{self.config.run_dir}: the last snapshot is missing; make room and use '
                            '--resume=latest, which resumes from the previous one')
        return is_complete

    def _introduce(self) -> None:
        """Print what is trained; then write the first sample sheets or, if resumed, catch up with metrics."""
        processes = f'{distributed.world_size()} x ' if distributed.world_size() > 1 else ''
        self.log.print(f'Training on {processes}{misc.device_name(self.device)}, {len(self.dataset)} images.')
        compile_kernels(self.state, self.phases, self.config, self.device)
        self.config = fit_to_memory(self.state, self.phases, self.config, self.log.print)
        use_graphs(self.state, self.phases, self.config, self.device, self.log.warn)
        if self.is_resumed:
            done = is_done(self.state.cur_nimg, self.config.total_kimg)
            self.log.print(f'Resuming from {self.state.cur_nimg / 1000:.1f} kimg, tick {self.state.tick}.' + (
                ' This run is complete: a higher --kimg makes it longer.' if done else ''))
            self._catch_up_metrics()
            return
        self._print_summaries()
        self.log.save_grid('reals.png', self.sheet.reals, (0, 255), self.sheet.size)
        self._save_fakes('fakes_init.png')

    def _run(self, interrupt: Interrupt) -> bool:
        """Iterate until done, or asked to stop. Returns whether it is done."""
        config, state = self.config, self.state
        labels = functools.partial(draw_labels, self.dataset)
        batches = Lookahead(self._batches(), AHEAD if distributed.world_size() > 1 else 0)
        with progress(
            total=config.total_kimg * 1000, initial=state.cur_nimg, desc='Training', unit='img',
            show=self.is_writer) as bar:
            self.tick_clock.start_tick(state.cur_nimg)
            while not is_done(state.cur_nimg, config.total_kimg):
                distributed.note_phase('data')
                with self.tick_clock.waiting_for_data():
                    real = self._next_batch(batches)
                run_iteration(state, self.phases, real, labels, config, self.phase_clock)
                bar.update(config.batch_size)
                if tick_ends(state.cur_nimg, state.tick, state.tick_start_nimg,
                             config.total_kimg, config.kimg_per_tick):
                    self._end_tick(bar)
                    self.tick_clock.start_tick(state.cur_nimg)
                is_asked = interrupt.should_stop(batches.error is not None)
                if is_asked and not is_done(state.cur_nimg, config.total_kimg):
                    self._stop(interrupt, batches)
                    return False
        return True

    def _stop(self, interrupt: Interrupt, batches: Lookahead) -> None:
        """Save the state, also within a tick. Raises UserError if a process has no more data."""
        if self.saved_nimg != self.state.cur_nimg:
            self._save_snapshot()
        problems = distributed.gather_values(None if batches.error is None else str(batches.error))
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise UserError(f'{problem} (process {rank}); then use --resume=latest')
        self.log.print(f'Stopping at {self.state.cur_nimg / 1000:.1f} kimg as requested '
                       f'({interrupt.reason or "by another process"}); --resume=latest resumes from here.')

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config = self.config
        return iter(Batches(
            self.dataset, config.batch_size // distributed.world_size(), self.device,
            start=self.state.cur_nimg,
            seed=config.random_seed, rank=distributed.rank(), num_replicas=distributed.world_size(),
            cache=config.data.cache, num_workers=config.data.num_workers))

    def _next_batch(self, batches: Lookahead) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return batches.take()
        except UserError as error:
            # Save first: nothing is lost. Several processes have agreed to stop before, or hardly begun.
            if distributed.world_size() == 1 and self.state.cur_nimg > 0:
                if self.saved_nimg != self.state.cur_nimg:
                    self._save_snapshot()
                raise UserError(f'{error}; then use --resume=latest') from error
            raise

    def _end_tick(self, bar: Progress) -> None:
        """Report the tick, then save sample sheets, networks and metrics as far as they are due."""
        distributed.note_phase('tick')
        config, state, tick = self.config, self.state, self.state.tick
        done = is_done(state.cur_nimg, config.total_kimg)
        report = self.tick_clock.end_tick(tick, state.cur_nimg, state.augment_p, self.device)
        self.log.tick(report, self.phase_clock.milliseconds())
        if state.ada is not None and (warning := state.ada.warning(state.augment_p, state.cur_nimg)):
            self.log.warn(warning)
        for line in self.guards.tick(self.log.collector.mean, report.augment):
            self.log.warn(line)
        # What is saved from here on belongs to the next tick.
        state.tick, state.tick_start_nimg = tick + 1, state.cur_nimg
        minutes = (time.monotonic() - self.last_snapshot_sec) / 60
        images, networks = [
            distributed.broadcast_value(snapshot_due(tick, done, every, config.snapshot_minutes, minutes))
            for every in (config.image_snapshot_ticks, config.network_snapshot_ticks)]
        number = self._number() if images or networks else ''
        fakes = f'fakes{number}.png' if images else ''
        if images:
            bar.set_postfix_str('sample sheet')
            self._save_fakes(fakes)
        if networks:
            bar.set_postfix_str('snapshot')
            self._save_networks(f'network-snapshot-{number}.{config.snapshot_formats[0]}', fakes, done)
        if images or networks:
            self.last_snapshot_sec = time.monotonic()
            self.log.plot()
        self._report_problems()
        bar.set_postfix_str(f'tick {tick}, augment {report.augment:.2f}')

    def _number(self) -> str:
        """The number in names of files written now, unique also within a kimg."""
        nimg, before = self.state.cur_nimg, self.state.named_nimg
        self.state.named_nimg = nimg
        return kimg_number(nimg, is_taken=before >= 0 and kimg_number(before) == kimg_number(nimg))

    def _save_fakes(self, name: str) -> None:
        """Write a sheet of fake images. A failure costs the sheet, not the run."""
        if not self.is_writer:
            return
        distributed.note_phase('sample sheet')
        try:
            self.log.save_grid(
                name, self.sheet.fakes(self.state.G_ema, self.config.batch_gpu), (-1, 1), self.sheet.size)
        except UserError as error:
            self.log.warn(f'Sample sheet not saved, training continues: {error}')

    def _save_networks(self, name: str, fakes: str, done: bool) -> None:
        """Start to write a snapshot and, meanwhile, compute metrics. All processes call it."""
        state = self.state
        is_metric_time = state.num_snapshots % self.config.metrics_every == 0 or done
        state.metrics_due = name if is_metric_time else ''
        state.num_snapshots += 1
        self._save_snapshot(name, fakes)
        if state.metrics_due:
            self._compute_metrics(self.metrics, is_untrained=state.num_snapshots == 1 and not done)

    def _save_snapshot(self, networks_name: str = '', fakes: str = '') -> None:
        """Start to write the state and, with a name for them, the networks. All processes call it."""
        state, config = self.state, self.config
        distributed.note_phase('snapshot')
        state.elapsed_sec = time.monotonic() - self.start_sec
        saved = state.state_dict()
        check_agreement(saved['run'])
        self.saved_nimg = state.cur_nimg
        if self.writer is None:
            return
        # The memory of the former copies is used again, once they are on the disk.
        self.writer.wait()
        copies = self.copies
        copies.begin()
        # Snapshots are published: the name of the dataset suffices, the path is in training_options.json.
        data = {'class_name': 'training.dataset.ImageFolderDataset', **config.data.kwargs(),
                'path': os.path.basename(os.path.normpath(config.data.path))}
        modules = {'G': state.G, 'D': state.D, 'G_ema': state.G_ema, 'augment_pipe': state.augment_pipe}
        networks = copy_networks(copies, modules, data) if networks_name else None
        payload = make_payload(config.to_options(), **saved)
        others = {FAKES: fakes} if fakes and (self.log.run_dir / fakes).is_file() else {}
        self.writer.save(Snapshot(
            state.cur_nimg, copies.tree(payload), copies, networks, networks_name, others))

    def _metrics(self, names: Sequence[str]) -> TrainingMetrics:
        return TrainingMetrics(names, self.dataset, self.config.run_dir, share=all_processes(),
                               detector_dir=self.config.detector_dir, cuda_graphs=self.config.cuda_graphs)

    def _compute_metrics(self, metrics: TrainingMetrics, is_untrained: bool = False) -> None:
        """Compute metrics of the networks saved last. All processes call it and share the work."""
        distributed.note_phase('metrics')
        state = self.state
        path = self.log.run_dir / state.metrics_due
        results = metrics.compute(state.G_ema, self.device, str(path), self.log.print, is_untrained)
        if self.writer is not None:
            self.log.write_metrics(results, state.cur_nimg)
            self.writer.add_results(state.cur_nimg, results)

    def _catch_up_metrics(self) -> None:
        """Compute the metrics of the last snapshot that a kill prevented."""
        state = self.state
        names = self.config.metrics if state.metrics_due else ()
        missing = distributed.broadcast_value(missing_metrics(self.config.run_dir, names, state.metrics_due))
        if missing:
            self._compute_metrics(self._metrics(missing), is_untrained=state.num_snapshots == 1)

    def _finish_writing(self) -> None:
        if self.writer is not None:
            self.writer.wait()
            self._report_problems()

    def _report_problems(self) -> None:
        for line in self.writer.take_problems() if self.writer is not None else ():
            self.log.warn(line)

    def _print_summaries(self) -> None:
        """Print tables of G and D, made on meta copies, so that no network sees the placeholder batch."""
        if distributed.rank() != 0:
            return
        n, G, D = self.config.batch_gpu, _without_memory(self.state.G), _without_memory(self.state.D)
        z, c = torch.empty([n, G.z_dim], device='meta'), torch.empty([n, G.c_dim], device='meta')
        img = misc.print_module_summary(G, [z, c])
        misc.print_module_summary(D, [img, c])


def _without_memory(module: torch.nn.Module) -> torch.nn.Module:
    """The same network on the meta device, for shapes only."""
    with torch.device('meta'):
        return type(module)(*module.init_args, **module.init_kwargs).train()
