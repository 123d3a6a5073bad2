# SPDX-License-Identifier: Apache-2.0
"""What several GPUs or processes gain: predicted from bytes and link speeds, or measured on this machine.

python benchmarks/scaling.py model --cfg=stylegan2 --resolution=1024     # the tables of docs/distributed.md
python benchmarks/scaling.py measure --gpus=1,2                          # processes of one CPU thread each
"""
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import common
import torch
from train_step import CYCLE, Trainer

from dnnlib.cli import run_command
from dnnlib.util import UserError
from torch_utils import distributed
from training import networks
from training.config import DatasetInfo, resolve

FLOAT_BYTES = 4
MS, MIB, GB = 1e-3, 2 ** 20, 1e9
STEP_MS = '50,100,200'  # assumed where nothing was measured
GPUS = (8, 64, 512)
PER_MACHINE = 8
POLL_SEC = 0.005  # between looks at whose turn it is
END = 'end'
END_SEC = 20  # for processes to leave
GOAL = 1.7  # times the throughput of one process, for two


@dataclass(frozen=True)
class Link:
    """bytes_per_sec: in one direction, of a GPU within a machine, or of a whole machine between them.

    latency_sec: of a message.
    """

    name: str
    bytes_per_sec: float
    latency_sec: float


def gigabit(name, gbit_per_sec, latency_us):
    """A network as its makers count."""
    return Link(name, gbit_per_sec * 1e9 / 8, latency_us * 1e-6)


# Nominal bandwidths; latencies are assumptions of the usual magnitude.
INSIDE = {'nvlink': Link('NVLink, 450 GB/s', 450 * GB, 3e-6),
          'pcie': Link('PCIe 4.0, 25 GB/s', 25 * GB, 5e-6)}
BETWEEN = (gigabit('8 x 400 Gb/s', 3200, 5), gigabit('400 Gb/s', 400, 5), gigabit('100 Gb/s', 100, 10),
           gigabit('25 Gb/s', 25, 30))
LATENCY_NAMES = ('w_avg and pl_mean', 'stop signal')


@dataclass(frozen=True)
class Message:
    """What is summed over all GPUs: bytes, and how often in a step on average."""

    name: str
    bytes: int
    per_step: float


def messages(config):
    """The messages of a training, from the sizes of its networks (images of three channels, no labels)."""
    shape = {'c_dim': 0, 'img_channels': 3, 'img_resolution': config.data.resolution}
    with torch.device('meta'):
        g = networks.Generator(**shape, **config.G_kwargs())
        d = networks.Discriminator(**shape, **config.D_kwargs())
    rows = []
    for name, network, interval, is_regularised in (
            ('G', g, config.G_reg_interval, config.loss.pl_weight > 0),
            ('D', d, config.D_reg_interval, config.loss.r1_gamma > 0)):
        size = FLOAT_BYTES * sum(p.numel() for p in network.parameters())
        rows.append(Message(f'{name}main', size, 1.0))
        if is_regularised and interval:
            rows.append(Message(f'{name}reg', size, 1 / interval))
    w_avg = sum(b.numel() for name, b in g.named_buffers() if name.endswith('w_avg'))
    return [*rows, Message(LATENCY_NAMES[0], FLOAT_BYTES * (w_avg + 1), 1.0),
            Message(LATENCY_NAMES[1], FLOAT_BYTES * 2, 1.0)]


def all_reduce_sec(size, gpus, inside, between):
    """Seconds to sum `size` bytes over `gpus` GPUs, PER_MACHINE in each machine.

    A ring within each machine leaves a part of the sum with each of its GPUs, the parts are summed between
    the machines, and a ring brings them together: 2 (n - 1) / n of the bytes pass each of the two kinds of
    link. Latencies: of the rings within; between machines of rings or trees, which of the two is faster.
    """
    local = min(gpus, PER_MACHINE)
    machines = math.ceil(gpus / PER_MACHINE)
    hops = min(2 * (machines - 1), 2 * math.ceil(math.log2(machines)))
    seconds = 2 * (local - 1) / local * size / inside.bytes_per_sec + 2 * (local - 1) * inside.latency_sec
    seconds += 2 * (machines - 1) / machines * size / between.bytes_per_sec
    return seconds + hops * between.latency_sec


def communication_sec(sums, gpus, inside, between):
    """Seconds of a step that a GPU waits for sums, which nothing overlaps."""
    return sum(m.per_step * all_reduce_sec(m.bytes, gpus, inside, between) for m in sums)


def efficiency(step_sec, sums, gpus, inside, between):
    """Share of a step that is not waiting, at the same number of images for each GPU (weak scaling)."""
    return step_sec / (step_sec + communication_sec(sums, gpus, inside, between))


