# SPDX-License-Identifier: Apache-2.0
"""Count bytes, FLOPs and calls of a training iteration on a GPU, without one; predict its time.

python benchmarks/traffic.py --resolution=256 --batch=16 --aug=noaug
"""
import collections
import dataclasses
import json
from pathlib import Path

import click
import common
import torch
from traffic_count import Recorder

from dnnlib.cli import run_command
from dnnlib.util import UserError
from torch_utils import training_stats
from training.config import OPTIONS, DatasetInfo, resolve
from training.iteration import run_iteration
from training.state import build_state
from training.systems.table import SYSTEMS

META, GB, TERA = torch.device('meta'), 1e9, 1e12
OPTIMIZER = 'optimizer, EMA'  # and what else happens between the phases
ADAM_ACCESSES, FLOAT_BYTES = 7, 4  # of each parameter: itself, gradient and moments are read, three written
SMALL_BYTES = 3e6  # an operation that moves less is over before the GPU is full


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a GPU sustains: bytes/s, FLOP/s of convolutions by datatype and of the rest; seconds that every
    operation takes at least.
    """

    bandwidth: float
    convolution: dict
    plain: float
    launch: float

    def seconds(self, call):
        """Of one Call: the slowest of memory, arithmetic and launch."""
        is_dense = call.kind.startswith('convolution')
        rate = self.convolution.get(call.dtype, self.plain) if is_dense else self.plain
        return max(call.bytes / self.bandwidth, call.flop / rate, self.launch)


class _Adam:
    """Stands for the fused optimizer of a network, of which a meta device has none."""

    def __init__(self, opt, recorder):
        self.param_groups, self.recorder = opt.param_groups, recorder

    def step(self):
        """One operation over all parameters."""
        size = FLOAT_BYTES * sum(p.numel() for group in self.param_groups for p in group['params'])
        with self.recorder.within(OPTIMIZER, self.recorder.weight):
            self.recorder.add('optimizer', 'adam', ADAM_ACCESSES * size)


class _Clock:
    """In place of a PhaseClock: tells the recorder which phase it sees."""

    def __init__(self, recorder, intervals):
        self.recorder, self.intervals = recorder, intervals

    def measure(self, name):
        """The context of a phase."""
        return self.recorder.within(name, 1 / self.intervals[name])


def count(config, label_dim=0, channels=3, p=0.5, seed=0):
    """Counter of the Calls of an iteration of one GPU, each phase by its share of the iterations.

    p: of the augmentation.  seed: of what it draws, on which the margins that it needs depend.
    """
    config = dataclasses.replace(config.for_device('cuda'), random_seed=seed)
    with META, torch.random.fork_rng([]):
        state = build_state(config, label_dim, channels, META, training_stats.Store())
    if state.augment_pipe is not None:
        state.augment_pipe.__dict__['_p_read'] = (state.augment_pipe.p, state.augment_pipe.p._version, p)
    recorder = Recorder({'G': state.G, 'D': state.D, 'augment': state.augment_pipe or torch.nn.Module()})
    state.G_opt, state.D_opt = _Adam(state.G_opt, recorder), _Adam(state.D_opt, recorder)
    phases = SYSTEMS[config.system].phases(config, state.loss, state.G_opt, state.D_opt)
    share = config.batch_size // config.num_gpus
    real = [torch.empty(shape, device=META) for shape in ([share, channels, *config.data.size],
                                                          [share, label_dim])]
    clock = _Clock(recorder, {phase.name: phase.interval for phase in phases})
    with torch.random.fork_rng([]), recorder, recorder.within(OPTIMIZER, 1):
        run_iteration(state, phases, real, lambda n, rng: torch.zeros([n, label_dim]), config, clock)
    return recorder.calls


def machine_for(config, bandwidth, fp16, tf32, fp32, launch_us):
    """A Machine from figures in TB/s, TFLOP/s and microseconds."""
    single = tf32 if config.for_device('cuda').allow_tf32 else fp32
    rates = {'fp16': fp16 * TERA, 'bf16': fp16 * TERA, 'fp32': single * TERA}
    return Machine(bandwidth * TERA, rates, fp32 * TERA, launch_us * 1e-6)


def rows_of(calls, machine):
    """Entries of the JSON file, largest first: a row per phase, way, layer, kind and operation."""
    rows = collections.defaultdict(lambda: dict.fromkeys(('calls', 'bytes', 'flop', 'sec'), 0.0))
    for call, number in calls.items():
        row = rows[call.phase, call.way, call.layer, call.kind, call.op]
        row['calls'] += number
        row['bytes'] += number * call.bytes
        row['flop'] += number * call.flop
        row['sec'] += number * machine.seconds(call)
    named = [{**dict(zip(('phase', 'way', 'layer', 'kind', 'op'), key, strict=True)), **row}
             for key, row in rows.items()]
    return sorted(named, key=lambda row: -row['bytes'])


def totals(rows, *keys):
    """The rows summed up by some of their keys, largest first."""
    sums = collections.defaultdict(collections.Counter)
    for row in rows:
        sums[tuple(row[key] for key in keys)].update({k: row[k] for k in ('calls', 'bytes', 'flop', 'sec')})
    found = [{**dict(zip(keys, names, strict=True)), **sums[names]} for names in sums]
    return sorted(found, key=lambda row: -row['bytes'])


def is_convolution(row):
    """Whether a row is of dense convolutions, not of filters or anything else."""
    return row['kind'].startswith('convolution')


def readable(row):
    """A row in GB, GFLOP and milliseconds."""
    names = {k: v for k, v in row.items() if isinstance(v, str)}
    return {**names, 'calls': round(row['calls'], 1), 'GB': round(row['bytes'] / GB, 3),
            'GFLOP': round(row['flop'] / GB, 1), 'ms': round(row['sec'] * 1e3, 3)}


def report(rows, calls, machine, batch_size, top):
    """Print the tables."""
    print('Per iteration, each phase by its share of the iterations:')
    common.print_table([readable(row) for row in totals(rows, 'phase')])
    print('\nBy kind of operation:')
    common.print_table([readable(row) for row in totals(rows, 'kind')])
    if top:
        print(f'\nThe {top} largest:')
        common.print_table([readable(row) for row in rows[:top]])
        print(f'\nThe {top} with most calls:')
        most = sorted(totals(rows, 'phase', 'way', 'layer', 'kind'), key=lambda row: -row['calls'])
        common.print_table([readable(row) for row in most[:top]])
    dense, other = [sum(row['bytes'] for row in rows if is_convolution(row) is wanted) / GB
                    for wanted in (True, False)]
    number, seconds = sum(row['calls'] for row in rows), sum(row['sec'] for row in rows)
    small = sum(n for call, n in calls.items() if call.bytes < SMALL_BYTES)
    print(f'\n{dense:.1f} GB in convolutions and {other:.1f} GB in everything else; {number:,.0f} '
          f'operations, {small:,.0f} of them below {SMALL_BYTES / 1e6:.0f} MB')
    rates = ', '.join(f'{rate / TERA:g} in {dtype}' for dtype, rate in machine.convolution.items())
    print(f'Predicted: {seconds * 1e3:.1f} ms per iteration, {seconds / batch_size * 1000:.2f} s/kimg. '
          f'Assumed: {machine.bandwidth / TERA:g} TB/s; TFLOP/s of convolutions {rates}, of the rest '
          f'{machine.plain / TERA:g}; every operation alone, in {machine.launch * 1e6:g} us at least; '
          'nothing stays in the cache; no time for data, communication and the host.')


def compare(old_path, new_path):
    """Print what has changed between two JSON files, by kind and in all."""
    old, new = ({row['kind']: row for row in totals([*rows, *({**r, 'kind': 'all'} for r in rows)], 'kind')}
                for rows in (json.loads(Path(path).read_text())['rows'] for path in (old_path, new_path)))
    nothing = dict.fromkeys(('calls', 'bytes', 'flop', 'sec'), 0.0)
    lines = []
    for kind in dict.fromkeys([*old, *new]):
        pair = [readable(rows.get(kind, nothing)) for rows in (old, new)]
        lines.append({'kind': kind} | {
            f'{name} {when}': row[name] for name in ('calls', 'GB', 'ms')
            for when, row in zip(('old', 'new'), pair, strict=True)})
    common.print_table(lines)


def parse_flags(words):
    """Options of train.py as given on the command line: --name=value."""
    kinds, flags = {option.name: option for option in OPTIONS}, {}
    for word in words:
        name, has_value, value = word.removeprefix('--').partition('=')
        if not word.startswith('--') or name not in kinds or not has_value:
            raise UserError(f'{word} is no option of this program, nor one of train.py with its =value')
        kind = kinds[name].kind
        convert = click.types.convert_type(kind if isinstance(kind, type) else str)
        flags[kinds[name].key] = convert(value)
    return flags


@click.command(context_settings={
    'show_default': True, 'ignore_unknown_options': True, 'help_option_names': ['--help']})
@click.argument('flags', nargs=-1, type=click.UNPROCESSED)
@click.option('--resolution', default=256, help='Side of the images.')
@click.option('--label-dim', default=0, help='Classes of the dataset.')
@click.option('--augment-p', default=0.5, help='Probability of the augmentation.')
@click.option('--augment-seed', default=0, help='Seed of what it draws.')
@click.option('--bandwidth', default=2.7, help='TB/s of memory: 0.8 of the 3.35 in the H100 data sheet.')
@click.option('--fp16-tflops', default=450.0, help='Of 16-bit convolutions: 0.45 of the data sheet.')
@click.option('--tf32-tflops', default=225.0, help='Of TF32 convolutions: 0.45 of the data sheet.')
@click.option('--fp32-tflops', default=40.0, help='Of everything else: 0.6 of the data sheet.')
@click.option('--launch-us', default=2.5, help='Least time of an operation, in CUDA graphs.')
@click.option('--top', default=25, help='Length of the lists of the largest entries.')
@click.option('--json', 'json_path', type=click.Path(), help='Write all entries here.')
@click.option('--compare', 'compared', type=click.Path(exists=True), nargs=2, help='Two such files.')
def main(flags, resolution, label_dim, top, json_path, compared, **figures):
    """Count an iteration of train.py with FLAGS, options of train.py in the form --name=value."""
    if compared:
        compare(*compared)
        return
    info = DatasetInfo('random', 10000, resolution, resolution, 3)
    config = resolve({'outdir': 'unused', 'data': 'random', **parse_flags(flags)}, info)
    calls = count(config, label_dim, p=figures['augment_p'], seed=figures['augment_seed'])
    machine = machine_for(config, *(figures[name] for name in (
        'bandwidth', 'fp16_tflops', 'tf32_tflops', 'fp32_tflops', 'launch_us')))
    rows = rows_of(calls, machine)
    common.write_json(json_path, META, rows)
    report(rows, calls, machine, config.batch_size, top)


if __name__ == '__main__':
    run_command(main)
