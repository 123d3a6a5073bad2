# SPDX-License-Identifier: Apache-2.0
"""The work of style_mixing.py: a table, or a video, of mixtures of pairs of seeds."""
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from dnnlib import image_io
from dnnlib.progress import progress, write
from dnnlib.util import UserError, make_folder
from training.sampling.jobs import MixingJob
from training.sampling.sampler import open_sampler
from training.sampling.sources import SeedSource, classes_of
from training.sampling.walks import compose, walk_through, write_frames

PUBLISHED_STYLES = range(7)  # the coarse and middle ws of large networks

Pair = tuple[int, int]  # seed of the row, seed of the column


def run(job: MixingJob) -> None:
    """Write the table or the video that the checked options of style_mixing.py select. Raises UserError."""
    sampler = open_sampler(
        job.network, job.device, job.noise_mode, job.trunc, job.trust_pickle, job.cuda_graphs)
    seeds = SeedSource(sampler, list(dict.fromkeys([*job.rows, *job.cols])), classes_of(sampler, job.label))
    styles = checked_styles(job.styles, sampler.G.num_ws)
    if job.video.file_name is not None:
        _write_video(Path(job.outdir, job.video.file_name), seeds, job, styles)
        return
    # One by one: an image must not depend on the rest of its batch.
    ws = {seed: seeds.ws([index])[0] for index, seed in enumerate(seeds.seeds)}
    table = Table(seeds, ws, table_cells(job.rows, job.cols), styles)
    sheet = table.write(job, make_folder(job.outdir))
    sheet.save(Path(job.outdir, 'grid.png'), sampler.info())
    write(f'Wrote {len(table.cells)} images and grid.png to {job.outdir}')


def checked_styles(styles: Sequence[int] | None, num_ws: int) -> list[int]:
    """The ws taken from columns; by default those of the published program, if that leaves the row any.

    Raises UserError for ws that the network does not have.
    """
    if styles is not None:
        if styles and max(styles) >= num_ws:
            raise UserError(f'--styles: {max(styles)} is out of range; this network has ws 0 to {num_ws - 1}')
        return list(styles)
    coarse = range(max(num_ws // 2, 1))
    chosen = PUBLISHED_STYLES if len(PUBLISHED_STYLES) < num_ws else coarse
    line = f'Note: columns give ws 0-{chosen[-1]} of {num_ws} (--styles)'
    hint = '' if len(chosen) <= len(coarse) else f'; the coarse half is --styles=0-{coarse[-1]}'
    print(line + hint, file=sys.stderr)
    return list(chosen)


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


@dataclass(frozen=True)
class Table:
    """Mixtures of seeds, their ws by seed, and the cells that show each."""

    seeds: SeedSource
    ws: Mapping[int, torch.Tensor]
    cells: Mapping[Pair, list[tuple[int, int]]]
    styles: Sequence[int]

    def write(self, job: MixingJob, folder: Path) -> image_io.ContactSheet:
        """Write each mixture and return the sheet of all."""
        columns, rows = (max(axis) + 1 for axis in zip(*chain(*self.cells.values()), strict=True))
        captions = [self._caption(pair) for pair in self.cells] if job.captions else []
        sheet, pairs = None, iter(self.cells)
        with progress(total=len(self.cells), desc='Mixing', unit='img') as bar:
            while chunk := list(islice(pairs, job.batch)):
                for pair, pixels in zip(chunk, self._images(chunk), strict=True):
                    image_io.save_png(folder / f'{pair[0]}-{pair[1]}.png', pixels, self._info(pair))
                    sheet = sheet or image_io.ContactSheet(columns, rows, pixels.shape, captions)
                    for cell in self.cells[pair]:
                        sheet.put(*cell, pixels, self._caption(pair))
                bar.update(len(chunk))
        return sheet

    def _images(self, pairs: Sequence[Pair]) -> np.ndarray:
        mixtures = torch.stack([mix(self.ws[row], self.ws[column], self.styles) for row, column in pairs])
        return self.seeds.sampler.images(mixtures, [_noise_seed(pair) for pair in pairs])

    def _caption(self, pair: Pair) -> str:
        row, column = (self.seeds.caption(self.seeds.seeds.index(seed)) for seed in pair)
        return row if row == column else f'{pair[0]}-{pair[1]}'

    def _info(self, pair: Pair) -> dict[str, str]:
        row, column = (self.seeds.info(self.seeds.seeds.index(seed)) for seed in pair)
        if row == column:
            return row
        mixed = {'column_seed': column['seed'], 'styles': ','.join(map(str, self.styles))}
        return {**row, **mixed, **({'column_class': column['class']} if 'class' in column else {})}


def _write_video(path: Path, seeds: SeedSource, job: MixingJob, styles: Sequence[int]) -> None:
    """Two columns: the rows unmixed, and mixed with a walk, whose own image is at the top."""
    sampler = seeds.sampler
    walk = walk_through(SeedSource(sampler, job.cols, seeds.classes), 1, job.video)
    rows = {seed: seeds.ws([seeds.seeds.index(seed)])[0] for seed in job.rows}
    steps, walker = walk.positions(job.video), walk.noise_seeds[0]
    still = {(0, i + 1): sampler.images(ws[None], [row])[0] for i, (row, ws) in enumerate(rows.items())}
    # A mixture keeps the noise of the first seed throughout; changing noise would flicker.
    noise_seeds = [walker, *(_noise_seed((row, walker)) for row in rows)]
    size, places = (2, len(rows) + 1), [(1, i) for i in range(len(rows) + 1)]

    def frames() -> Iterator[np.ndarray]:
        moments = ((mix_all(rows, walk.at(step)[0], styles), noise_seeds) for step in steps)
        for moving in sampler.tables(moments, job.batch):
            yield compose({**still, **dict(zip(places, moving, strict=True))}, size, job.video.video_scale)

    make_folder(job.outdir)
    write_frames(path, frames, len(steps), job.video)


def mix_all(rows: Mapping[int, torch.Tensor], column: torch.Tensor, styles: Sequence[int]) -> torch.Tensor:
    """ws [1 + rows, num_ws, w_dim]: a column, and each row mixed with it."""
    return torch.stack([column, *(mix(row, column, styles) for row in rows.values())])


def _noise_seed(pair: Pair) -> int:
    """A seed of its own for each mixture; that of generate.py for a seed mixed with itself."""
    row, column = pair
    return row if row == column else row << 32 | column
