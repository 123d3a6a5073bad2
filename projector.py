# SPDX-License-Identifier: Apache-2.0
"""Project images into the latent space of a trained network."""
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import MAX_SEED, GroupedCommand, LabelOptions, collected, label_rows
from dnnlib.cli_options import option as grouped_option

if TYPE_CHECKING:
    from training.projection.search import project

__all__ = ['main', 'project', 'run_projection']

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python projector.py --outdir=out --network=net.pkl --target=portrait.png
  python projector.py --outdir=out --network=net.pkl --target=folder --space=w+ --tune=350
'''
DEFAULT_SEED = 303  # published

option = functools.partial(grouped_option, 'Options')


def label_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: --class and --label, passed to the command as one argument `label`, a LabelOptions."""
    command = collected(command, 'label', LabelOptions)
    for decorate in reversed(label_rows(option, 'none; conditional networks need one')):
        command = decorate(command)
    return command


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@option('--network', required=True, metavar='FILE|URL',
        help='Network file whose G_ema to use, or a run directory: its newest snapshot; path, URL or '
             'hf://user/repo.')
@option('--target', 'targets', required=True, multiple=True, metavar='FILE|DIR',
        help='Target image, or a directory of images. May be repeated.')
@option('--outdir', required=True, metavar='DIR', help='Output directory.')
@option('--num-steps', type=click.IntRange(min=1), default=1000, show_default=True,
        help='Optimization steps.')
@option('--seed', type=click.IntRange(0, MAX_SEED), default=DEFAULT_SEED, show_default=True,
        help='Random seed; same seed, same output.')
@option('--save-video', type=bool, default=True, show_default=True,
        help='Write proj.mp4: target and projection side by side, one frame per step.')
@option('--space', type=click.Choice(['w', 'w+']), default='w', show_default=True,
        help='w: one w for all layers, easier to edit; w+: one w per layer, closer to the target.')
@option('--init-w', '--init_w', metavar='FILE',
        help='Start from the ws of an .npz file written by projector.py instead of the mean w.')
@label_options
@option('--distance', type=click.Choice(['auto', 'vgg16', 'pixel']), default='auto', show_default=True,
        help='vgg16: perceptual (LPIPS features, downloaded once); pixel: no download; auto: vgg16, or '
             'pixel if VGG16 is not available.')
@option('--detector-dir', metavar='DIR', type=click.Path(exists=True, file_okay=False),
        help='Directory to search first for vgg16.pt.')
@option('--noise', type=click.Choice(['fit', 'redraw', 'keep']), default='fit', show_default=True,
        help='Noise maps. fit: optimize those of the network; redraw: optimize random ones; keep: no '
             'change.')
@option('--patience', type=click.IntRange(min=1),
        help='Stop a target early once N steps have not reduced its distance by 1 %.')
@option('--tune', type=click.IntRange(min=0), default=0,
        help='Pivotal tuning: then fine-tune the network for N steps and write it to tuned.pkl.')
@option('--batch', type=click.IntRange(min=1), default=4, show_default=True,
        help='Targets per batch.')
@option('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
        help='auto: GPU if available.')
@option('--trust-pickle', is_flag=True,
        help='Execute the code inside the network file. Only for files from a trusted source.')
def run_projection(**options: Any) -> None:
    """Find the latent w whose generated image is closest to a target image."""
    options['label'].check()
    # Imported late, here and below: importing torch takes seconds, which --help should not.
    from training.projection.results import run
    run(**options)


def __getattr__(name: str) -> Any:
    """The published function `project`, imported at first use."""
    if name != 'project':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from training.projection.search import project
    return project


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(run_projection, args)


if __name__ == '__main__':
    main()
