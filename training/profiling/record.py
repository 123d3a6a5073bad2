# SPDX-License-Identifier: Apache-2.0
"""One training step under the profiler: a run built for profiling, and the record of its kernels."""
import copy
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from dnnlib.progress import progress
from dnnlib.util import replace_file
from torch_utils.misc import convolutions_in_tf32, set_gpu_arithmetic
from training import networks
from training.batches import draw_labels
from training.capacity.count import Work
from training.capacity.speed import measure_speed
from training.config import DatasetInfo, TrainConfig, resolve
from training.dataset import Dataset
from training.iteration import PhaseClock, run_iteration
from training.loss import StyleGAN2Loss
from training.phases import lazy_adam
from training.profiling import MICRO, labels
from training.profiling.trace import Naming, ProfiledKernel, Trace, naming_of
from training.state import TrainingState, build_state
from training.systems.micro import RESOLUTION, MicroGenerator
from training.systems.table import SYSTEMS

MICRO_BATCH = 16
WARMUPS, TIMED_STEPS = 2, 3  # before the recorded step
# A matrix product (0) and convolutions with these numbers of feature maps; the fastest gives the peak.
PEAK_WIDTHS = {'cpu': (0, 64), 'cuda': (0, 64, 512)}
PEAK_BATCH, PEAK_ROUNDS = 64, 2
DTYPES = {'float': torch.float32, 'c10::Half': torch.float16, 'c10::BFloat16': torch.bfloat16}
Pixels = tuple[torch.Tensor, torch.Tensor]  # uint8 [N, C, H, W] and labels, on the host


@dataclass(frozen=True)
class PhaseInfo:
    """A phase of the step.  network: the one it trains.  interval: runs in every interval-th iteration."""

    name: str
    network: str
    interval: int


@dataclass(frozen=True)
class StepRecord:
    """Measurements of one step in which every phase ran.

    step_us: duration with the profiler.  plain_step_us: without.  on_gpu: whether kernels are GPU kernels;
    otherwise they are CPU operations.  naming: names the places of kernels.
    peaks: floating-point operations per second of the device, by element type as in ProfiledKernel.dtype.
    """

    kernels: list[ProfiledKernel]
    step_us: float
    plain_step_us: float
    on_gpu: bool
    phases: list[PhaseInfo]
    naming: Naming
    peaks: dict[str, float]


