# SPDX-License-Identifier: Apache-2.0
"""The training loop: build a run from its configuration, then iterate, report and save."""
import contextlib
import dataclasses
import functools
import io
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.launched import STOPPED
from dnnlib.progress import Progress, progress
from dnnlib.util import UserError, replace_file
from metrics.data_key import training_key
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
from training.guards import NONFINITE_TICKS, DiversityProbe, Guards, nonfinite_weight
from training.iteration import PhaseClock, run_iteration
from training.report.sheet import SampleSheet
from training.report.ticks import TickClock, is_done, kimg_number, snapshot_due, tick_ends
from training.run.folder import RunLock, save_options
from training.run.interrupt import Interrupt
from training.run.log import RunLog
from training.run.manifest import FAKES, Entries
from training.run.resume import BEGINNING, ResumeRequest, missing_metrics, rewind_records
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload, read_state
from training.state import build_state
from training.systems.table import SYSTEMS

ADVICE = '; --resume=latest resumes from the last snapshot'
FINISH_SEC = 20  # for the snapshot that is being written when the run aborts


def train(config: TrainConfig, request: ResumeRequest | None = None) -> None:
    """Train as configured in the existing folder config.run_dir, until config.total_kimg.

    request: the training state to resume from, None for a new run; whether `config` fits it has been checked.
    A run that is asked to stop early saves a training state and exits with status interrupt.STOPPED.

    With config.num_gpus > 1 this is one of that many processes, started by torchrun or distributed.launch().
    Raises UserError for what the user can fix: no such device, an unreadable image, a full disk.
    """
    device = misc.pick_device(config.device)
    custom_ops.set_mode(config.ops)
    with distributed.Group(device, config.num_gpus, config.timeout_sec, ADVICE) as group:
        keep_freed_memory(group.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
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
    saved, entries = None, ()
    if request is not None:
        saved, entries = read_state(request.state_path), request.entries
        saved['extra']['data_key'] = request.data_key
    if distributed.rank() == 0:
        entries = rewind_records(config.run_dir, saved or BEGINNING, entries)
        if request is not None and request.flags is not None:
            save_options(config, request.flags)
    config = config.for_device(device.type)
    # Reduced on the CPU: the values are there already when they are read.
    store = Store(distributed.rank(), torch.device('cpu') if config.num_gpus > 1 else None)
    with Interrupt(config.time_limit_sec) as interrupt, RunLog(
            config.run_dir, rank=distributed.rank(), store=store, wandb=config.wandb) as log:
        return Training(config, device, log, saved, entries).run(interrupt)


class Training:
    """A run in progress: its dataset, state, phases and records.

    saved: content of the training state to resume from, None for a new run.  entries: of the manifest.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, log: RunLog, saved: Mapping[str, Any] | None = None,
        entries: Entries = (),
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
        self.data_key = None if saved is None else saved['extra'].get('data_key')
        if self.data_key is None and distributed.rank() == 0:
            self.data_key = training_key(self.dataset)
        self.phases = SYSTEMS[config.system].phases(config, state.loss, state.G_opt, state.D_opt)
        self.phase_clock = PhaseClock(device)
        self.tick_clock = TickClock(state.cur_nimg, state.elapsed_sec)
        self.start_sec = time.monotonic() - state.elapsed_sec
        self.metrics = self._metrics(config.metrics)
        self.copies = HostCopies()
        self.is_writer = distributed.rank() == 0
        self.writer = SnapshotWriter(
            config.run_dir, config.keep, next(iter(config.metrics), None),
            config.snapshot_formats, entries) if self.is_writer else None
        if self.writer is not None:
            watchdog.HERE.finish = lambda: self.writer.wait_for_files(FINISH_SEC)
        self.sheet = SampleSheet(self.dataset, state.G.z_dim, config.random_seed, device)
        probe = None
        if self.is_writer:
            probe = DiversityProbe(self.sheet.reals, self.sheet.z, self.sheet.c, config.batch_gpu)
        self.guards = Guards(state, self.phases, probe, SYSTEM_FORMS[config.system].unused)
        self.last_snapshot_sec = time.monotonic()
        self.ending = 'ended by an error'  # for the page, unless the run completes

    def run(self, interrupt: Interrupt) -> bool:
        """Iterate until done, or asked to stop, and save everything. Returns whether it is done."""
        is_complete = False
        try:
            self._introduce()
            is_complete = self._run(interrupt)
        finally:
            # Let the background writer finish, also after an error.
            self._finish_writing()
            if not is_complete and self.state.tick > 0:
                self.log.plot(f'{self.ending} at {self.state.cur_nimg / 1000:.1f} kimg')
        if self.writer is not None and self.writer.has_failed:
            raise UserError(f'{self.config.run_dir}: the last snapshot is missing; make room and use '
                            '--resume=latest, which resumes from the previous one')
        self._conclude(is_complete)
        return is_complete

    def _conclude(self, is_complete: bool) -> None:
        """Print what was written where, and what to do next."""
        run_dir = self.config.run_dir
        networks = None if self.writer is None else self.writer.latest_networks()
        names = [name for name in (networks, 'progress.html', 'log.txt') if name]
        next_steps = [] if is_complete else [f'python train.py {shlex.quote(f"--resume={run_dir}")}']
        if networks:
            path = shlex.quote(f'--network={Path(run_dir, networks)}')
            next_steps.append(f'python generate.py {path} --outdir=out --seeds=0-15')
        ending = 'Complete' if is_complete else 'Stopped'
        self.log.print(f'{ending}: {", ".join(names)} and more are in {run_dir}.')
        self.log.print(f'Next: {"; or ".join(next_steps)}')

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
        self._describe_networks()
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
        """Save everything, also within a tick. Raises UserError if a process has no more data."""
        problems = distributed.gather_values(None if batches.error is None else str(batches.error))
        reason = 'an error' if any(problems) else interrupt.reason or 'by another process'
        self._save_at_stop(reason)
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise UserError(f'{problem} (process {rank}); then use --resume=latest')
        self.log.print(f'Stopping at {self.state.cur_nimg / 1000:.1f} kimg as requested ({reason}); '
                       '--resume=latest resumes from here.')

    def _save_at_stop(self, reason: str) -> None:
        """Save the state, the networks and a sheet of samples. All processes call it.

        Counters of snapshots stay as they are, so that the resumed run equals one that was not stopped; the
        long form of the number keeps the names apart from those of later snapshots.
        """
        self.ending = f'stopped ({reason})'
        if self.saved_nimg == self.state.cur_nimg:
            return
        number = kimg_number(self.state.cur_nimg, is_taken=True)
        # Nothing comes before the state: whoever sent the signal may not wait long.
        if not self._save_snapshot(f'network-snapshot-{number}.{self.config.snapshot_formats[0]}'):
            self._stop_as_nonfinite()
        self._save_fakes(f'fakes{number}.png')

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
                self._save_at_stop('an error')
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
        if state.guards.nonfinite >= NONFINITE_TICKS or (done and state.guards.nonfinite):
            self._stop_as_nonfinite()
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
        if self._save_snapshot(name, fakes) and state.metrics_due:
            self._compute_metrics(self.metrics, is_untrained=state.num_snapshots == 1 and not done)

    def _stop_as_nonfinite(self) -> None:
        """Raise UserError that names the last finite snapshot. All processes call it."""
        self._finish_writing()
        last = distributed.broadcast_value(None if self.writer is None else self.writer.latest_state())
        remedy = f'--resume={Path(self.config.run_dir, last)} --allow-changes=1' if last else 'a new run'
        raise UserError(f'{nonfinite_weight(self.state)} is not finite and will not become so again; use '
                        f'{remedy} with a lower --glr and --dlr or a higher --gamma')

    def _save_snapshot(self, networks_name: str, fakes: str = '') -> bool:
        """Start to write the state and the networks. All processes call it. Returns whether all is finite: a
        broken snapshot must not push out one that can be resumed from.
        """
        state, config = self.state, self.config
        distributed.note_phase('snapshot')
        broken = nonfinite_weight(state)
        if broken is not None:
            self.log.warn(f'Snapshot not saved: {broken} is not finite. Training stops after '
                          f'{NONFINITE_TICKS} ticks in a row of this.')
            return False
        state.elapsed_sec = time.monotonic() - self.start_sec
        saved = state.state_dict()
        check_agreement(saved['run'])
        self.saved_nimg = state.cur_nimg
        if self.writer is None:
            return True
        # The memory of the former copies is used again, once they are on the disk.
        self.writer.wait()
        copies = self.copies
        copies.begin()
        # Snapshots are published: the name of the dataset suffices, the path is in training_options.json.
        data = {'class_name': 'training.dataset.ImageFolderDataset', **config.data.kwargs(),
                'path': os.path.basename(os.path.normpath(config.data.path))}
        modules = {'G': state.G, 'D': state.D, 'G_ema': state.G_ema, 'augment_pipe': state.augment_pipe}
        networks = copy_networks(copies, modules, data)
        saved['extra']['data_key'] = self.data_key
        payload = make_payload(config.to_options(), **saved)
        others = {FAKES: fakes} if fakes and (self.log.run_dir / fakes).is_file() else {}
        self.writer.save(Snapshot(
            state.cur_nimg, copies.tree(payload), copies, networks, networks_name, others))
        return True

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

    def _describe_networks(self) -> None:
        """Write tables of G and D, made on meta copies, so that no network sees the placeholder batch."""
        if not self.is_writer:
            return
        n, G, D = self.config.batch_gpu, _without_memory(self.state.G), _without_memory(self.state.D)
        z, c = torch.empty([n, G.z_dim], device='meta'), torch.empty([n, G.c_dim], device='meta')
        tables = io.StringIO()
        with contextlib.redirect_stdout(tables):
            misc.print_module_summary(D, [misc.print_module_summary(G, [z, c]), c])
        with replace_file(self.log.run_dir / 'networks.txt') as temporary:
            temporary.write_text(tables.getvalue(), encoding='utf-8')
        if self.config.verbose:
            self.log.print(tables.getvalue())


def _without_memory(module: torch.nn.Module) -> torch.nn.Module:
    """The same network on the meta device, for shapes only."""
    with torch.device('meta'):
        return type(module)(*module.init_args, **module.init_kwargs).train()
