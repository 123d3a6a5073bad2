# SPDX-License-Identifier: Apache-2.0
"""The training loop: build a run from its configuration, then iterate, and at the end of each tick report and
save.
"""
import time
from collections.abc import Iterator

import numpy as np
import torch

from dnnlib.progress import Progress, progress
from dnnlib.util import UserError
from metrics.training_metrics import TrainingMetrics
from torch_utils import distributed, misc
from torch_utils.training_stats import Store
from training.batches import Batches, draw_labels
from training.checkpoint import save_network_snapshot
from training.config import TrainConfig
from training.dataset import ImageFolderDataset
from training.guards import DiversityProbe, Guards
from training.iteration import PhaseClock, phases_of, run_iteration
from training.memory import fit_to_memory
from training.run_log import (
    RunLog,
    TickClock,
    grid_indices,
    grid_size,
    is_done,
    kimg_number,
    snapshot_due,
    tick_ends,
)
from training.state import build_state, pick_device, seed_iteration

CPU_GRID_IMAGES = 240  # the published sheet of 1,024 small pictures would take a CPU as long as a tick


def train(config: TrainConfig) -> None:
    """Train as configured in the existing folder config.run_dir, until config.total_kimg.

    With config.num_gpus > 1 this is one of so many processes, started by torchrun or distributed.launch().
    Raises UserError for what the user can mend: no such device, a picture that cannot be read, a full disk.
    """
    device = pick_device(config.device)
    if config.num_gpus > 1:
        device = distributed.join(device.type)
    store = Store(distributed.rank(), device if config.num_gpus > 1 else None)
    with RunLog(config.run_dir, rank=distributed.rank(), store=store, wandb=config.wandb) as log:
        Training(config.for_device(device.type), device, log).run()
    distributed.leave()


