# SPDX-License-Identifier: Apache-2.0
"""Writes a table of pictures that take coarse styles from one seed and fine ones from another."""
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import click
import torch

from dnnlib import image_io
from dnnlib.cli import run_command
from dnnlib.cli_options import NumberList, generator_options, make_folder
from dnnlib.progress import progress
from dnnlib.util import UserError
from training.sampling import Sampler, open_sampler

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Example:
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821 --styles=0-6
'''
DEFAULT_STYLES = range(7)  # as published: the coarse and middle ones of large networks
MAX_CELLS = 100_000

Pair = tuple[int, int]  # seed of the row, seed of the column


@click.command(epilog=EXAMPLES)
@generator_options
@click.option('--rows', type=NumberList(), required=True, help='Seeds of the rows, such as 0-5 or 85,100,75.')
@click.option('--cols', type=NumberList(), required=True, help='Seeds of the columns.')
@click.option('--styles', type=NumberList(), help='Which ws come from the column.  [default: 0-6, or fewer]')
def mix_styles(  # noqa: PLR0913
    network: str, outdir: str, trunc: float, class_idx: int | None, noise_mode: str, device: str, batch: int,
    trust_pickle: bool, rows: Sequence[int], cols: Sequence[int], styles: Sequence[int] | None,
) -> None:
    """Write pictures that mix the styles of two seeds: ROW-COLUMN.png, and all of them in grid.png."""
    if not rows or not cols or (len(rows) + 1) * (len(cols) + 1) > MAX_CELLS:
        raise UserError(f'--rows and --cols: a table of {len(rows)} x {len(cols)}; both must name a seed, '
                        f'and the table must have at most {MAX_CELLS} cells')
    sampler = open_sampler(network, device, noise_mode, trunc, trust_pickle)
    mixed = _checked_styles(styles, sampler.G.num_ws)
    label = sampler.label(class_idx)
    folder = make_folder(outdir)
    # One by one: what a seed looks like must not depend on the others.
    seeds = dict.fromkeys([*rows, *cols])
    ws = {seed: sampler.styles([seed], label)[0] for seed in seeds}
    sheet = _write_table(sampler, ws, table_cells(rows, cols), mixed, batch, folder)
    sheet.save(folder / 'grid.png')


def _checked_styles(styles: Sequence[int] | None, num_ws: int) -> list[int]:
    if styles is None:
        return [i for i in DEFAULT_STYLES if i < num_ws]
    if styles and max(styles) >= num_ws:
        raise UserError(f'--styles: {max(styles)} is not one of the ws of this network, 0 to {num_ws - 1}')
    return list(styles)


def table_cells(rows: Sequence[int], cols: Sequence[int]) -> dict[Pair, list[tuple[int, int]]]:
    """(row seed, column seed) -> the cells (column, row) of the table that show this mixture.

    Row 0 and column 0 show the seeds themselves, as mixtures with themselves; the corner stays empty.
    """
    cells: dict[Pair, list[tuple[int, int]]] = {}
    for i, seed in enumerate(rows):
        cells.setdefault((seed, seed), []).append((0, i + 1))
    for j, seed in enumerate(cols):
        cells.setdefault((seed, seed), []).append((j + 1, 0))
    for i, row in enumerate(rows):
        for j, column in enumerate(cols):
            cells.setdefault((row, column), []).append((j + 1, i + 1))
    return cells


def mix(row: torch.Tensor, column: torch.Tensor, styles: Sequence[int]) -> torch.Tensor:
    """ws [num_ws, w_dim] of a row with those of a column at the given indices."""
    mixture = row.clone()
    mixture[list(styles)] = column[list(styles)]
    return mixture


def _write_table(
    sampler: Sampler, ws: Mapping[int, torch.Tensor], cells: Mapping[Pair, list[tuple[int, int]]],
    styles: Sequence[int], batch: int, folder: Path,
) -> image_io.Sheet:
    """Write each mixture and return the sheet of all."""
    columns, rows = (max(axis) + 1 for axis in zip(*chain(*cells.values()), strict=True))
    sheet, pairs = None, iter(cells)
    with progress(total=len(cells), desc='Mixing', unit='img') as bar:
        while chunk := list(islice(pairs, batch)):
            mixtures = torch.stack([mix(ws[row], ws[column], styles) for row, column in chunk])
            pictures = sampler.pictures(mixtures, [_noise_seed(pair) for pair in chunk])
            for pair, pixels in zip(chunk, pictures, strict=True):
                image_io.save_png(folder / f'{pair[0]}-{pair[1]}.png', pixels)
                sheet = sheet or image_io.Sheet(columns, rows, pixels.shape)
                for cell in cells[pair]:
                    sheet.put(*cell, pixels)
            bar.update(len(chunk))
    return sheet


def _noise_seed(pair: Pair) -> int:
    """A seed of its own for each mixture; that of generate.py for a seed mixed with itself."""
    row, column = pair
    return row if row == column else row << 32 | column


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(mix_styles, args)


if __name__ == '__main__':
    main()