def bytes_table(sums):
    """Markdown: what is summed, how large, how often."""
    lines = ['| all-reduce | MiB | times per step | MiB per step |', '|---|---|---|---|']
    for m in sums:
        lines.append(f'| {m.name} | {m.bytes / MIB:,.3f} | {m.per_step:.4g} | '
                     f'{m.bytes * m.per_step / MIB:,.3f} |')
    total = sum(m.bytes * m.per_step for m in sums) / MIB
    return [*lines, f'| total | | | {total:,.1f} |']


def efficiency_table(sums, steps_ms, inside):
    """Markdown: predicted efficiency by step time, link between machines and number of GPUs."""
    heads = [f'{n} GPUs: wait, efficiency' for n in GPUS]
    lines = [f'| step without communication | between nodes | {" | ".join(heads)} |',
             '|' + '---|' * (2 + len(GPUS))]
    for step_ms in steps_ms:
        for link in BETWEEN:
            cells = []
            for gpus in GPUS:
                wait_ms = communication_sec(sums, gpus, inside, link) / MS
                cells.append(f'{wait_ms:.1f} ms, {efficiency(step_ms * MS, sums, gpus, inside, link):.0%}')
            lines.append(f'| {step_ms:g} ms | {link.name} | {" | ".join(cells)} |')
    return lines


def measured_ms(path):
    """Milliseconds of a step in each row that benchmarks/train_step.py has written."""
    rows = json.loads(Path(path).read_text())['rows']
    return [row['sec_per_kimg'] * row['batch'] for row in rows]


def config_of(cfg, resolution, **flags):
    """A training of random images."""
    info = DatasetInfo('random', 10000, resolution, resolution, 3)
    flags = {k: v for k, v in flags.items() if v is not None}
    return resolve({'outdir': 'unused', 'data': 'random', 'cfg': cfg, **flags}, info)


class Timed:
    """Within this context every sum over processes is timed: `seconds` and `calls` so far."""

    def __init__(self):
        self.seconds, self.calls, self._original = 0.0, 0, distributed.all_reduce_sum

    def __enter__(self):
        distributed.all_reduce_sum = self._sum
        return self

    def __exit__(self, *_):
        distributed.all_reduce_sum = self._original

    def _sum(self, tensor):
        start = time.perf_counter()
        result = self._original(tensor)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


def take_turns(name, config, folder):
    """As one of several processes of one thread: train a cycle at each turn of the variant `name`, until the
    word is END; the first process writes what each took.

    With config.num_gpus = 1 they know nothing of each other.
    """
    device = distributed.join('cpu') if config.num_gpus > 1 else torch.device('cpu')
    torch.set_num_threads(1)
    trainer = Trainer(config, device, plain=False)
    for turn in itertools.count():
        word = Path(folder, f'{name} {turn}')
        while not word.exists():
            time.sleep(POLL_SEC)
        if word.read_text() == END:
            break
        if config.num_gpus > 1:
            distributed.all_reduce_sum(torch.zeros([1]))  # all start together
        with Timed() as sums:
            seconds = trainer.cycle()
        if os.environ.get('RANK', '0') == '0':
            result = {'seconds': seconds, 'in_sums': sums.seconds, 'sums': sums.calls}
            write_whole(Path(folder, f'{name} {turn}.json'), json.dumps(result))
    distributed.leave()


def write_whole(path, text):
    """A file that is seen complete or not at all."""
    temporary = path.with_suffix('.new')
    temporary.write_text(text)
    temporary.replace(path)


@dataclass(frozen=True)
class Variant:
    """Processes that train together, or each independently on its share."""

    name: str
    processes: int
    config: object


class Crew:
    """The processes of a variant; they wait, idle, for their turns."""

    def __init__(self, variant, folder):
        self._name, self._folder, self._turn = variant.name, folder, 0
        context = multiprocessing.get_context(distributed.START_METHOD)
        self._process = context.Process(
            target=distributed.launch, args=(take_turns, (variant.name, variant.config, folder),
                                             variant.processes))
        self._process.start()

    def run(self):
        """Let them train a cycle; returns what the first of them has written."""
        path = Path(self._folder, f'{self._name} {self._turn}.json')
        self._say('go')
        while not path.exists():
            if not self._process.is_alive():
                raise UserError(f'the processes of "{self._name}" have ended; see above')
            time.sleep(POLL_SEC)
        return json.loads(path.read_text())

    def end(self):
        """Let them exit."""
        self._say(END)
        self._process.join(END_SEC)
        self._process.terminate()
        self._process.join()

    def _say(self, word):
        write_whole(Path(self._folder, f'{self._name} {self._turn}'), word)
        self._turn += word != END


