# SPDX-License-Identifier: Apache-2.0
"""Profile a training step: every kernel, or a timeline: python profile_step.py --cfg=demo"""
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import run_command
from dnnlib.progress import write
from dnnlib.util import UserError, replace_file
from torch_utils import custom_ops
from torch_utils.misc import keep_freed_memory, pick_device
from training import config as cfg
from training.capacity import dry_run
from training.dataset import ImageFolderDataset
from training.profiling.record import MICRO, ProfiledRun, micro_config, record_step
from training.profiling.report import ProfileReport, to_csv, to_json, to_text
from training.profiling.timeline import time_steps, timeline_header, timeline_line, timeline_summary
from training.systems.micro import RESOLUTION as MICRO_RESOLUTION

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python profile_step.py --cfg=demo --resolution=32 --rows=30
  python profile_step.py --cfg=stylegan2 --data=images.zip --csv=step.csv --trace=step.json
  python profile_step.py --timeline
'''
DEFAULT_RESOLUTION, DEFAULT_CHANNELS, TIMELINE_STEPS = 32, 3, 20
# Options of train.py that change what a step computes.
SHARED = ('data', 'cond', 'subset', 'mirror', 'gamma', 'batch', 'batch-gpu', 'cbase', 'cmax', 'glr', 'dlr',
          'aug', 'p', 'augpipe', 'precision', 'device', 'ops')


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options shared with train.py."""
    by_name = {option.name: option for option in cfg.OPTIONS}
    for name in reversed([name for name in SHARED if name in by_name]):
        option = by_name[name]
        kind = click.Choice(option.kind) if isinstance(option.kind, tuple) else option.kind
        text = f'{option.help}  [default: {option.default}]' if option.default else option.help
        command = click.option(f'--{name}', type=kind, help=text)(command)
    return command


@click.command(epilog=EXAMPLES, context_settings={'terminal_width': 110})
@click.option('--cfg', 'cfg_name', type=click.Choice([*cfg.PRESETS, MICRO]),
              help='Preset, as in train.py; micro: a small StyleGAN2 for 16x16 images.  '
                   '[default: auto; micro with --timeline]')
@click.option('--resolution', metavar='SIDE', type=click.IntRange(min=1),
              help='Side of random images, without --data.  [default: 32; 64 with dcgan, 16 with micro]')
@click.option('--channels', metavar='N', type=click.IntRange(min=1),
              help=f'Channels of random images, without --data.  [default: {DEFAULT_CHANNELS}]')
@click.option('--timeline', is_flag=True,
              help='Print milliseconds of copies and kernels per iteration instead of a kernel table.')
@click.option('--steps', type=click.IntRange(min=1), metavar='N',
              help=f'Number of iterations of --timeline.  [default: {TIMELINE_STEPS}]')
@click.option('--rows', type=click.IntRange(min=0), metavar='N',
              help='Print only the N slowest kernels; files and totals include all.  [default: all]')
@click.option('--text', metavar='FILE', help='Also write the full table and all totals to this file.')
@click.option('--csv', metavar='FILE', help='Write one line per kernel to this file.')
@click.option('--json', metavar='FILE', help='Write kernels and totals to this file.')
@click.option('--trace', metavar='FILE', help='Write a trace for Chrome or Perfetto to this file.')
@shared_options
def command(timeline: bool, rows: int | None, steps: int | None, **flags: Any) -> None:
    """List every kernel of a training step with its layer, shapes and time, or print a timeline.

    The profiled step runs all phases, after warm-up steps. No trained weights are kept.
    """
    files = {name: flags.pop(name) for name in ('text', 'csv', 'json', 'trace')}
    check_combination(timeline, steps, rows, files)
    name = flags.pop('cfg_name') or (MICRO if timeline else 'auto')
    custom_ops.set_mode(flags.get('ops') or 'auto')
    run = build_run(name, flags)
    if timeline:
        print_timeline(run, name, steps or TIMELINE_STEPS)
    else:
        print_profile(run, name, rows, files)


def check_combination(timeline: bool, steps: int | None, rows: int | None, files: dict[str, Any]) -> None:
    """Raise UserError for options of the other mode, and for files that cannot be written."""
    given = [option for option, value in {'rows': rows, **files}.items() if value is not None]
    if timeline and given:
        raise UserError(f'--{given[0]} is for the kernel table; it cannot be combined with --timeline')
    if not timeline and steps is not None:
        raise UserError(f'--steps={steps} needs --timeline; the kernel table is always of one step')
    for option, path in files.items():
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f'--{option}={path}: the folder does not exist; create it or choose another')


def build_run(name: str, flags: dict[str, Any]) -> ProfiledRun:
    """The run to measure.  name: of the preset.  flags: the other options of the command line."""
    flags = {option: value for option, value in flags.items() if value is not None}
    # Errors about the command line come first.
    device = pick_device(flags.get('device', 'auto'))
    keep_freed_memory(device)  # as train.py does
    side, channels = flags.pop('resolution', None), flags.pop('channels', None)
    if 'data' in flags:
        return _run_on_images(name, flags, device, {'resolution': side, 'channels': channels})
    if name == MICRO:
        _check_micro({**flags, 'resolution': None if side == MICRO_RESOLUTION else side})
        return ProfiledRun(micro_config(flags), device, channels=channels or DEFAULT_CHANNELS, is_micro=True)
    side = side or (64 if name == 'dcgan' else DEFAULT_RESOLUTION)
    info = cfg.DatasetInfo('random', 10000, side, side, channels or DEFAULT_CHANNELS)
    config = cfg.resolve({**flags, 'cfg': name, 'data': 'random'}, info)
    return ProfiledRun(config, device, channels=info.channels)


def _run_on_images(
    name: str, flags: dict[str, Any], device: torch.device, refused: dict[str, int | None],
) -> ProfiledRun:
    for option, value in refused.items():
        if value is not None:
            raise UserError(f'--{option}={value} is for random images and cannot be combined with --data')
    if name == MICRO:
        _check_micro(flags)
    info, _ = dry_run.open_dataset(flags['data'], bool(flags.get('cond')))
    config = cfg.resolve({**flags, 'cfg': name}, info)
    return ProfiledRun(config, device, dataset=ImageFolderDataset(**config.data.kwargs()))


def _check_micro(flags: dict[str, Any]) -> None:
    """Raise UserError for options that --cfg=micro does not support."""
    for option in ('data', 'resolution', 'aug', 'p', 'augpipe'):
        if flags.get(option) is not None:
            raise UserError(
                f'--{option}={flags[option]}: --cfg=micro always uses random images of '
                f'{MICRO_RESOLUTION}x{MICRO_RESOLUTION} without augmentation; choose another --cfg')


def print_timeline(run: ProfiledRun, name: str, num_steps: int) -> None:
    """Print a header, one line per iteration, and medians."""
    write(timeline_header(run, name, num_steps, device_name(run.device)))
    steps = []
    for step in time_steps(run, num_steps):
        write(timeline_line(len(steps), step))
        steps.append(step)
    write(timeline_summary(steps))


def print_profile(run: ProfiledRun, name: str, rows: int | None, files: dict[str, str | None]) -> None:
    """Profile a step, print the report and write the requested files."""
    report = ProfileReport(record_step(run, files['trace']))
    height, width = run.config.data.size
    environment = {
        'cfg': name, 'resolution': f'{width}x{height}', 'batch': run.config.batch_size,
        'batch_gpu': run.config.batch_gpu, 'device': device_name(run.device), 'torch': torch.__version__,
        'kernels': 'GPU kernels' if report.record.on_gpu else 'CPU operations'}
    header = 'One training step: ' + ', '.join(f'{key} {value}' for key, value in environment.items())
    click.echo(to_text(report, header, rows))
    contents = {'text': lambda: to_text(report, header), 'csv': lambda: to_csv(report),
                'json': lambda: to_json(report, environment)}
    for option, content in contents.items():
        path = files[option]
        if path is not None:
            with replace_file(path) as temporary:
                temporary.write_text(content(), encoding='utf-8')


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU's architecture with the number of threads in use."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU ({platform.machine()}, {torch.get_num_threads()} threads)'


def main(args: list[str] | None = None) -> None:
    """Entry point of the command line."""
    run_command(command, args)


if __name__ == '__main__':
    main()