class Training:
    """A run in progress: its dataset, state, phases and records."""

    def __init__(self, config: TrainConfig, device: torch.device, log: RunLog):
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.config, self.device, self.log = config, device, log
        self.dataset = ImageFolderDataset(**config.data.kwargs())
        self.state = build_state(
            config, self.dataset.label_dim, self.dataset.num_channels, device, log.store.report)
        self.phases = phases_of(self.state, config)
        self.phase_clock = PhaseClock(device)
        self.tick_clock = TickClock(self.state.cur_nimg)
        self.metrics = TrainingMetrics(config.metrics, self.dataset, config.run_dir)
        self.is_writer = distributed.rank() == 0
        self.sheet = Sheet(self.dataset, self.state.G.z_dim, config.random_seed, device)
        self.guards = Guards(self.state, self.phases, self._diversity_probe())
        self.num_snapshots, self.last_snapshot_sec = 0, time.monotonic()

    def run(self) -> None:
        """Iterate until done; the last tick saves everything."""
        processes = f'{distributed.world_size()} x ' if distributed.world_size() > 1 else ''
        self.log.print(f'Training on {processes}{_device_name(self.device)}, {len(self.dataset)} pictures.')
        self.config = fit_to_memory(self.state, self.phases, self.config, self.log.print)
        self._print_summaries()
        self.log.save_grid('reals.png', self.sheet.reals, (0, 255), self.sheet.size)
        self._save_fakes('fakes_init.png')
        config, state, tick, tick_start_nimg = self.config, self.state, 0, self.state.cur_nimg
        with progress(
            total=config.total_kimg * 1000, initial=state.cur_nimg, desc='Training', unit='img',
            show=self.is_writer) as bar:
            batches = self._batches()
            self.tick_clock.start_tick(state.cur_nimg)
            while True:
                self._iterate(batches)
                bar.update(config.batch_size)
                if not tick_ends(
                    state.cur_nimg, tick, tick_start_nimg, config.total_kimg, config.kimg_per_tick):
                    continue
                done = is_done(state.cur_nimg, config.total_kimg)
                self._end_tick(tick, done, bar)
                if done:
                    return
                tick, tick_start_nimg = tick + 1, state.cur_nimg
                self.tick_clock.start_tick(state.cur_nimg)

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config = self.config
        return iter(Batches(
            self.dataset, config.batch_size // distributed.world_size(), self.device,
            start=self.state.cur_nimg,
            seed=config.random_seed, rank=distributed.rank(), num_replicas=distributed.world_size(),
            cache=config.data.cache, num_workers=config.data.num_workers))

    def _iterate(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One iteration; all its randomness follows from (seed, rank, cur_nimg)."""
        with self.tick_clock.waiting_for_data():
            real = next(batches)
        rng = seed_iteration(self.config.random_seed, distributed.rank(), self.state.cur_nimg)
        run_iteration(
            self.state, self.phases, real, lambda n: draw_labels(self.dataset, n, rng), self.config,
            self.phase_clock)

    def _end_tick(self, tick: int, done: bool, bar: Progress) -> None:
        """Report the tick, then save pictures, networks and metrics as far as they are due."""
        config, state = self.config, self.state
        report = self.tick_clock.end_tick(tick, state.cur_nimg, state.augment_p, self.device)
        self.log.tick(report, self.phase_clock.milliseconds())
        if state.ada is not None and (warning := state.ada.warning(state.augment_p, state.cur_nimg)):
            self.log.warn(warning)
        for line in self.guards.tick(self.log.collector.mean, report.augment):
            self.log.warn(line)
        minutes = (time.monotonic() - self.last_snapshot_sec) / 60
        images, networks = [
            snapshot_due(tick, done, every, config.snapshot_minutes, minutes)
            for every in (config.image_snapshot_ticks, config.network_snapshot_ticks)]
        if images:
            bar.set_postfix_str('sample sheet')
            self._save_fakes(f'fakes{kimg_number(state.cur_nimg)}.png')
        if networks and self.is_writer:
            bar.set_postfix_str('snapshot')
            self._save_networks(f'network-snapshot-{kimg_number(state.cur_nimg)}.pkl', done)
        if images or networks:
            self.last_snapshot_sec = time.monotonic()
            self.log.plot()
        bar.set_postfix_str(f'tick {tick}, augment {report.augment:.2f}')

    def _diversity_probe(self) -> DiversityProbe | None:
        return self.sheet.diversity_probe(self.config.batch_gpu) if distributed.rank() == 0 else None

    def _save_fakes(self, name: str) -> None:
        if not self.is_writer:
            return
        self.log.save_grid(
            name, self.sheet.fakes(self.state.G_ema, self.config.batch_gpu), (-1, 1), self.sheet.size)

    def _save_networks(self, name: str, done: bool) -> None:
        """Write a snapshot and compute the metrics of the networks in it. A failure costs the snapshot, not
        the run.
        """
        state, path = self.state, self.log.run_dir / name
        data = {'class_name': 'training.dataset.ImageFolderDataset', **self.config.data.kwargs()}
        try:
            save_network_snapshot(
                path, G=state.G, D=state.D, G_ema=state.G_ema, augment_pipe=state.augment_pipe,
                training_set_kwargs=data)
        except UserError as error:
            self.log.warn(f'Snapshot not saved, training goes on: {error}')
            return
        if self.num_snapshots % self.config.metrics_every == 0 or done:
            results = self.metrics.compute(state.G_ema, self.device, str(path), self.log.print)
            self.log.write_metrics(results, state.cur_nimg)
        self.num_snapshots += 1

    def _print_summaries(self) -> None:
        """Tables of G and D, made on copies without memory, so that no network sees the made-up batch."""
        if distributed.rank() != 0:
            return
        n, G, D = self.config.batch_gpu, _without_memory(self.state.G), _without_memory(self.state.D)
        z, c = torch.empty([n, G.z_dim], device='meta'), torch.empty([n, G.c_dim], device='meta')
        img = misc.print_module_summary(G, [z, c])
        misc.print_module_summary(D, [img, c])


class Sheet:
    """The contact sheet of a run: training pictures, and generated ones from fixed latents with the same
    labels.

    size: (columns, rows).  reals: uint8 [columns * rows, C, H, W].
    """

    def __init__(self, dataset: ImageFolderDataset, z_dim: int, seed: int, device: torch.device):
        limit = CPU_GRID_IMAGES if device.type == 'cpu' else None
        self.size = grid_size(dataset.height, dataset.width, limit)
        raw_labels = [
            dataset.get_details(i).raw_label for i in range(len(dataset))] if dataset.has_labels else None
        reals, labels = zip(
            *[dataset[i] for i in grid_indices(len(dataset), self.size, raw_labels)], strict=True)
        self.reals = np.stack(reals)
        generator = torch.Generator().manual_seed(seed)
        self._z = torch.randn([len(reals), z_dim], generator=generator).to(device)
        self._c = torch.from_numpy(np.stack(labels)).to(device)

    def diversity_probe(self, batch: int) -> DiversityProbe:
        """What measures how much the pictures of this sheet differ from each other."""
        return DiversityProbe(self.reals, self._z, self._c, batch)

    def fakes(self, G_ema: torch.nn.Module, batch: int) -> torch.Tensor:
        """Generated pictures float32 [columns * rows, C, H, W] on the CPU."""
        with torch.inference_mode():
            return torch.cat([
                G_ema(z, c, noise_mode='const').cpu()
                for z, c in zip(self._z.split(batch), self._c.split(batch), strict=True)])


def _without_memory(module: torch.nn.Module) -> torch.nn.Module:
    """The same network on the meta device, for shapes only."""
    with torch.device('meta'):
        return type(module)(*module.init_args, **module.init_kwargs).train()


def _device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'the CPU ({torch.get_num_threads()} threads)'
