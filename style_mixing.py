# SPDX-License-Identifier: Apache-2.0
"""Mix styles: a table of images (or a video) with coarse styles of one seed and fine styles of another."""
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
from training.sampling.walks import LatentWalk, compose, walk_through, write_frames

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821 --styles=0-6
  python style_mixing.py --outdir=out --network=net.pkl --rows=85,100,75 --cols=55,821,9 --video=mix.mp4
'''
DEFAULT_STYLES = range(7)  # as published: coarse and middle styles of large networks
MAX_CELLS = 100_000

Pair = tuple[int, int]  # seed of the row, seed of the column


@click.command(cls=GroupedCommand, epilog=EXAMPLES, context_settings={'terminal_width': 110})
@generator_options
@option('Images', '--rows', type=NumberList(), required=True,
        help='Row seeds, such as 0-5 or 85,100,75.')
@option('Images', '--cols', type=NumberList(), required=True, help='Column seeds.')
@option('Images', '--styles', type=NumberList(),
        help='ws taken from the column seed.  [default: 0-6, or fewer]')
@video_options
def mix_styles(  # noqa: PLR0913
    network: str, outdir: str, trunc: float, class_idx: int | None, noise_mode: str, device: str, batch: int,
    trust_pickle: bool, cuda_graphs: str, rows: Sequence[int], cols: Sequence[int],
    styles: Sequence[int] | None, video: VideoOptions,
) -> None:
    """Mix the styles of pairs of seeds: writes ROW-COLUMN.png, and all of them as grid.png.

    With --video: a video in which a single column walks through all column seeds.
    """
    video.check(outdir)
    if not rows or not cols or (len(rows) + 1) * (len(cols) + 1) > MAX_CELLS:
        raise UserError(f'--rows and --cols make a table of {len(rows)} x {len(cols)}; both must name a '
                        f'seed, and the table can have at most {MAX_CELLS} cells')
    if is_archive(outdir):
        raise UserError(f'--outdir={outdir}: must be a folder, not a .zip')
    sampler = open_sampler(network, device, noise_mode, trunc, trust_pickle, cuda_graphs)
    mixed = _checked_styles(styles, sampler.G.num_ws)
    label = sampler.label(class_idx)
    if video.file_name is not None:
        source = SeedSource(sampler, cols, (class_idx if sampler.G.c_dim > 0 else None,))
        walk = walk_through(source, 1, video)
        fixed = {row: sampler.styles([row], label)[0] for row in rows}
        _write_video(Path(make_folder(outdir), video.file_name), sampler, walk, fixed, mixed, batch, video)
        return
    folder = make_folder(outdir)
    # One by one: an image must not depend on the rest of its batch.
    seeds = dict.fromkeys([*rows, *cols])
    ws = {seed: sampler.styles([seed], label)[0] for seed in seeds}
    sheet = _write_table(sampler, ws, table_cells(rows, cols), mixed, batch, folder)
    sheet.save(folder / 'grid.png')


def _checked_styles(styles: Sequence[int] | None, num_ws: int) -> list[int]:
    if styles is None:
        return [i for i in DEFAULT_STYLES if i < num_ws]
    if styles and max(styles) >= num_ws:
        raise UserError(f'--styles: {max(styles)} is out of range; this network has ws 0 to {num_ws - 1}')
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
    """ws [num_ws, w_dim] of a row, with those of a column at the given indices."""
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
            images = sampler.images(mixtures, [_noise_seed(pair) for pair in chunk])
            for pair, pixels in zip(chunk, images, strict=True):
                image_io.save_png(folder / f'{pair[0]}-{pair[1]}.png', pixels)
                sheet = sheet or image_io.ContactSheet(columns, rows, pixels.shape)
                for cell in cells[pair]:
                    sheet.put(*cell, pixels)
            bar.update(len(chunk))
    return sheet


def _write_video(
    path: Path, sampler: Sampler, walk: LatentWalk, rows: Mapping[int, torch.Tensor], styles: Sequence[int],
    batch: int, video: VideoOptions,
) -> None:
    """Two columns: the rows unmixed, and mixed with a walk, whose own image is at the top."""
    steps, walker = walk.positions(video), walk.noise_seeds[0]
    still = {(0, i + 1): sampler.images(ws[None], [row])[0] for i, (row, ws) in enumerate(rows.items())}
    # A mixture keeps the noise of the first seed throughout; changing noise would flicker.
    noise_seeds = [walker, *(_noise_seed((row, walker)) for row in rows)]
    tables = sampler.tables(((mix_all(rows, walk.at(step)[0], styles), noise_seeds) for step in steps), batch)
    size, places = (2, len(rows) + 1), [(1, i) for i in range(len(rows) + 1)]
    frames = (compose({**still, **dict(zip(places, moving, strict=True))}, size, video.video_scale)
              for moving in tables)
    write_frames(path, frames, len(steps), video)


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
