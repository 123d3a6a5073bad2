# SPDX-License-Identifier: Apache-2.0
"""Generate images from a trained network: from seeds or projected w; sweeps, videos, and directions."""
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import (
    GroupedCommand,
    NumberList,
    TableSize,
    ValueRange,
    collected,
    generator_options,
    option,
    video_options,
)
from training.sampling.jobs import ImageJob, Steering

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python generate.py --outdir=out --network=network-snapshot-000500.pkl --seeds=0-35 --grid
  python generate.py --outdir=out --network=net.pkl --seeds=85,265,297 --trunc=0.7 --class=3
  python generate.py --outdir=set.zip --network=net.pkl --seeds=0-49999 --classes=0-9 --batch=32
  python generate.py --outdir=out --network=net.pkl --seeds=1-6 --video=walk.mp4 --loop --easing=smooth
  python generate.py --outdir=out --network=net.pkl --seeds=0-7 --truncation-sweep=-1:1
  python generate.py --outdir=out --network=net.pkl --find-directions=sefa
  python generate.py --outdir=out --network=net.pkl --seeds=0-7 --direction=out/directions.npz:0
'''

images, sweeps, videos = (partial(option, group) for group in ('Images', 'Sweeps and directions', 'Video'))


def steering_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options of `Steering`, passed to the command as one argument `steering`."""
    options = [
        sweeps('--truncation-sweep', type=ValueRange(), help='Sweep psi from A to B, one row per seed.'),
        sweeps('--class-sweep', type=NumberList(), help='Sweep through these classes, one row per seed.'),
        sweeps('--direction', metavar='FILE:N', help='Move all ws along a direction of a file written '
               'by --find-directions.'),
        sweeps('--strength', type=ValueRange(), help='Distance in standard deviations; a range is a sweep.  '
               '[default: 1; -3:3 for the sheet of --find-directions]'),
        sweeps('--layers', type=NumberList(), help='Indices of the ws to move, or to find directions for.  '
               '[default: those of the file; all]'),
        sweeps('--columns', type=click.IntRange(2, 1000), default=7, show_default=True,
               help='Images per row of a sweep.'),
        sweeps('--find-directions', type=click.Choice(['sefa', 'pca']), help='Write directions.npz and a '
               'sheet of them. sefa: factorise the weights in closed form; pca: principal components of w.'),
        sweeps('--num-directions', type=click.IntRange(min=1), default=10, show_default=True,
               help='Number of directions to find.')]
    command = collected(command, 'steering', Steering)
    for decorate in reversed(options):
        command = decorate(command)
    return command


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@generator_options
@images('--seeds', type=NumberList(), help='Random seeds, one image each, such as 0-35, 85,265,297 or 1,3-5.')
@images('--projected-w', '--projected_w', metavar='FILE', multiple=True,
        help='Instead of seeds: .npz file with an array w [n, num_ws, w_dim], as written by projector.py. '
             'May be repeated.')
@images('--classes', type=NumberList(), help='Cycle through these classes: seed s gets class number s modulo '
        'their count.')
@images('--grid', is_flag=True, help='Also write grid.png, a contact sheet of all images.')
@steering_options
@video_options
@videos('--video-grid', type=TableSize(), help='Several walks side by side, each through its share of the '
        'seeds.  [default: 1x1; one cell per seed of a sweep]')
def generate_images(**options: Any) -> None:
    """Generate images from a trained network into a folder, or into a .zip that is a dataset."""
    job = ImageJob(**options)
    job.check()
    # Imported late: importing torch takes seconds, which neither --help nor a wrong option should.
    from training.sampling.generation import run
    run(job)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(generate_images, args)


if __name__ == '__main__':
    main()
