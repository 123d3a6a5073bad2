# SPDX-License-Identifier: Apache-2.0
"""Where generated pictures go: PNG files of a folder, or a .zip that is a dataset; and sheets of them."""
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dnnlib import image_io
from dnnlib.progress import progress
from dnnlib.util import make_folder
from training.datasets.writer import dataset_writer
from training.sampling.sampler import Sampler
from training.sampling.sources import Source, Sweep

LABEL_FILE = 'dataset.json'
Put = Callable[[str, np.ndarray, int | None], None]  # name without suffix, uint8 [C, H, W], class


def is_archive(outdir: str) -> bool:
    """Whether --outdir names a .zip."""
    return outdir.endswith('.zip')


@contextlib.contextmanager
def picture_writer(outdir: str) -> Iterator[Put]:
    """Gives put(name, pixels, class): one PNG a call, in a folder or in a .zip.

    A .zip is a dataset: whole or not at all, with the classes (unless they are None) in its dataset.json.
    Raises UserError if it cannot be written.
    """
    if not is_archive(outdir):
        folder = make_folder(outdir)
        yield lambda name, pixels, _: image_io.save_png(folder / f'{name}.png', pixels)
        return
    labels: list[tuple[str, int]] = []
    with dataset_writer(outdir, '--outdir') as write:
        def put(name: str, pixels: np.ndarray, class_idx: int | None) -> None:
            write(f'{name}.png', image_io.png_bytes(pixels))
            if class_idx is not None:
                labels.append((f'{name}.png', class_idx))

        yield put
        write(LABEL_FILE, json.dumps({'labels': labels or None}).encode())


def write_pictures(sampler: Sampler, source: Source, outdir: str, batch: int, *, with_sheet: bool) -> None:
    """A PNG of every picture of a source, and all of them on grid.png if wanted."""
    count, columns, sheet = len(source), 1, None
    with picture_writer(outdir) as put, progress(total=count, desc='Generating', unit='img') as bar:
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            pictures = sampler.pictures(source.ws(indices), [source.noise_seed(i) for i in indices])
            for index, pixels in zip(indices, pictures, strict=True):
                put(source.name(index), pixels, source.class_of(index))
                if with_sheet and sheet is None:
                    columns = sheet_columns(count, pixels.shape)
                    sheet = image_io.ContactSheet(columns, -(-count // columns), pixels.shape)
                if sheet is not None:
                    sheet.put(index % columns, index // columns, pixels)
            bar.update(len(indices))
    if sheet is not None:
        sheet.save(Path(outdir, 'grid.png'))


def write_sweep(sampler: Sampler, sweep: Sweep, outdir: str, batch: int, columns: int) -> None:
    """PNGs of each picture at `columns` places of a sweep, and sweep.png with a row for each picture."""
    source, folder = sweep.keys[0], make_folder(outdir)
    labels = [sweep.label(position) for position in sweep.columns(columns)]

    def save_row(row: int, pictures: np.ndarray) -> None:
        for label, pixels in zip(labels, pictures, strict=True):
            image_io.save_png(folder / f'{source.name(row)}-{label}.png', pixels)

    rows = [(sweep, index) for index in range(len(source))]
    write_sheet(sampler, rows, folder / 'sweep.png', batch, columns, save_row)


def write_sheet(
    sampler: Sampler, rows: Sequence[tuple[Sweep, int]], path: Path, batch: int, columns: int,
    save_row: Callable[[int, np.ndarray], None] = lambda row, pictures: None,
) -> None:
    """A sheet with a row for each (sweep, index of a picture), from its first key to the last.

    save_row(row, uint8 [columns, C, H, W]) is called with each.
    """
    moments = ((sweep.row(index, columns), [sweep.keys[0].noise_seed(index)] * columns)
               for sweep, index in rows)
    sheet = None
    with progress(total=len(rows), desc='Sweeping', unit='row') as bar:
        for row, pictures in enumerate(sampler.tables(moments, batch)):
            save_row(row, pictures)
            sheet = sheet or image_io.ContactSheet(columns, len(rows), pictures[0].shape)
            for column, pixels in enumerate(pictures):
                sheet.put(column, row, pixels)
            bar.update(1)
    if sheet is not None:
        sheet.save(path)


def sheet_columns(count: int, shape: tuple[int, ...]) -> int:
    """How many of `count` pictures (C, H, W) to put side by side so that the sheet is about square."""
    _, height, width = shape
    return min(max(round(math.sqrt(count * height / width)), 1), count)
