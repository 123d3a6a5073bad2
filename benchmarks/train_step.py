# SPDX-License-Identifier: Apache-2.0
"""Time whole training iterations: seconds per kimg, share of each phase; beside a straightforward program.

python benchmarks/train_step.py --cfg=demo --resolution=32 --device=cpu --baseline
"""
import collections
import contextlib
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import click
import common
import torch
from baseline import plain_adam, straightforward
from ceilings import convolution_peak

from dnnlib.cli import run_command
from dnnlib.util import UserError
from torch_utils import custom_ops, training_stats
from torch_utils.misc import keep_freed_memory, pick_device, set_gpu_arithmetic
from training import state as state_module
from training.accelerate import compile_networks, use_graphs
from training.capacity.estimate import estimate
from training.config import DatasetInfo, resolve
from training.iteration import PhaseClock, run_iteration
from training.state import build_state
from training.systems.table import SYSTEMS

PLAIN = 'straightforward'
CYCLE = 16  # iterations in which every phase runs as often as it should
WARMUPS = 4  # iterations with all phases: a graph is captured by the third call
QUIET, MOST_WARMUPS = 8, 64  # with graphs, which also depend on draws: until so many in a row captured none
AUGMENT_P = 0.5  # with --aug=ada; at p = 0, where runs start, nothing would be augmented
TOP_KERNELS = 80  # of a profile
# What a variant may consist of, joined by +, in flags of train.py.
WORDS = {
    'fp16': {'precision': 'fp16'}, 'bf16': {'precision': 'bf16'}, 'fp32': {'precision': 'fp32'},
    'nhwc': {'nhwc': '1'}, 'nchw': {'nhwc': '0'}, 'tf32': {'allow_tf32': 'auto'}, 'ieee': {'allow_tf32': '0'},
    'graphs': {'cuda_graphs': 'on'}, 'eager': {}, 'compiled': {'compile': True}, 'torch': {'ops': 'torch'},
    'ada': {'aug': 'ada'},
}


class CycleClock(PhaseClock):
    """Sums up all durations. It reads the events of a GPU once, at the end: a wait in every iteration would
    have the GPU idle until the host has launched the next, as no training does.
    """

    def __init__(self, device):
        super().__init__(device)
        self._all = []

    @contextlib.contextmanager
    def measure(self, name):
        """As PhaseClock, for the sum."""
        with super().measure(name):
            yield
        self._all.append(self._latest)
        self._latest = {}

    def milliseconds(self):
        """Name -> sum of its durations since the last call; waits for the device."""
        sums = collections.Counter()
        for run in self._all:
            self._latest = run
            sums.update(super().milliseconds())
        self._all, self._latest = [], {}
        return sums


