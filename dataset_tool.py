# SPDX-License-Identifier: Apache-2.0
"""Convert images to a dataset for training: python dataset_tool.py --source=images --dest=mine.zip"""
import math
from typing import Literal

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import GroupedCommand, TableSize
from dnnlib.util import UserError
from training.datasets.check import check_dataset
from training.datasets.convert import convert_dataset
from training.datasets.deep import Range
from training.datasets.images import MAX_MEGAPIXELS, MODE_CHANNELS, Reading
from training.datasets.sources import open_source
from training.datasets.transforms import RESIZE_FILTERS, TRANSFORMS, TransformSettings

POSITIVE = click.IntRange(min=1)
SIDE = click.IntRange(1, 16384)  # a typing error must not exhaust memory


@click.command(cls=GroupedCommand, context_settings={'show_default': True})
@click.option('--source', metavar='PATH', required=True,
              help='Input: a folder, .zip, cifar-10-python.tar.gz, train-images-idx3-ubyte.gz or *_lmdb '
                   'folder (LSUN).')
@click.option('--dest', metavar='PATH', help='Output: a .zip, or an empty folder.')
@click.option('--max-images', '--max_images', type=POSITIVE, metavar='N',
              help='Convert only the first N images.  [default: all]')
@click.option('--transform', type=click.Choice(TRANSFORMS),
              help='Crop before resizing. center-crop: the largest centred square. center-crop-wide: a band '
                   'of --height on a black square of --width, stretched as by the published tool.')
@click.option('--width', type=SIDE, metavar='N',
              help='Output width.  [default: that of the source]')
@click.option('--height', type=SIDE, metavar='N',
              help='Output height.  [default: that of the source]')
@click.option('--resolution', type=TableSize(), metavar='NxN',
              help='The same as --width and --height, such as 256x256.')
@click.option('--resize-filter', type=click.Choice(list(RESIZE_FILTERS)), default='lanczos',
              help='Resampling filter.')
@click.option('--mode', type=click.Choice(list(MODE_CHANNELS)),
              help='Convert all images to gray (L), RGB, ...; dropped alpha is composited over white.  '
                   '[default: keep]')
@click.option('--range', 'value_range', metavar='auto|X,X', default='auto',
              help='Values of images with more than 8 bits per channel that become 0 to 255. auto: as many '
                   'bits as the largest value of all images has; for floats 0 to 1 or the like.')
@click.option('--frames', type=click.Choice(['first', 'all']), default='first',
              help='Frames of animations and stacks (GIF, WebP, APNG, TIFF) that become images.')
@click.option('--max-megapixels', type=POSITIVE, metavar='N', default=MAX_MEGAPIXELS,
              help='Refuse larger images, which a small file can claim to be.')
@click.option('--any-shape', is_flag=True,
              help='Allow sizes other than square powers of two (even sides), and 1 to 4 channels.')
@click.option('--labels', default='auto', metavar='auto|folders|none|FILE.csv',
              help='auto: from dataset.json or the archive. folders: each top-level folder is a class. '
                   'CSV: one image per row: file name, then a class (number or word) or several numbers.')
@click.option('--workers', type=click.IntRange(min=0), metavar='N',
              help='Worker processes that decode and resize; 0: no workers.  [default: number of CPUs]')
@click.option('--on-error', type=click.Choice(['stop', 'skip']),
              help='Stop at an unreadable image, or skip it and list it at the end.  '
                   '[default: stop; LSUN: skip]')
@click.option('--check', is_flag=True,
              help='Only validate the dataset --source: sizes, modes, range, labels, duplicates.')
@click.option('--strict', is_flag=True,
              help='Refuse a source of which something is not used: unreadable formats, frames, labels.')
def convert_command(  # noqa: PLR0913
    source: str, dest: str | None, max_images: int | None, transform: str | None, width: int | None,
    height: int | None, resolution: tuple[int, int] | None, resize_filter: str, mode: str | None,
    value_range: str, frames: str, max_megapixels: int, any_shape: bool, labels: str, workers: int | None,
    on_error: str | None, check: bool, strict: bool,
) -> None:
    """Convert images to a dataset: a .zip or folder of PNG files of one size, with labels in dataset.json.

    The images must be square with a power-of-two side unless --any-shape is given; crop and resize with
    --transform, --width and --height. dataset.json is {"labels": [["a.png", 3], ...]}, or vectors instead of
    class numbers. What of the source is not used is listed. On failure no output is left behind.
    """
    if check:
        print_check(source, workers, max_megapixels, strict=strict)
        return
    # Not required=True: --check needs no --dest. An empty string counts as missing.
    if not dest:
        raise click.UsageError('--dest must name a folder or a .zip')
    if resolution is not None:
        if width is not None or height is not None:
            raise UserError('--resolution excludes --width and --height; give one or the other')
        width, height = resolution
    settings = TransformSettings(transform, width, height, resize_filter, mode)
    # Check all options before reading the first image.
    images = open_source(source, labels, Reading(parse_range(value_range), max_megapixels, frames == 'all'))
    summary = convert_dataset(images, dest, settings, max_images=max_images, any_shape=any_shape,
                              on_error=on_error, workers=workers, strict=strict)
    click.echo('\n'.join([*images.notes, *summary.lines(), f'Dataset: {dest}']))


def parse_range(text: str) -> Range | Literal['auto']:
    """'auto', or two numbers 'LOW,HIGH', the second larger. Raises UserError for anything else."""
    if text == 'auto':
        return 'auto'
    try:
        low, high = (float(part) for part in text.split(','))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f'--range={text} must be auto or two numbers such as 0,4095')
    return low, high


def print_check(source: str, workers: int | None, max_megapixels: int, *, strict: bool) -> None:
    """Print the report on a dataset. Raises UserError with the first problem if it cannot be trained on.

    strict: also if something in it is not used.
    """
    report = check_dataset(source, workers=workers, max_megapixels=max_megapixels)
    click.echo('\n'.join(report.lines()))
    if report.problems:
        raise UserError(f'{source}: not trainable, {len(report.problems)} problem(s), the first: '
                        f'{report.problems[0]}')
    report.ledger.check(strict=strict)
    click.echo('OK: this dataset can be used for training.')


def main(args: list[str] | None = None) -> None:
    """Entry point of the command line."""
    run_command(convert_command, args)


if __name__ == '__main__':
    main()
