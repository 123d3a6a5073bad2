# SPDX-License-Identifier: Apache-2.0
"""Writes generated images: PNG files in a folder, or a .zip that is a dataset; and contact sheets."""
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
from training.sampling.sources import SampleSource, Sweep

LABEL_FILE = 'dataset.json'
Put = Callable[[str, np.ndarray, int | None], None]  # name without suffix, uint8 [C, H, W], class


def is_archive(outdir: str) -> bool:
    """Whether --outdir names a .zip."""
    return outdir.endswith('.zip')


@contextlib.contextmanager
def image_writer(outdir: str) -> Iterator[Put]:
    """Yield put(name, pixels, class), which writes one PNG to a folder or a .zip.

    A .zip is a dataset that appears only when complete; classes, unless None, are in its dataset.json.
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


def write_images(
    sampler: Sampler, source: SampleSource, outdir: str, batch: int, *, with_sheet: bool,
) -> None:
    """Write a PNG per image of a source; with_sheet: also all of them as grid.png."""
    count, columns, sheet = len(source), 1, None
    with image_writer(outdir) as put, progress(total=count, desc='Generating', unit='img') as bar:
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            images = sampler.images(source.ws(indices), [source.noise_seed(i) for i in indices])
            for index, pixels in zip(indices, images, strict=True):
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
    """Write a PNG per image and position of a sweep, and sweep.png with one row per image."""
    source, folder = sweep.keys[0], make_folder(outdir)
    labels = [sweep.label(position) for position in sweep.columns(columns)]

    def save_row(row: int, images: np.ndarray) -> None:
        for label, pixels in zip(labels, images, strict=True):
            image_io.save_png(folder / f'{source.name(row)}-{label}.png', pixels)

    rows = [(sweep, index) for index in range(len(source))]
    write_sheet(sampler, rows, folder / 'sweep.png', batch, columns, save_row)


def write_sheet(
    sampler: Sampler, rows: Sequence[tuple[Sweep, int]], path: Path, batch: int, columns: int,
    save_row: Callable[[int, np.ndarray], None] = lambda row, images: None,
) -> None:
    """Write a contact sheet with one row per (sweep, index of an image), from the first key to the last.

    save_row(row, uint8 [columns, C, H, W]) is called for each row.
    """
    moments = ((sweep.row(index, columns), [sweep.keys[0].noise_seed(index)] * columns)
               for sweep, index in rows)
    sheet = None
    with progress(total=len(rows), desc='Sweeping', unit='row') as bar:
        for row, images in enumerate(sampler.tables(moments, batch)):
            save_row(row, images)
            sheet = sheet or image_io.ContactSheet(columns, len(rows), images[0].shape)
            for column, pixels in enumerate(images):
                sheet.put(column, row, pixels)
            bar.update(1)
    if sheet is not None:
        sheet.save(path)


def sheet_columns(count: int, shape: tuple[int, ...]) -> int:
    """The number of columns that makes a sheet of `count` images (C, H, W) about square."""
    _, height, width = shape
    return min(max(round(math.sqrt(count * height / width)), 1), count)
