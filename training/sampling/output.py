# SPDX-License-Identifier: Apache-2.0
"""Writes generated images: PNG files in a folder, or a .zip that is a dataset; and contact sheets."""
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dnnlib import image_io
from dnnlib.progress import progress
from dnnlib.util import make_folder
from training.datasets.writer import dataset_writer
from training.sampling.jobs import is_archive
from training.sampling.sampler import Condition, Sampler
from training.sampling.sources import SampleSource, Sweep

LABEL_FILE = 'dataset.json'
# Name without suffix, uint8 [C, H, W], texts of the PNG file, class or label vector.
Put = Callable[[str, np.ndarray, Mapping[str, str], Condition], None]


@contextlib.contextmanager
def image_writer(outdir: str) -> Iterator[Put]:
    """Yield put(name, pixels, info, class), which writes one PNG to a folder or a .zip.

    A .zip is a dataset that appears only when complete; classes, unless None, are in its dataset.json.
    Raises UserError if it cannot be written.
    """
    if not is_archive(outdir):
        folder = make_folder(outdir)
        yield lambda name, pixels, info, _: image_io.save_png(folder / f'{name}.png', pixels, info)
        return
    labels: list[tuple[str, Condition]] = []
    with dataset_writer(outdir, '--outdir') as write:
        def put(name: str, pixels: np.ndarray, info: Mapping[str, str], condition: Condition) -> None:
            write(f'{name}.png', image_io.png_bytes(pixels, info))
            if condition is not None:
                labels.append((f'{name}.png', condition))

        yield put
        write(LABEL_FILE, json.dumps({'labels': labels or None}).encode())


def write_images(
    sampler: Sampler, source: SampleSource, outdir: str, batch: int, *, with_sheet: bool,
    with_captions: bool = False,
) -> None:
    """Write a PNG per image of a source; with_sheet: also all of them as grid.png."""
    count, columns, sheet = len(source), 1, None
    captions = [source.caption(index) for index in range(count)] if with_sheet and with_captions else []
    with image_writer(outdir) as put, progress(total=count, desc='Generating', unit='img') as bar:
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            images = sampler.images(source.ws(indices), [source.noise_seed(i) for i in indices])
            for index, pixels in zip(indices, images, strict=True):
                put(source.name(index), pixels, source.info(index), source.class_of(index))
                if with_sheet and sheet is None:
                    columns = sheet_columns(count, pixels.shape)
                    sheet = image_io.ContactSheet(columns, -(-count // columns), pixels.shape, captions)
                if sheet is not None:
                    sheet.put(index % columns, index // columns, pixels, captions[index] if captions else '')
            bar.update(len(indices))
    if sheet is not None:
        sheet.save(Path(outdir, 'grid.png'), sampler.info())


def write_sweep(
    sampler: Sampler, sweep: Sweep, outdir: str, batch: int, columns: int, *, with_captions: bool = False,
) -> None:
    """Write a PNG per image and position of a sweep, and sweep.png with one row per image."""
    source, folder = sweep.keys[0], make_folder(outdir)
    positions = sweep.columns(columns)

    def save_row(row: int, images: np.ndarray) -> None:
        for position, pixels in zip(positions, images, strict=True):
            image_io.save_png(folder / f'{source.name(row)}-{sweep.label(position)}.png', pixels,
                              sweep.info(row, position))

    rows = [(sweep, index) for index in range(len(source))]
    captions = [[f'{source.caption(row)} {sweep.label(position)}' for position in positions]
                for row in range(len(source))] if with_captions else None
    write_sheet(sampler, rows, folder / 'sweep.png', batch, columns, captions, save_row)


def write_sheet(
    sampler: Sampler, rows: Sequence[tuple[Sweep, int]], path: Path, batch: int, columns: int,
    captions: Sequence[Sequence[str]] | None = None,
    save_row: Callable[[int, np.ndarray], None] = lambda row, images: None,
) -> None:
    """Write a contact sheet with one row per (sweep, index of an image), from the first key to the last.

    captions: of each image, by row.  save_row(row, uint8 [columns, C, H, W]) is called for each row.
    """
    moments = ((sweep.row(index, columns), [sweep.keys[0].noise_seed(index)] * columns)
               for sweep, index in rows)
    texts = captions or [[''] * columns] * len(rows)
    sheet = None
    with progress(total=len(rows), desc='Sweeping', unit='row') as bar:
        for row, images in enumerate(sampler.tables(moments, batch)):
            save_row(row, images)
            sheet = sheet or image_io.ContactSheet(
                columns, len(rows), images[0].shape, itertools.chain(*texts))
            for column, pixels in enumerate(images):
                sheet.put(column, row, pixels, texts[row][column])
            bar.update(1)
    if sheet is not None:
        sheet.save(path, sampler.info())


def sheet_columns(count: int, shape: tuple[int, ...]) -> int:
    """The number of columns that makes a sheet of `count` images (C, H, W) about square."""
    _, height, width = shape
    return min(max(round(math.sqrt(count * height / width)), 1), count)
