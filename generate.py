# SPDX-License-Identifier: Apache-2.0
"""Writes pictures of a trained network: one PNG a seed, or one for each w of a projection."""
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch

from dnnlib import image_io
from dnnlib.cli import run_command
from dnnlib.cli_options import NumberList, generator_options, make_folder
from dnnlib.progress import progress
from dnnlib.util import UserError
from training.sampling import Sampler, open_sampler

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python generate.py --outdir=out --network=network-snapshot-000500.pkl --seeds=0-35 --grid
  python generate.py --outdir=out --network=net.pkl --seeds=85,265,297 --trunc=0.7 --class=3
'''

Batch = tuple[list[str], Sequence[int], torch.Tensor]  # file names, seeds of the noise, ws


@click.command(epilog=EXAMPLES)
@generator_options
@click.option('--seeds', type=NumberList(), help='Which pictures, such as 0-35 or 85,265,297.')
@click.option('--projected-w', '--projected_w', metavar='FILE',
              help='Instead of seeds: .npz with an array w [n, num_ws, w_dim], as projector.py writes it.')
@click.option('--grid', is_flag=True, help='Also write grid.png, a sheet of all pictures.')
def generate_images(  # noqa: PLR0913
    network: str, outdir: str, trunc: float, class_idx: int | None, noise_mode: str, device: str, batch: int,
    trust_pickle: bool, seeds: Sequence[int] | None, projected_w: str | None, grid: bool,
) -> None:
    """Write pictures of a trained network."""
    if seeds is None and projected_w is None:
        raise UserError('--seeds is required, such as --seeds=0-35, unless --projected-w is given')
    # What can be refused without it is refused before the network is read.
    sampler = open_sampler(network, device, noise_mode, trunc, trust_pickle)
    if projected_w is not None:
        if seeds is not None:
            click.echo('Warning: --seeds is ignored, because --projected-w is given', err=True)
        w = read_projected_w(projected_w, sampler.G)
        count, batches = len(w), _projected_batches(w.to(sampler.device), batch)
    else:
        count, batches = len(seeds), _seed_batches(sampler, seeds, sampler.label(class_idx), batch)
    # Only now, so that a refused command leaves no folder behind.
    folder = make_folder(outdir)
    if count == 0:
        click.echo('Warning: --seeds is an empty range; nothing to do', err=True)
        return
    _write_pictures(sampler, batches, folder, count, grid)


def _seed_batches(
    sampler: Sampler, seeds: Sequence[int], label: torch.Tensor, size: int,
) -> Iterator[Batch]:
    for start in range(0, len(seeds), size):
        chunk = seeds[start:start + size]
        yield [f'seed{seed:04d}.png' for seed in chunk], chunk, sampler.styles(chunk, label)


def _projected_batches(w: torch.Tensor, size: int) -> Iterator[Batch]:
    for start in range(0, len(w), size):
        indices = range(start, min(start + size, len(w)))
        yield [f'proj{i:02d}.png' for i in indices], indices, w[start:start + size]


def _write_pictures(
    sampler: Sampler, batches: Iterator[Batch], folder: Path, count: int, with_sheet: bool,
) -> None:
    sheet, columns, done = None, 1, 0
    with progress(total=count, desc='Generating', unit='img') as bar:
        for names, noise_seeds, ws in batches:
            for name, pixels in zip(names, sampler.pictures(ws, noise_seeds), strict=True):
                image_io.save_png(folder / name, pixels)
                if with_sheet and sheet is None:
                    columns = sheet_columns(count, pixels.shape)
                    sheet = image_io.Sheet(columns, -(-count // columns), pixels.shape)
                if sheet is not None:
                    sheet.put(done % columns, done // columns, pixels)
                done += 1
            bar.update(len(names))
    if sheet is not None:
        sheet.save(folder / 'grid.png')


def sheet_columns(count: int, shape: tuple[int, ...]) -> int:
    """How many of `count` pictures (C, H, W) to put side by side so that the sheet is about square."""
    _, height, width = shape
    return min(max(round(math.sqrt(count * height / width)), 1), count)


def read_projected_w(path: str, G: torch.nn.Module) -> torch.Tensor:
    """w [n, num_ws, w_dim] float32 of a projection. Raises UserError unless the file fits this network."""
    try:
        # An array of objects would be a pickle, that is, code.
        with np.load(path, allow_pickle=False) as arrays:
            w = np.asarray(arrays['w'], dtype=np.float32)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError,
            zipfile.BadZipFile) as error:
        raise UserError(f'--projected-w={path}: not an .npz file with an array w ({error}); give the '
                        'projected_w.npz of projector.py') from error
    if w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim):
        raise UserError(f'--projected-w={path}: w is {list(w.shape)}, but this network takes '
                        f'[n, {G.num_ws}, {G.w_dim}]; it was projected with another network')
    return torch.from_numpy(w)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(generate_images, args)


if __name__ == '__main__':
    main()
