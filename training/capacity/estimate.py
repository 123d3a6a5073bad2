# SPDX-License-Identifier: Apache-2.0
"""How much memory and time a training will take, before it starts.

The phases of an iteration run once on networks without content while their operations are counted; a short
measurement of the device turns the count into time.
"""
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dnnlib.resolution import levels_of
from dnnlib.util import format_time
from torch_utils.misc import convolutions_in_tf32
from training import augment
from training.capacity.count import Counter, Work
from training.capacity.memory import smaller_batches
from training.capacity.speed import measure_speed, relative_speed
from training.config import TrainConfig
from training.loss import MicroBatch
from training.phases import Phase
from training.systems.table import SYSTEMS

GB, TERA, FLOAT_BYTES = 1e9, 1e12, 4
# Of a process that has torch loaded: measured on a CPU; on a GPU the context and workspaces of cuDNN, not.
PROCESS_BYTES = {'cpu': 0.4 * GB, 'cuda': 1.0 * GB}
SLACK = 1.1  # allocators round up and keep holes
ADAM_ACCESSES, EMA_ACCESSES = 7, 3  # of each parameter: itself, gradient and moments; itself and its average
AUGMENT_SIDE = 128  # pixels of the picture that the augmentation is counted on, at most
HALF_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}  # by --precision
SLOW_HALF = 0.9  # of the speed of float32: 16 bits that are slower than this are worth a word


@dataclass(frozen=True)
class Estimate:
    """Of a training: memory_bytes, at most at once, on each device; flop_per_kimg over all devices;
    sec_per_kimg, None if the device was not measured.
    """

    memory_bytes: float
    flop_per_kimg: float
    sec_per_kimg: float | None = None


def describe(config: TrainConfig, label_dim: int, channels: int) -> list[str]:
    """Lines for --dry-run: memory, speed, and, if memory is short, the --batch-gpu that fits.

    label_dim, channels: of the dataset, label_dim as used. Takes some seconds, mostly for the count.
    """
    device = local_device(config)
    if device is not None:
        config = config.for_device(device.type)
    result = estimate(config, label_dim, channels, device)
    available = None if device is None else device_memory(device)
    lines = [_memory_line(config, result, available), _speed_line(config, result)]
    if available is not None and result.memory_bytes > available:
        lines.append(_shortage(config, label_dim, channels, available, device.type))
    return lines


def estimate(
    config: TrainConfig, label_dim: int, channels: int, device: torch.device | None = None,
) -> Estimate:
    """Estimate a training, its precision decided for its device; arguments as describe().

    device: measured for a second or so; None leaves out the time.
    """
    rehearsal = Rehearsal(config, label_dim, channels)
    work, sec = rehearsal.per_kimg(), None
    if device is not None:
        speed = measure_speed(work, device, config.batch_gpu, cudnn_benchmark=config.cudnn_benchmark,
                              allow_tf32=convolutions_in_tf32(config.allow_tf32))
        sec = speed.seconds(work)
    device_type = 'cuda' if device is None else device.type
    return Estimate(rehearsal.memory_bytes(device_type), work.total_flop * config.num_gpus, sec)


def local_device(config: TrainConfig) -> torch.device | None:
    """The device that the training would use, None if this machine lacks it."""
    has_gpu = torch.cuda.is_available()
    if config.device == 'cuda' and not has_gpu:
        return None
    return torch.device('cuda' if has_gpu and config.device != 'cpu' else 'cpu')


