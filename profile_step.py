# SPDX-License-Identifier: Apache-2.0
"""Profile a training step: every kernel, or a timeline: python profile_step.py --cfg=demo"""
import dataclasses
import functools
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import GroupedCommand, setting
from dnnlib.cli_options import option as grouped_option
from dnnlib.util import UserError
from training import config as cfg
from training.profiling import CHANNELS, MICRO

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python profile_step.py --cfg=demo --resolution=32 --rows=30
  python profile_step.py --cfg=stylegan2 --data=images.zip --csv=step.csv --trace=step.json
  python profile_step.py --timeline
'''
TIMELINE_STEPS = 20
# Options of train.py that change what a step computes.
SHARED = ('data', 'cond', 'subset', 'mirror', 'gamma', 'batch', 'batch-gpu', 'cbase', 'cmax', 'glr', 'dlr',
          'aug', 'p', 'augpipe', 'precision', 'device', 'ops')

option = functools.partial(grouped_option, 'Profile')


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@option('--cfg', 'cfg_name', type=click.Choice([*cfg.PRESETS, MICRO]),
        help='Preset, as in train.py; micro: a small StyleGAN2 for 16x16 images.  '
             '[default: auto; micro with --timeline]')
@option('--resolution', type=click.IntRange(min=1),
        help='Side of random images, without --data.  [default: 32; 64 with dcgan, 16 with micro]')
@option('--channels', type=click.IntRange(min=1),
        help=f'Channels of random images, without --data.  [default: {CHANNELS}]')
@option('--timeline', is_flag=True,
        help='Print milliseconds of copies and kernels per iteration instead of a kernel table.')
@option('--steps', type=click.IntRange(min=1),
        help=f'Number of iterations of --timeline.  [default: {TIMELINE_STEPS}]')
@option('--rows', type=click.IntRange(min=0),
        help='Print only the N slowest kernels; files and totals include all.  [default: all]')
@option('--text', metavar='FILE', help='Also write the full table and all totals to this file.')
@option('--csv', metavar='FILE', help='Write one line per kernel to this file.')
@option('--json', metavar='FILE', help='Write kernels and totals to this file.')
@option('--trace', metavar='FILE', help='Write a trace for Chrome or Perfetto to this file.')
def command(timeline: bool, rows: int | None, steps: int | None, **flags: Any) -> None:
    """List every kernel of a training step with its layer, shapes and time, or print a timeline.

    The profiled step runs all phases, after warm-up steps. No trained weights are kept.
    """
    files = {name: flags.pop(name) for name in ('text', 'csv', 'json', 'trace')}
    check_combination(timeline, steps, rows, files)
    name = flags.pop('cfg_name') or (MICRO if timeline else 'auto')
    # Imported late: importing torch takes seconds, which neither --help nor a wrong option should.
    from training.profiling import job
    run = job.build_run(name, flags)
    if timeline:
        job.print_timeline(run, name, steps or TIMELINE_STEPS)
    else:
        job.print_profile(run, name, rows, files)


command.params += [setting(dataclasses.replace(row, required=False)) for row in cfg.OPTIONS
                   if row.name in SHARED]


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


def main(args: list[str] | None = None) -> None:
    """Entry point of the command line."""
    run_command(command, args)


if __name__ == '__main__':
    main()
