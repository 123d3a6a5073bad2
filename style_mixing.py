# SPDX-License-Identifier: Apache-2.0
"""Writes a table of pictures that take coarse styles from one seed and fine ones from another, or a video."""
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import click
import torch

from dnnlib import image_io
from dnnlib.cli import run_command
from dnnlib.cli_options import (
    GroupedCommand,
    NumberList,
    VideoOptions,
    generator_options,
    option,
    video_options,
)
from dnnlib.progress import progress
from dnnlib.util import UserError, make_folder
from training.sampling.output import is_archive
from training.sampling.sampler import Sampler, open_sampler
from training.sampling.sources import SeedSource
from training.sampling.walks import Walk, compose, walk_through, write_frames

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821 --styles=0-6
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821,9 --video=mix.mp4
'''
DEFAULT_STYLES = range(7)  # as published: the coarse and middle ones of large networks
MAX_CELLS = 100_000

Pair = tuple[int, int]  # seed of the row, seed of the column


@click.command(cls=GroupedCommand, epilog=EXAMPLES, context_settings={'terminal_width': 110})
@generator_options
@option('Pictures', '--rows', type=NumberList(), required=True,
        help='Seeds of the rows, such as 0-5 or 85,100,75.')
@option('Pictures', '--cols', type=NumberList(), required=True, help='Seeds of the columns.')
@option('Pictures', '--styles', type=NumberList(),
        help='Which ws come from the column.  [default: 0-6, or fewer]')
@video_options
def mix_styles(  # noqa: PLR0913
    network: str, outdir: str, trunc: float, class_idx: int | None, noise_mode: str, device: str, batch: int,
    trust_pickle: bool, cuda_graphs: str, rows: Sequence[int], cols: Sequence[int],
    styles: Sequence[int] | None, film: VideoOptions,
) -> None:
    """Write pictures that mix the styles of two seeds: ROW-COLUMN.png, and all of them in grid.png.

    Or a video, in which a single column walks through the seeds of all columns.
    """
    film.check(outdir)
    if not rows or not cols or (len(rows) + 1) * (len(cols) + 1) > MAX_CELLS:
        raise UserError(f'--rows and --cols: a table of {len(rows)} x {len(cols)}; both must name a seed, '
                        f'and the table must have at most {MAX_CELLS} cells')
    if is_archive(outdir):
        raise UserError(f'--outdir={outdir}: a table of mixtures is no dataset; give a folder')
    sampler = open_sampler(network, device, noise_mode, trunc, trust_pickle, cuda_graphs)
    mixed = _checked_styles(styles, sampler.G.num_ws)
    label = sampler.label(class_idx)
    if film.video is not None:
        source = SeedSource(sampler, cols, (class_idx if sampler.G.c_dim > 0 else None,))
        walk = walk_through(source, 1, film)
        fixed = {row: sampler.styles([row], label)[0] for row in rows}
        _write_video(Path(make_folder(outdir), film.video), sampler, walk, fixed, mixed, batch, film)
        return
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
) -> image_io.ContactSheet:
    """Write each mixture and return the sheet of all."""
    columns, rows = (max(axis) + 1 for axis in zip(*chain(*cells.values()), strict=True))
    sheet, pairs = None, iter(cells)
    with progress(total=len(cells), desc='Mixing', unit='img') as bar:
        while chunk := list(islice(pairs, batch)):
            mixtures = torch.stack([mix(ws[row], ws[column], styles) for row, column in chunk])
            pictures = sampler.pictures(mixtures, [_noise_seed(pair) for pair in chunk])
            for pair, pixels in zip(chunk, pictures, strict=True):
                image_io.save_png(folder / f'{pair[0]}-{pair[1]}.png', pixels)
                sheet = sheet or image_io.ContactSheet(columns, rows, pixels.shape)
                for cell in cells[pair]:
                    sheet.put(*cell, pixels)
            bar.update(len(chunk))
    return sheet


def _write_video(
    path: Path, sampler: Sampler, walk: Walk, rows: Mapping[int, torch.Tensor], styles: Sequence[int],
    batch: int, film: VideoOptions,
) -> None:
    """A table of two columns: the rows as they are, and mixed with a walk, whose own picture is on top."""
    steps, walker = walk.positions(film), walk.noise_seeds[0]
    still = {(0, i + 1): sampler.pictures(ws[None], [row])[0] for i, (row, ws) in enumerate(rows.items())}
    # The noise of a mixture stays that of the first seed: a texture that changes would flicker.
    noise_seeds = [walker, *(_noise_seed((row, walker)) for row in rows)]
    tables = sampler.tables(((mix_all(rows, walk.at(step)[0], styles), noise_seeds) for step in steps), batch)
    size, places = (2, len(rows) + 1), [(1, i) for i in range(len(rows) + 1)]
    frames = (compose({**still, **dict(zip(places, moving, strict=True))}, size, film.video_scale)
              for moving in tables)
    write_frames(path, frames, len(steps), film)


def mix_all(rows: Mapping[int, torch.Tensor], column: torch.Tensor, styles: Sequence[int]) -> torch.Tensor:
    """ws [1 + rows, num_ws, w_dim]: a column, and each row mixed with it."""
    return torch.stack([column, *(mix(row, column, styles) for row in rows.values())])


def _noise_seed(pair: Pair) -> int:
    """A seed of its own for each mixture; that of generate.py for a seed mixed with itself."""
    row, column = pair
    return row if row == column else row << 32 | column


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(mix_styles, args)


if __name__ == '__main__':
    main()
