# SPDX-License-Identifier: Apache-2.0
"""Estimates memory and time of a training before it starts.

The phases of an iteration run once on the meta device while their operations are counted; a short benchmark
of the device converts the counts to time.
"""
import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dnnlib.resolution import levels_of
from dnnlib.util import UserError, format_time
from torch_utils.misc import convolutions_in_tf32
from training import augment
from training.capacity.count import Counter, Work
from training.capacity.memory import smaller_batches
from training.capacity.speed import measure_speed, relative_speed
from training.config import DatasetInfo, TrainConfig
from training.loss import MicroBatch
from training.phases import Phase
from training.systems.table import SYSTEMS

GB, TERA, FLOAT_BYTES = 1e9, 1e12, 4
# Of a process that has imported torch. Measured on CPU; not on GPU (context and cuDNN workspaces).
PROCESS_BYTES = {'cpu': 0.4 * GB, 'cuda': 1.0 * GB}
PERSISTENT_COPIES = 4  # of parameters: themselves, gradients and two moments
HALF_BYTES = 2  # of an activation, at the least
CLEARLY_SMALL = 20  # times the least that a run needs is more than it takes
SLACK = 1.1  # rounding and fragmentation of allocators
ADAM_ACCESSES, EMA_ACCESSES = 7, 3  # reads and writes per parameter, its gradient, moments and average
AUGMENT_SIDE = 128  # maximum side of the image that augmentation is counted on, in pixels
HALF_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}  # by --precision
DAY_SEC, LONG_DAYS = 86400, 3
SLOW_HALF = 0.9  # of the speed of float32: slower 16-bit precision causes a note


@dataclass(frozen=True)
class Estimate:
    """memory_bytes: peak per device.  flop_per_kimg: over all devices.  sec_per_kimg: None: not measured."""

    memory_bytes: float
    flop_per_kimg: float
    sec_per_kimg: float | None = None


def describe(config: TrainConfig, label_dim: int, channels: int) -> list[str]:
    """Lines for --dry-run: memory, speed, and the --batch-gpu that fits if memory is insufficient.

    label_dim: 0 for an unconditional model.  channels: of the dataset. Takes a few seconds.
    """
    device = local_device(config)
    if device is not None:
        config = config.for_device(device.type)
    result = estimate(config, label_dim, channels, device)
    available = None if device is None else device_memory(device)
    lines = [_memory_line(config, result, available), _speed_line(config, result)]
    if device is not None and device.type == 'cpu' and (hint := _long_line(config, result)) is not None:
        lines.append(hint)
    if available is not None and result.memory_bytes > available:
        lines.append(_shortage(config, label_dim, channels, available, device.type))
    return lines


def estimate(
    config: TrainConfig, label_dim: int, channels: int, device: torch.device | None = None,
) -> Estimate:
    """Estimate a training whose precision is resolved for its device; arguments as describe().

    device: benchmarked for about a second; None: no estimate of the time.
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
    """The device that training would use; None if it is not available."""
    has_gpu = torch.cuda.is_available()
    if config.device == 'cuda' and not has_gpu:
        return None
    return torch.device('cuda' if has_gpu and config.device != 'cpu' else 'cpu')


def slow_precision(config: TrainConfig) -> str | None:
    """A note if the 16-bit precision of --precision is slower than float32 on the CPU used for training.

    Measured, because a CPU may support 16-bit instructions that are slow.
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


def slow_training(config: TrainConfig, label_dim: int, channels: int) -> str | None:
    """A note if a training on this CPU takes more than a few days. Takes seconds."""
    device = torch.device('cpu')
    return _long_line(config, estimate(config.for_device(device.type), label_dim, channels, device))


def _long_line(config: TrainConfig, result: Estimate) -> str | None:
    days = (result.sec_per_kimg or 0) * config.total_kimg / DAY_SEC
    if days < LONG_DAYS:
        return None
    return (f'On this CPU {config.total_kimg:g} kimg take about {days:,.0f} days; --cfg=demo is small enough '
            'for a CPU.')


def _memory_line(config: TrainConfig, result: Estimate, available: float | None) -> str:
    limit = '' if available is None else f' of {available / GB:.1f} GB'
    each = ' on each device' if config.num_gpus > 1 else ''
    return f'{"Estimated memory:":<20}about {result.memory_bytes / GB:.1f} GB{limit}{each}'


def _speed_line(config: TrainConfig, result: Estimate) -> str:
    arithmetic = f'{result.flop_per_kimg / TERA:,.3g} TFLOP/kimg'
    if result.sec_per_kimg is None:
        return f'{"Estimated work:":<20}{arithmetic}; speed unknown, because the device is not available here'
    total = format_time(result.sec_per_kimg * config.total_kimg)
    return (f'{"Estimated speed:":<20}about {result.sec_per_kimg:,.3g} s/kimg ({arithmetic}), {total} for '
            f'{config.total_kimg:g} kimg')


