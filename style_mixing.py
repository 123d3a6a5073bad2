# SPDX-License-Identifier: Apache-2.0
"""Mix styles: a table of images (or a video) with coarse styles of one seed and fine styles of another."""
from typing import Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import GroupedCommand, NumberList, generator_options, option, video_options
from training.sampling.jobs import MixingJob

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821 --styles=0-3
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821,9 --video=mix.mp4
'''


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@generator_options
@option('Images', '--rows', type=NumberList(), required=True,
        help='Row seeds, such as 0-5, 85,100,75 or 1,3-5.')
@option('Images', '--cols', type=NumberList(), required=True, help='Column seeds.')
@option('Images', '--styles', type=NumberList(), help='ws taken from the column seed.  '
        '[default: 0-6, of networks with fewer than 8 ws the coarse half]')
@video_options
def mix_styles(**options: Any) -> None:
    """Mix the styles of pairs of seeds: writes ROW-COLUMN.png, and all of them as grid.png.

    With --video: a video in which a single column walks through all column seeds.
    """
    job = MixingJob(**options)
    job.check()
    # Imported late: importing torch takes seconds, which neither --help nor a wrong option should.
    from training.sampling.mixing import run
    run(job)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(mix_styles, args)


if __name__ == '__main__':
    main()
