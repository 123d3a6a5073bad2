# SPDX-License-Identifier: Apache-2.0
"""Videos of walks: the same moment of several walks in the cells of a table, frame by frame."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dnnlib.cli_options import VideoOptions
from dnnlib.progress import progress
from dnnlib.util import UserError
from dnnlib.video import open_video
from training.sampling.interpolation import interpolate, positions
from training.sampling.sampler import Sampler
from training.sampling.sources import SeedSource, Source, Sweep

MAX_CELLS = 1024
MAX_KEYS = 20_000  # ws of all keys are in memory
Cell = tuple[int, int]  # column, row


@dataclass(frozen=True)
class Walk:
    """Several walks side by side. at(position): ws [cells, num_ws, w_dim].

    noise_seeds: one a cell, so that noise does not flicker.
    """

    num_keys: int
    noise_seeds: Sequence[int]
    at: Callable[[float], torch.Tensor]

    def positions(self, film: VideoOptions) -> np.ndarray:
        """Positions [T] of the frames."""
        return positions(self.num_keys, film.step_frames, is_loop=film.loop, is_eased=film.easing == 'smooth')


def check_walk(count: int, cells: int) -> None:
    """Raise UserError unless `count` seeds or ws make a walk in each cell."""
    if count > MAX_KEYS or cells > MAX_CELLS:
        raise UserError(f'--video: {count} pictures in {cells} cells; at most {MAX_KEYS} and {MAX_CELLS}')
    if cells == 1 and count < 2:
        raise UserError(f'--video: a walk needs at least 2 seeds or ws, not {count}')
    if count < 2 * cells or count % cells:
        raise UserError(f'--video: {count} seeds or ws for {cells} cells; a walk needs at least 2, and all '
                        'cells of --video-grid equally many')


def walk_through(source: Source, cells: int, film: VideoOptions) -> Walk:
    """The first K pictures of a source in the first cell, the next K in the second, and so on."""
    check_walk(len(source), cells)
    num_keys = len(source) // cells
    rows = [[cell * num_keys + key for cell in range(cells)] for key in range(num_keys)]
    noise_seeds = [source.noise_seed(index) for index in rows[0]]
    if film.interpolation != 'slerp':
        return Walk(num_keys, noise_seeds, _between(torch.stack([source.ws(row) for row in rows]), film))
    if not isinstance(source, SeedSource):
        raise UserError('--interpolation=slerp goes between the latents of seeds; with --projected-w use '
                        'linear or cubic')
    return Walk(num_keys, noise_seeds, _between_latents([source] * num_keys, rows, film))


def walk_of_sweep(sweep: Sweep, film: VideoOptions) -> Walk:
    """Each picture in a cell, through the keys of a sweep."""
    count = len(sweep.keys[0])
    if not 0 < count <= MAX_CELLS:
        raise UserError(f'--video: a sweep of {count} pictures; 1 to {MAX_CELLS} fit into the table')
    noise_seeds = [sweep.keys[0].noise_seed(index) for index in range(count)]
    if film.interpolation != 'slerp':
        keys = torch.stack([key.ws(range(count)) for key in sweep.keys])
        return Walk(len(keys), noise_seeds, _between(keys, film))
    if sweep.is_scale:
        raise UserError('--interpolation=slerp: the latent of a sweep stays where it is; leave it out')
    rows = [list(range(count))] * len(sweep.keys)
    return Walk(len(rows), noise_seeds, _between_latents(sweep.keys, rows, film))


def _between(keys: torch.Tensor, film: VideoOptions) -> Callable[[float], torch.Tensor]:
    return lambda position: interpolate(keys, position, film.interpolation, film.loop)


def _between_latents(
    sources: Sequence[SeedSource], rows: Sequence[Sequence[int]], film: VideoOptions,
) -> Callable[[float], torch.Tensor]:
    """Along arcs between the latents, with labels mixed in proportion; mapped frame by frame."""
    pairs = [source.latents(row) for source, row in zip(sources, rows, strict=True)]
    z, c = (torch.stack(part) for part in zip(*pairs, strict=True))  # [K, cells, z_dim], [K, cells, c_dim]

    def ws_at(position: float) -> torch.Tensor:
        return sources[0].map(interpolate(z, position, 'slerp', film.loop),
                              interpolate(c, position, 'linear', film.loop))
    return ws_at


def compose(pictures: Mapping[Cell, np.ndarray], size: tuple[int, int], scale: int = 1) -> np.ndarray:
    """One frame uint8 [H, W, C]: pictures [C, h, w] in cells of a table (columns, rows); empty ones are 0."""
    columns, rows = size
    channels, height, width = next(iter(pictures.values())).shape
    frame = np.zeros([rows * height, columns * width, channels], np.uint8)
    for (column, row), picture in pictures.items():
        top, left = row * height, column * width
        frame[top:top + height, left:left + width] = picture.transpose(1, 2, 0)
    return frame.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else frame


def write_frames(path: Path, frames: Iterator[np.ndarray], count: int, film: VideoOptions) -> None:
    """Write `count` frames uint8 [H, W, C] to the video of --video, with a bar."""
    first = next(frames)
    height, width, _ = first.shape
    with (open_video(path, width, height, film.fps, film.background) as video,
          progress(total=count, desc='Filming', unit='frame') as bar):
        frame: np.ndarray | None = first
        while frame is not None:
            video.append(frame)
            bar.update(1)
            frame = next(frames, None)


def write_walk(
    path: Path, sampler: Sampler, walk: Walk, columns: int, batch: int, film: VideoOptions,
) -> None:
    """Write a video of a walk, its cells in a table of so many columns."""
    places = [(index % columns, index // columns) for index in range(len(walk.noise_seeds))]
    steps, size = walk.positions(film), (columns, -(-len(places) // columns))
    pictures = sampler.tables(((walk.at(step), walk.noise_seeds) for step in steps), batch)
    frames = (compose(dict(zip(places, cells, strict=True)), size, film.video_scale) for cells in pictures)
    write_frames(path, frames, len(steps), film)