def device_memory(device: torch.device) -> float | None:
    """Memory of a device in bytes; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):
        return None


def free_memory(device: torch.device) -> float | None:
    """Bytes of a device that a new program can have; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        line = re.search(r'MemAvailable: +(\d+) kB', Path('/proc/meminfo').read_text(encoding='ascii'))
        limits.append(float(line[1]) * 1024 if line else math.inf)
    # Of a container, by versions 2 and 1 of cgroups; 'max' if there is none.
    for name in ('memory.max', 'memory/memory.limit_in_bytes'):
        with contextlib.suppress(OSError, ValueError):
            limits.append(float(Path('/sys/fs/cgroup', name).read_text(encoding='ascii')))
    return min(limits, default=device_memory(device))


def least_bytes(config: TrainConfig, channels: int) -> dict[str, float]:
    """{options: bytes per process that training needs at the least because of them}.

    Builds nothing: counts one convolution per level of G and D, and one tensor of activations each.
    """
    height, width = config.data.size
    levels = levels_of(config.data.resolution)[1]
    maps = [min(config.G.channel_base // level, config.G.channel_max) for level in levels]
    parameters = sum(9 * a * b for a, b in itertools.pairwise(maps)) * 2
    parameters += (config.G.map_layers - 1) * config.G.w_dim ** 2
    pixels = [height * width * (level / levels[-1]) ** 2 for level in levels]
    features = sum(2 * count * size for count, size in zip(maps, pixels, strict=True))
    share = config.batch_size // config.num_gpus
    return {'--cbase, --cmax and --map-depth': PERSISTENT_COPIES * FLOAT_BYTES * parameters,
            f'--batch={config.batch_size}': FLOAT_BYTES * share * channels * height * width,
            f'--batch-gpu={config.batch_gpu}': HALF_BYTES * config.batch_gpu * features}


def check_memory(config: TrainConfig, dataset: DatasetInfo, *, is_dry: bool) -> None:
    """Raise UserError if a run needs more memory than is free here, naming the options to blame.

    On a CPU memory does not run out before the system kills the process, so there the phases are counted as
    in a dry run, for seconds, unless the run is clearly small.  is_dry: it may be meant for another machine;
    only what no machine of this size can train is an error.
    """
    device = local_device(config)
    free = None if device is None else free_memory(device)
    if device is None or free is None:
        return
    processes = config.num_gpus if device.type == 'cpu' and not is_dry else 1
    least = least_bytes(config, dataset.channels)
    needed = processes * sum(least.values())
    if device.type == 'cpu' and not is_dry and free / CLEARLY_SMALL < needed <= free:
        label_dim = dataset.label_dim if config.data.use_labels else 0
        rehearsal = Rehearsal(config.for_device(device.type), label_dim, dataset.channels)
        needed = processes * rehearsal.memory_bytes(device.type)
    if needed > free:
        raise UserError(f'{max(least, key=least.__getitem__)}: training needs about {needed / GB:,.0f} GB of '
                        f'memory, but {free / GB:,.1f} GB are free; choose smaller values')


def _shortage(
    config: TrainConfig, label_dim: int, channels: int, available: float, device_type: str,
) -> str:
    for smaller in smaller_batches(config):
        if Rehearsal(smaller, label_dim, channels).memory_bytes(device_type) <= available:
            return f'Warning: out of memory is likely; --batch-gpu={smaller.batch_gpu} should fit.'
    return ('Warning: out of memory is likely, even with --batch-gpu=1; reduce --cbase, --cmax or the '
            'image size.')


class Rehearsal:
    """The phases of a configuration, counted on the meta device.

    label_dim, channels: of the dataset.  rounds: {phase name: work of one pass over config.batch_gpu images}.
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
        """Work per device for a thousand images over all devices."""
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
        """Peak memory per device: persistent tensors and those of the largest phase."""
        g, d = _num_parameters(self.G), _num_parameters(self.D)
        # Parameters, gradients and two moments of Adam, and the averaged generator.
        persistent = FLOAT_BYTES * (4 * (g + d) + g)
        height, width = self.config.data.size
        share = self.config.batch_size // self.config.num_gpus
        batch = FLOAT_BYTES * share * self.channels * height * width
        peak = max(work.peak for work in self.rounds.values())
        return PROCESS_BYTES[device_type] + SLACK * (persistent + batch + peak)

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
    """An optimizer of negligible cost: that of Adam is added analytically."""
    return torch.optim.SGD(list(module.parameters()), lr=0.0)


class _CountedAugmentation:
    """Replaces AugmentPipe while counting, because it computes transforms on the host.

    AugmentPipe is counted on one small image with all transforms, and scaled by the number of pixels.
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
        self._calls: list[tuple[int, bool]] = []

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Images of the same shape; records their number and whether a backward pass follows."""
        self._calls.append((len(img), img.requires_grad))
        return img.clone()

    def add_to(self, work: Work) -> None:
        """Add the work of the recorded calls, and clear them."""
        for count, has_grad in self._calls:
            own = self._both if has_grad else self._forward
            # The number of operations is per batch, everything else per image.
            work.add(dataclasses.replace(own, calls=0), count * self._scale)
            work.calls += own.calls
        work.peak += max((count for count, _ in self._calls), default=0) * self._scale * self._both.peak
        self._calls.clear()


def _work_of(function: Callable[[], object]) -> Work:
    with Counter() as counter:
        function()
    return counter.work