class ProfiledRun:
    """A training run at its start, advanced by step().

    dataset: None for random images.  is_micro: with the generator of training.systems.micro.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, *, channels: int = 3, dataset: Dataset | None = None,
        is_micro: bool = False,
    ):
        set_gpu_arithmetic(config.cudnn_benchmark, config.allow_tf32)
        self.config, self.device, self.dataset = config.for_device(device.type), device, dataset
        self.channels = channels if dataset is None else dataset.num_channels
        self.system = getattr(config, 'system', 'stylegan2')
        if is_micro:
            self.state = micro_state(self.config, self.channels, device)
        else:
            self.state = build_state(
                self.config, 0 if dataset is None else dataset.label_dim, self.channels, device)
        state = self.state
        self.phases = SYSTEMS[self.config.system].phases(self.config, state.loss, state.G_opt, state.D_opt)
        self._random = np.random.default_rng(0)

    def pixels(self) -> Pixels:
        """The next batch, in host memory, pinned for a GPU."""
        n = self.config.batch_size
        if self.dataset is None:
            shape = [n, self.channels, *self.config.data.size]
            images = self._random.integers(256, size=shape, dtype=np.uint8)
            batch = torch.from_numpy(images), torch.zeros([n, 0])
        else:
            first = self.state.cur_nimg
            items = [self.dataset[(first + i) % len(self.dataset)] for i in range(n)]
            images, labels = [torch.from_numpy(np.stack(part)) for part in zip(*items, strict=True)]
            batch = images, labels
        return tuple(t.pin_memory() for t in batch) if self.device.type == 'cuda' else batch

    def step(self, real: Pixels, clock: PhaseClock, *, all_phases: bool = False) -> None:
        """One iteration.  real: a batch on the device.  all_phases: run also phases that are not due."""
        if all_phases:
            self.state.batch_idx = 0
        img, labels = real
        run_iteration(
            self.state, self.phases, (img.to(torch.float32) / 127.5 - 1, labels),
            self._labels, self.config, clock)

    def whole_step(self, clock: PhaseClock) -> float:
        """Copy a batch to the device and run every phase; returns seconds."""
        batch = self.pixels()
        start = time.perf_counter()
        with labels.label(labels.STEP):
            with labels.label(labels.DATA):
                real = tuple(t.to(self.device, non_blocking=True) for t in batch)
            self.step(real, clock, all_phases=True)
            self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def phase_infos(self) -> list[PhaseInfo]:
        """The phases in order."""
        return [PhaseInfo(p.name, 'G' if p.module is self.state.G else 'D', p.interval) for p in self.phases]

    def _labels(self, count: int, rng: np.random.Generator) -> torch.Tensor:
        return torch.zeros([count, 0]) if self.dataset is None else draw_labels(self.dataset, count, rng)


def record_step(run: ProfiledRun, trace: str | os.PathLike | None = None) -> StepRecord:
    """Profile one step after warm-up steps.  trace: file for Chrome's trace viewer, or None."""
    clock = labels.LabelClock(run.device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (run.device.type == 'cuda')]
    with progress(total=WARMUPS + TIMED_STEPS + 2, desc='Profiling', unit='step') as bar:
        times = []
        for _ in range(WARMUPS + TIMED_STEPS):
            times.append(run.whole_step(clock))
            bar.update(1)
        networks_of = {'G': run.state.G, 'D': run.state.D}
        if run.state.augment_pipe is not None:
            networks_of['augment_pipe'] = run.state.augment_pipe
        with labels.labelled(networks_of, run.phases):
            # The first calls with labels take longer.
            run.whole_step(clock)
            bar.update(1)
            with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
                run.whole_step(clock)
            bar.update(1)
    if trace is not None:
        with replace_file(trace) as temporary:
            profiler.export_chrome_trace(str(temporary))
    read = Trace(profiler.events())
    kernels, infos = read.kernels(), run.phase_infos()
    return StepRecord(
        kernels, read.step_us, sorted(times[WARMUPS:])[TIMED_STEPS // 2] * 1e6, read.on_gpu, infos,
        naming_of(run.system, {info.name: info.network for info in infos}), measure_peaks(run, kernels))


def measure_peaks(run: ProfiledRun, kernels: list[ProfiledKernel]) -> dict[str, float]:
    """Peak rate of the device per element type of the convolutions; takes about a second each."""
    peaks = {}
    for name in {kernel.dtype for kernel in kernels if kernel.convolution} & set(DTYPES):
        work = Work(flop={(DTYPES[name], width): 1.0 for width in PEAK_WIDTHS[run.device.type]})
        speeds = [measure_speed(
            work, run.device, PEAK_BATCH, cudnn_benchmark=run.config.cudnn_benchmark,
            allow_tf32=convolutions_in_tf32(run.config.allow_tf32)) for _ in range(PEAK_ROUNDS)]
        peaks[name] = max(max(speed.flop_per_sec.values()) for speed in speeds)
    return peaks


def micro_config(flags: dict[str, object]) -> TrainConfig:
    """--cfg=micro: 16x16 images, batch 16, no augmentation, the discriminator and schedule of demo.

    flags: options of train.py that override it.
    """
    info = DatasetInfo(MICRO, 10000, RESOLUTION, RESOLUTION, 3)
    return resolve({'batch': MICRO_BATCH, 'aug': 'noaug', **flags, 'cfg': 'demo', 'data': MICRO}, info)


def micro_state(config: TrainConfig, channels: int, device: torch.device) -> TrainingState:
    """A training state of the micro generator and the discriminator of the configuration."""
    torch.manual_seed(config.random_seed)
    D = networks.Discriminator(
        **config.D_kwargs(), c_dim=0, img_resolution=config.data.resolution, img_channels=channels)
    G, D = [network.train().requires_grad_(requires_grad=False).to(device)
            for network in (MicroGenerator(channels), D)]
    return TrainingState(
        G=G, D=D, G_ema=copy.deepcopy(G).eval(), augment_pipe=None, ada=None,
        G_opt=lazy_adam(list(G.parameters()), **config.G_opt.kwargs(), interval=config.G_reg_interval),
        D_opt=lazy_adam(list(D.parameters()), **config.D_opt.kwargs(), interval=config.D_reg_interval),
        loss=StyleGAN2Loss(G, D, **config.loss.kwargs(), report=_no_report))


def _no_report(name: str, values: torch.Tensor) -> None:
    """Stands in for the statistics of a run."""