class Trainer:
    """A run on random images that can be advanced cycle by cycle.

    plain: the straightforward way, which leaves memory to the C library, too.
    """

    def __init__(self, config, device, plain):
        self.config, self.device = config.for_device(device.type), device
        self.choose()
        if not plain:
            keep_freed_memory(device)  # as train.py does
        with _optimizer(plain):
            self.state = build_state(
                self.config, label_dim=0, channels=3, device=device, store=training_stats.Store())
        if self.state.ada is not None:
            self.state.augment_pipe.p.fill_(AUGMENT_P)
        state = self.state
        self.phases = SYSTEMS[self.config.system].phases(self.config, state.loss, state.G_opt, state.D_opt)
        self.clock = CycleClock(device)
        self.captures = None if plain else use_graphs(
            state, self.phases, self.config, device, print)
        if self.config.compile:
            compile_networks(self.state.loss)
        self.plain, self.phase_ms = plain, {p.name: 0.0 for p in self.phases}

    @property
    def peak_gb(self):
        """Largest memory of the GPU that tensors have had in this process so far, in GB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == 'cuda' else 0.0

    @property
    def capture_sec(self):
        """What capturing and trying CUDA graphs has taken so far."""
        return 0.0 if self.captures is None else self.captures.seconds

    def choose(self):
        """Set what is global to the process."""
        custom_ops.set_mode(self.config.ops)
        set_gpu_arithmetic(self.config.cudnn_benchmark, self.config.allow_tf32)

    def warm_up(self):
        """Run every phase until kernels are compiled and graphs captured; returns seconds."""
        with straightforward() if self.plain else contextlib.nullcontext():
            self.choose()
            start = time.perf_counter()
            num_quiet = 0
            for number in range(MOST_WARMUPS):
                if number >= WARMUPS and (self.captures is None or num_quiet >= QUIET):
                    break
                before, self.state.batch_idx = self.capture_sec, 0
                self.iterate()
                num_quiet = num_quiet + 1 if self.capture_sec == before else 0
            self.clock.milliseconds()
            common.synchronize(self.device)
        self.state.batch_idx = 0
        self.phase_ms = dict.fromkeys(self.phase_ms, 0.0)
        return time.perf_counter() - start

    def cycle(self):
        """Train for CYCLE iterations; returns seconds."""
        with straightforward() if self.plain else contextlib.nullcontext():
            self.choose()
            common.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(CYCLE):
                self.iterate()
            common.synchronize(self.device)
            seconds = time.perf_counter() - start
        for name, ms in self.clock.milliseconds().items():
            self.phase_ms[name] += ms
        return seconds

    def iterate(self):
        """Train for one iteration."""
        share = self.config.batch_size // self.config.num_gpus
        img = torch.rand([share, 3, *self.config.data.size], device=self.device) * 2 - 1
        run_iteration(
            self.state, self.phases, (img, torch.zeros([len(img), 0], device=self.device)),
            lambda n, rng: torch.zeros([n, 0]), self.config, self.clock)


class PlainTrainer:
    """The straightforward Trainer in a process of its own: how ours treats memory is for a whole process."""

    capture_sec, peak_gb = 0.0, 0.0

    def __init__(self, config, device):
        self.config, self.phase_ms = config, {}
        context = multiprocessing.get_context('spawn')
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, device), daemon=True)
        self._process.start()
        theirs.close()

    def warm_up(self):
        """As Trainer."""
        return self._ask('warm_up')

    def cycle(self):
        """As Trainer."""
        return self._ask('cycle')

    def _ask(self, method):
        try:
            self._pipe.send(method)
            result, self.phase_ms = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(f'the process of the {PLAIN} implementation has ended; see above') from error
        return result


def _serve(pipe, config, device):
    """Call the methods that PlainTrainer names: answers with what they return, and the times of phases."""
    trainer = Trainer(config, device, plain=True)
    with contextlib.suppress(EOFError):
        while True:
            result = getattr(trainer, pipe.recv())()
            pipe.send((result, trainer.phase_ms))


@contextlib.contextmanager
def _optimizer(plain):
    original = state_module.lazy_adam
    state_module.lazy_adam = plain_adam if plain else original
    yield
    state_module.lazy_adam = original


def measure(configs, device, cycles, profile_path=None):
    """Rows with the median time of each variant; their cycles alternate, so that noise slows all alike."""
    trainers = {
        name: PlainTrainer(config, device) if name == PLAIN else Trainer(config, device, plain=False)
        for name, config in configs.items()}
    warmups = {name: trainer.warm_up() for name, trainer in trainers.items()}
    seconds = {name: [] for name in trainers}
    for _ in range(cycles):
        for name, trainer in trainers.items():
            seconds[name].append(trainer.cycle())
    first, peak = next(iter(trainers)), convolution_peak(device)
    rows = [{**row(name, trainers[name], seconds[name], seconds[first]), 'warm_up_sec': warmups[name],
             'peak_share': share_of(peak, trainers[name].config, seconds[name])} for name in trainers]
    if profile_path is not None:
        profile_cycle(trainers[first], rows[0], profile_path)
    return rows


def share_of(peak, config, seconds):
    """Share of the peak of convolutions at which a float32 training computes; None without a peak."""
    if peak is None or config.precision in ('fp16', 'bf16'):
        return None
    flop = estimate(config, label_dim=0, channels=3).flop_per_kimg * CYCLE * config.batch_size / 1000
    return round(flop / statistics.median(seconds) / peak, 4)


def profile_cycle(trainer, measured, path):
    """Write the kernels of one cycle, the slowest first: name, calls and microseconds an iteration."""
    activities = [torch.profiler.ProfilerActivity.CPU] if trainer.device.type == 'cpu' else [
        torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        wall_sec = trainer.cycle()
    kernels = {}
    for event in profiler.events():
        if trainer.device.type == 'cuda':
            us = event.time_range.elapsed_us() if event.device_type.name == 'CUDA' else None
        else:
            us = event.self_cpu_time_total
        if us is None:  # a call of the host that started a kernel
            continue
        calls, total = kernels.get(event.name, (0, 0.0))
        kernels[event.name] = (calls + 1, total + us)
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    text = {'variant': measured['variant'], 'sec_per_kimg': measured['sec_per_kimg'],
            'wall_us': 1e6 * wall_sec / CYCLE, 'kernel_us': sum(us for _, us in kernels.values()) / CYCLE,
            'calls': sum(calls for calls, _ in kernels.values()) / CYCLE,
            'kernels': [[round(us / CYCLE, 1), calls / CYCLE, name]
                        for name, (calls, us) in ordered[:TOP_KERNELS]]}
    Path(path).write_text(json.dumps(text, indent=1) + '\n')


def row(name, trainer, seconds, reference):
    """One line of the table; `speedup` is the median ratio to the first variant within the same cycle.

    `capture_sec`: what capturing and trying CUDA graphs has taken.
    """
    images, total = CYCLE * trainer.config.batch_size, sum(trainer.phase_ms.values()) or 1.0
    per_kimg = statistics.median(seconds) / images * 1000
    return {
        'variant': name, 'sec_per_kimg': per_kimg, 'img_per_sec': 1000 / per_kimg,
        'speedup': statistics.median(r / s for r, s in zip(reference, seconds, strict=True)),
        'capture_sec': trainer.capture_sec, 'peak_GB': trainer.peak_gb,
        **{f'{phase}_percent': round(100 * ms / total, 1) for phase, ms in trainer.phase_ms.items()},
    }


def named(variants):
    """Name -> flags of train.py, of a list such as nhwc+tf32+graphs,nchw."""
    flags = {}
    for name in filter(None, variants.split(',')):
        unknown = [word for word in name.split('+') if word not in WORDS]
        if unknown:
            raise UserError(f'--variants={variants}: {unknown[0]!r} is none of {", ".join(WORDS)}')
        flags[name] = {key: value for word in name.split('+') for key, value in WORDS[word].items()}
    return flags


@click.command(context_settings={'show_default': True})
@click.option('--cfg', default='demo', help='Preset of train.py.')
@click.option('--resolution', default=32, help='Side of the images.')
@click.option('--device', default='auto', type=click.Choice(['auto', 'cuda', 'cpu']))
@click.option('--precision', default='auto', help='auto, fp32, fp16, bf16, or several, separated by commas.')
@click.option('--cbase', type=int, help='Channel base, as in train.py.')
@click.option('--cmax', type=int, help='Channel maximum, as in train.py.')
@click.option('--batch', type=int, help='Batch size.')
@click.option('--aug', default='noaug', type=click.Choice(['noaug', 'ada', 'fixed']))
@click.option('--ops', default='auto', type=click.Choice(custom_ops.MODES), help='Operators, as in train.py.')
@click.option('--cycles', default=4, help=f'Measured cycles of {CYCLE} iterations, after one to warm up.')
@click.option('--compile', 'compiles', is_flag=True, help='Also time each precision with --compile=1.')
@click.option('--graphs', is_flag=True, help='Also time each precision by CUDA graphs; otherwise without.')
@click.option('--variants', default='', help=f'Time these instead, joined by commas: words of '
              f'{", ".join(WORDS)}, joined by +.')
@click.option('--profile', 'profile_path', type=click.Path(),
              help='Write the kernels of a cycle of the first variant.')
@click.option('--baseline', is_flag=True, help='Also time the straightforward implementation, and compare.')
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def main(cfg, resolution, precision, cycles, variants, profile_path, json_path, **flags):
    """Print seconds per kimg and the share of each phase."""
    device, baseline = pick_device(flags.pop('device')), flags.pop('baseline')
    graphs, compiles = flags.pop('graphs'), flags.pop('compiles')
    info = DatasetInfo('random', 10000, resolution, resolution, 3)
    flags = {k: v for k, v in flags.items() if v is not None}
    flags = {'outdir': 'unused', 'data': 'random', 'cfg': cfg, 'cuda_graphs': 'off', **flags}
    ways = {'': {}} | ({' graphs': {'cuda_graphs': 'on'}} if graphs else {})
    ways |= {' compiled': {'compile': True}} if compiles else {}
    configs = {PLAIN: resolve({**flags, 'precision': 'fp32'}, info)} if baseline else {}
    configs |= {name: resolve({**flags, **more}, info) for name, more in named(variants).items()} or {
        name + way: resolve({**flags, 'precision': name, **more}, info)
        for name in precision.split(',') for way, more in ways.items()}
    rows = measure(configs, device, cycles, profile_path)
    rows = [{'cfg': cfg, 'resolution': resolution, 'batch': configs[r['variant']].batch_size, **r}
            for r in rows]
    common.write_json(json_path, device, rows)
    common.print_table(rows)


if __name__ == '__main__':
    run_command(main)