@contextlib.contextmanager
def crews_of(variants):
    """A crew for each, sent home at the end."""
    with tempfile.TemporaryDirectory() as folder:
        crews = [Crew(variant, folder) for variant in variants]
        try:
            yield crews
        finally:
            for crew in crews:
                crew.end()


def variants_of(gpus, unconnected, cfg, resolution, batch, **flags):
    """The variants to compare, the first one the reference."""
    found = []
    for n in gpus:
        config = config_of(cfg, resolution, batch=batch, gpus=n, **flags)
        found.append(Variant(f'{n} together' if n > 1 else '1', n, config))
        if unconnected and n > 1:
            config = config_of(cfg, resolution, batch=batch // n, **flags)
            found.append(Variant(f'{n} unconnected', n, config))
    return found


def strong_scaling(variants, turns):
    """A row for each variant. They take turns, one cycle each, so that noise affects all alike."""
    with crews_of(variants) as crews:
        rounds = [[crew.run() for crew in crews] for _ in range(turns + 1)]
    return rows_of(variants, rounds[1:])  # the first one warms up


def rows_of(variants, rounds):
    """Lines of the table; `speedup` is the median ratio to the first variant in the same round.

    rounds: each a result of every variant.
    """
    rows = []
    for v, results in zip(variants, zip(*rounds, strict=True), strict=True):
        images = CYCLE * v.config.batch_size * v.processes // v.config.num_gpus
        seconds = [result['seconds'] for result in results]
        speedup = statistics.median(
            first['seconds'] / own for (first, *_), own in zip(rounds, seconds, strict=True))
        rows.append({
            'processes': v.name, 'batch': images // CYCLE,
            'img_per_sec': images / statistics.median(seconds), 'speedup': speedup,
            'efficiency': speedup / v.processes,
            'sums_percent': 100 * sum(r['in_sums'] for r in results) / sum(seconds),
            'sums_per_step': sum(r['sums'] for r in results) / (len(rounds) * CYCLE)})
    return rows


@click.group(context_settings={'show_default': True})
def main():
    """Scaling over several GPUs or processes."""


@main.command()
@click.option('--cfg', default='stylegan2', show_default=True, help='Preset of train.py.')
@click.option('--resolution', default=1024, show_default=True, help='Side of the images.')
@click.option('--step-ms', default=STEP_MS, show_default=True, metavar='MS,...',
              help='Assumed milliseconds of a step on one GPU, as if alone.')
@click.option('--measured', metavar='JSON', type=click.Path(exists=True, dir_okay=False),
              help='Take the time of a step from a file of train_step.py instead.')
@click.option('--inside', default='nvlink', show_default=True, type=click.Choice(list(INSIDE)),
              help='Link between the GPUs of a machine.')
def model(cfg, resolution, step_ms, measured, inside):
    """Print, as Markdown, what is summed in a step and what efficiency follows (weak scaling)."""
    sums = messages(config_of(cfg, resolution))
    steps = measured_ms(measured) if measured else [float(part) for part in step_ms.split(',')]
    lines = [*bytes_table(sums), '', *efficiency_table(sums, steps, INSIDE[inside])]
    click.echo('\n'.join(lines))


@main.command()
@click.option('--gpus', default='1,2', show_default=True, metavar='N,...', help='Processes; the first is 1.')
@click.option('--cfg', default='demo', show_default=True, help='Preset of train.py.')
@click.option('--resolution', default=32, show_default=True, help='Side of the images.')
@click.option('--batch', default=64, show_default=True, help='Total batch size over all processes.')
@click.option('--cbase', default=2048, show_default=True, help='Channel base, as in train.py.')
@click.option('--cmax', default=64, show_default=True, help='Channel maximum, as in train.py.')
@click.option('--turns', default=4, show_default=True,
              help=f'Measured turns of each variant, {CYCLE} steps each, after one to warm up.')
@click.option('--unconnected', is_flag=True,
              help='Also processes that train each for itself: what the machine, not the sums, costs.')
@click.option('--check', is_flag=True, help=f'Leave with 1 if the last variant together is below {GOAL}.')
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def measure(gpus, turns, json_path, unconnected, check, **flags):
    """Train on the CPU with processes of one thread, the same batch in all (strong scaling)."""
    try:
        counts = [int(part) for part in gpus.split(',')]
    except ValueError as error:
        raise UserError(f'--gpus={gpus} must be whole numbers, separated by commas') from error
    rows = strong_scaling(variants_of(counts, unconnected, **flags), turns)
    rows = [{**{name: flags[name] for name in ('cfg', 'resolution')}, **row} for row in rows]
    common.write_json(json_path, 'cpu', rows)
    common.print_table(rows)
    reached = min(row['speedup'] for row in rows if row['processes'].endswith('together'))
    if check and reached < GOAL:
        raise SystemExit(1)


if __name__ == '__main__':
    run_command(main)