def slow_precision(config: TrainConfig) -> str | None:
    """A sentence, if the 16 bits of --precision are slower than float32 on the CPU that will train.

    That a processor has instructions for them does not say that these are fast, so it is measured.
    """
    device = local_device(config)
    if device is None or device.type != 'cpu' or config.precision not in HALF_DTYPES:
        return None
    level = levels_of(config.data.resolution)[1][-1]
    width = min(config.G.channel_base // level, config.G.channel_max)
    speed = relative_speed(HALF_DTYPES[config.precision], width, device, config.batch_gpu)
    if speed > SLOW_HALF:
        return None
    return (f'--precision={config.precision}: this CPU convolves in 16 bits at {speed:.2g} times its speed '
            'in float32; --precision=fp32 trains faster.')


def _memory_line(config: TrainConfig, result: Estimate, available: float | None) -> str:
    limit = '' if available is None else f' of {available / GB:.1f} GB'
    each = ' on each device' if config.num_gpus > 1 else ''
    return f'{"Estimated memory:":<20}about {result.memory_bytes / GB:.1f} GB{limit}{each}'


def _speed_line(config: TrainConfig, result: Estimate) -> str:
    arithmetic = f'{result.flop_per_kimg / TERA:,.3g} TFLOP/kimg'
    if result.sec_per_kimg is None:
        return f'{"Estimated work:":<20}{arithmetic}; no such device here whose speed could be measured'
    total = format_time(result.sec_per_kimg * config.total_kimg)
    return (f'{"Estimated speed:":<20}about {result.sec_per_kimg:,.3g} s/kimg ({arithmetic}), {total} for '
            f'{config.total_kimg:g} kimg')


def device_memory(device: torch.device) -> float | None:
    """Bytes of a device, None if the system does not tell."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):
        return None


def _shortage(
    config: TrainConfig, label_dim: int, channels: int, available: float, device_type: str,
) -> str:
    for smaller in smaller_batches(config):
        if Rehearsal(smaller, label_dim, channels).memory_bytes(device_type) <= available:
            return f'Warning: memory will probably run out; --batch-gpu={smaller.batch_gpu} should fit.'
    return ('Warning: memory will probably run out, even with --batch-gpu=1; use --cbase, --cmax or smaller '
            'pictures.')


class Rehearsal:
    """The phases of a configuration, counted on networks without content.

    label_dim, channels: of the dataset.  rounds: work of each phase on config.batch_gpu pictures, by name.
    """

    def __init__(self, config: TrainConfig, label_dim: int, channels: int):
        self.config, self.channels, system = config, channels, SYSTEMS[config.system]
        with torch.device('meta'):
            self.G, self.D = [network.train().requires_grad_(requires_grad=False)
                              for network in system.networks(config, label_dim, channels)]
        self._pipe = _CountedAugmentation(config, channels) if _augments(config) else None
        loss = system.loss(
            self.G, self.D, self._pipe, **config.loss_kwargs(), report=lambda name, values: values)
        self._phases = system.phases(config, loss, _no_optimizer(self.G), _no_optimizer(self.D))
        # Style mixing draws on the CPU, whatever the device.
        with torch.random.fork_rng([]):
            self.rounds = {phase.name: self._count(phase) for phase in self._phases}

    def per_kimg(self) -> Work:
        """Work of one device for a thousand pictures over all."""
        config, total = self.config, Work()
        iterations = 1000 / config.batch_size
        rounds = config.batch_size // (config.batch_gpu * config.num_gpus)
        total.bytes = iterations * EMA_ACCESSES * FLOAT_BYTES * _num_parameters(self.G)
        for phase in self._phases:
            runs = iterations / phase.interval
            total.add(self.rounds[phase.name], rounds * runs)
            if phase.active:
                total.bytes += runs * ADAM_ACCESSES * FLOAT_BYTES * _num_parameters(phase.module)
        return total

    def memory_bytes(self, device_type: str) -> float:
        """The most that is alive at once: what stays, and the phase that needs most besides."""
        g, d = _num_parameters(self.G), _num_parameters(self.D)
        # Parameters, gradients, two moments of Adam; and the averaged generator.
        lasting = FLOAT_BYTES * (4 * (g + d) + g)
        height, width = self.config.data.size
        share = self.config.batch_size // self.config.num_gpus
        batch = FLOAT_BYTES * share * self.channels * height * width
        peak = max(work.peak for work in self.rounds.values())
        return PROCESS_BYTES[device_type] + SLACK * (lasting + batch + peak)

    def _count(self, phase: Phase) -> Work:
        n, (height, width), G = self.config.batch_gpu, self.config.data.size, self.G
        with torch.device('meta'):
            c = torch.empty([n, G.c_dim])
            batch = MicroBatch(
                torch.empty([n, self.channels, height, width]), c, torch.empty([n, G.z_dim]), c)
        with Counter() as counter:
            phase.run([batch])
        if self._pipe is not None:
            self._pipe.add_to(counter.work)
        return counter.work


def _augments(config: TrainConfig) -> bool:
    return config.augment.mode == 'ada' or (config.augment.mode == 'fixed' and config.augment.p > 0)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _no_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    """One that does next to nothing: Adam's share is added by hand."""
    return torch.optim.SGD(list(module.parameters()), lr=0.0)


class _CountedAugmentation:
    """Stands for an AugmentPipe in a count, because that one computes on the host what it does.

    The real one is tried on one small picture with all its transforms; work and memory grow with the pixels.
    """

    def __init__(self, config: TrainConfig, channels: int):
        sides = [min(side, AUGMENT_SIDE) for side in config.data.size]
        height, width = config.data.size
        self._scale = height * width / (sides[0] * sides[1])
        pipe = augment.AugmentPipe(**config.augment_kwargs()).requires_grad_(requires_grad=False)
        img = torch.zeros([1, channels, *sides])
        with torch.random.fork_rng([]):
            self._forward = _work_of(lambda: pipe(img))
            img.requires_grad_()
            self._both = _work_of(lambda: torch.autograd.grad(pipe(img).sum(), img))
        self._pictures: list[tuple[int, bool]] = []

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Pictures of the same shape; remembers how many, and whether there will be a backward pass."""
        self._pictures.append((len(img), img.requires_grad))
        return img.clone()

    def add_to(self, work: Work) -> None:
        """Add what the calls since the last time would have needed."""
        for count, has_grad in self._pictures:
            own = self._both if has_grad else self._forward
            # Operations are per batch, the rest per picture.
            work.add(dataclasses.replace(own, calls=0), count * self._scale)
            work.calls += own.calls
        work.peak += max((count for count, _ in self._pictures), default=0) * self._scale * self._both.peak
        self._pictures.clear()


def _work_of(function: Callable[[], object]) -> Work:
    with Counter() as counter:
        function()
    return counter.work
