# SPDX-License-Identifier: Apache-2.0
"""Videos of latent walks; a frame shows several walks, one per cell of a table, at the same position."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dnnlib.cli_options import VideoOptions
from dnnlib.progress import progress, write
from dnnlib.util import UserError
from dnnlib.video import write_video
from training.sampling.interpolation import interpolate, positions
from training.sampling.sampler import Sampler
from training.sampling.sources import SampleSource, SeedSource, Sweep

MAX_CELLS = 1024
MAX_KEYS = 20_000  # the ws of all keys are kept in memory
Cell = tuple[int, int]  # column, row


@dataclass(frozen=True)
class LatentWalk:
    """Several walks side by side. at(position): ws [cells, num_ws, w_dim].

    noise_seeds: one per cell, so that noise does not flicker.
    """

    num_keys: int
    noise_seeds: Sequence[int]
    at: Callable[[float], torch.Tensor]

    def positions(self, video: VideoOptions) -> np.ndarray:
        """Positions [T] of the frames."""
        return positions(
            self.num_keys, video.step_frames, is_loop=video.loop, is_eased=video.easing == 'smooth')


def check_walk(count: int, cells: int) -> None:
    """Raise UserError unless `count` seeds or ws make a walk in each cell."""
    if count > MAX_KEYS or cells > MAX_CELLS:
        raise UserError(f'--video: {count} images in {cells} cells; at most {MAX_KEYS} and {MAX_CELLS}')
    if cells == 1 and count < 2:
        raise UserError(f'--video: a walk needs at least 2 seeds or ws, not {count}')
    if count < 2 * cells or count % cells:
        raise UserError(f'--video: {count} seeds or ws for {cells} cells; a walk needs at least 2, and all '
                        'cells of --video-grid need the same number')


def walk_through(source: SampleSource, cells: int, video: VideoOptions) -> LatentWalk:
    """The first K images of a source in the first cell, the next K in the second, and so on."""
    check_walk(len(source), cells)
    num_keys = len(source) // cells
    rows = [[cell * num_keys + key for cell in range(cells)] for key in range(num_keys)]
    noise_seeds = [source.noise_seed(index) for index in rows[0]]
    if video.interpolation != 'slerp':
        keys = torch.stack([source.ws(row) for row in rows])
        return LatentWalk(num_keys, noise_seeds, _between(keys, video))
    if not isinstance(source, SeedSource):
        raise UserError('--interpolation=slerp interpolates the latents of seeds; with --projected-w use '
                        'linear or cubic')
    return LatentWalk(num_keys, noise_seeds, _between_latents([source] * num_keys, rows, video))


def walk_of_sweep(sweep: Sweep, video: VideoOptions) -> LatentWalk:
    """One cell per image, each through the keys of a sweep."""
    count = len(sweep.keys[0])
    if not 0 < count <= MAX_CELLS:
        raise UserError(f'--video: a sweep of {count} images; 1 to {MAX_CELLS} fit into the table')
    noise_seeds = [sweep.keys[0].noise_seed(index) for index in range(count)]
    if video.interpolation != 'slerp':
        keys = torch.stack([key.ws(range(count)) for key in sweep.keys])
        return LatentWalk(len(keys), noise_seeds, _between(keys, video))
    if sweep.is_scale:
        raise UserError('--interpolation=slerp: the latents of a sweep do not change; use linear or cubic')
    rows = [list(range(count))] * len(sweep.keys)
    return LatentWalk(len(rows), noise_seeds, _between_latents(sweep.keys, rows, video))


def _between(keys: torch.Tensor, video: VideoOptions) -> Callable[[float], torch.Tensor]:
    return lambda position: interpolate(keys, position, video.interpolation, video.loop)


def _between_latents(
    sources: Sequence[SeedSource], rows: Sequence[Sequence[int]], video: VideoOptions,
) -> Callable[[float], torch.Tensor]:
    """Slerp of the latents, with linearly mixed labels, mapped frame by frame."""
    pairs = [source.latents(row) for source, row in zip(sources, rows, strict=True)]
    z, c = (torch.stack(part) for part in zip(*pairs, strict=True))  # [K, cells, z_dim], [K, cells, c_dim]

    def ws_at(position: float) -> torch.Tensor:
        return sources[0].map(interpolate(z, position, 'slerp', video.loop),
                              interpolate(c, position, 'linear', video.loop))
    return ws_at


def compose(images: Mapping[Cell, np.ndarray], size: tuple[int, int], scale: int = 1) -> np.ndarray:
    """One frame uint8 [H, W, C]: images [C, h, w] in cells of a table (columns, rows); empty ones are 0."""
    columns, rows = size
    channels, height, width = next(iter(images.values())).shape
    frame = np.zeros([rows * height, columns * width, channels], np.uint8)
    for (column, row), image in images.items():
        top, left = row * height, column * width
        frame[top:top + height, left:left + width] = image.transpose(1, 2, 0)
    return frame.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else frame


def write_frames(
    path: Path, frames: Callable[[], Iterator[np.ndarray]], count: int, video: VideoOptions,
) -> None:
    """Write `count` frames uint8 [H, W, C] to the video of --video, with a progress bar, and say where.

    frames(): an iterator over all frames, called again if the encoder fails.
    """
    with progress(total=count, desc='Video', unit='frame') as bar:
        written = write_video(path, frames, video.fps, video.background, bar)
    write(f'Wrote {count} frames to {written}')


def write_walk(
    path: Path, sampler: Sampler, walk: LatentWalk, columns: int, batch: int, video: VideoOptions,
) -> None:
    """Write a video of a walk, its cells in a table of `columns` columns."""
    places = [(index % columns, index // columns) for index in range(len(walk.noise_seeds))]
    steps, size = walk.positions(video), (columns, -(-len(places) // columns))

    def frames() -> Iterator[np.ndarray]:
        for cells in sampler.tables(((walk.at(step), walk.noise_seeds) for step in steps), batch):
            yield compose(dict(zip(places, cells, strict=True)), size, video.video_scale)

    write_frames(path, frames, len(steps), video)
