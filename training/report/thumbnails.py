# SPDX-License-Identifier: Apache-2.0
"""Sample sheets as thumbnails inside a page: cropped, reduced, and encoded as data URIs."""
import base64
import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib.util import UserError
from training.report.ticks import nimg_of_name

SHEET_COLUMNS, SHEET_PX, SHEET_BYTES = 8, 1024, 300_000
THUMBNAIL_COLUMNS, THUMBNAIL_PX, THUMBNAIL_BYTES = 3, 288, 24_000
MAX_THUMBNAILS = 12
MAX_CACHED = 200
QUALITIES = (90, 80, 65, 50)
BACKGROUND = (186, 186, 186)
# Errors of corrupt or oversized files.
READ_ERRORS = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


@dataclass(frozen=True)
class Thumbnail:
    """An image on the page. uri: data:image/....  caption: plain text."""

    uri: str
    caption: str


def fake_sheets(run_dir: str | os.PathLike) -> list[tuple[float, Path]]:
    """(kimg, path) of the sample sheets in a run directory, ascending; fakes_init.png is the first, at 0."""
    folder = Path(run_dir)
    found = [(nimg / 1000, path) for path in folder.glob('fakes*.png')
             if (nimg := nimg_of_name(path.name, 'fakes')) is not None]
    initial = folder / 'fakes_init.png'
    return ([(0, initial)] if initial.is_file() else []) + sorted(found)


def evenly(sheets: list[tuple[float, Path]], count: int = MAX_THUMBNAILS) -> list[tuple[float, Path]]:
    """At most `count` of the sheets, evenly spaced in time, including the first and the last."""
    if len(sheets) <= count:
        return sheets
    kimg = np.array([number for number, _ in sheets], dtype=np.float64)
    wanted = np.linspace(kimg[0], kimg[-1], count)
    # Several wanted moments may have the same nearest sheet.
    nearest = dict.fromkeys(int(np.abs(kimg - moment).argmin()) for moment in wanted[:-1])
    return [sheets[i] for i in nearest] + sheets[-1:]


def sheet_uri(path: Path, tile: tuple[int, int] | None) -> str | None:
    """The top left images of a sheet as a data URI; None if it cannot be read.

    tile: (height, width) of an image, None to use the whole sheet.
    """
    return _encoded(path, tile, SHEET_COLUMNS, SHEET_PX, SHEET_BYTES)


def thumbnail_uri(path: Path, tile: tuple[int, int] | None) -> str | None:
    """As sheet_uri, but only a few images. Cached, because decoding is slow and old sheets do not change."""
    try:
        modified_ns = path.stat().st_mtime_ns
    except OSError:
        return None
    return _thumbnail(path, tile, modified_ns)


@functools.lru_cache(maxsize=MAX_CACHED)
def _thumbnail(path: Path, tile: tuple[int, int] | None, modified_ns: int) -> str | None:
    return _encoded(path, tile, THUMBNAIL_COLUMNS, THUMBNAIL_PX, THUMBNAIL_BYTES)


def _encoded(
    path: Path, tile: tuple[int, int] | None, columns: int, max_px: int, max_bytes: int,
) -> str | None:
    try:
        with PIL.Image.open(path) as sheet:
            image = flat(_crop(sheet, tile, columns))
    except READ_ERRORS:
        return None
    return encode(_fit(image, max_px), max_bytes)


def _crop(sheet: PIL.Image.Image, tile: tuple[int, int] | None, columns: int) -> PIL.Image.Image:
    """Complete images from the top left, in an approximately square crop."""
    if tile is None:
        return sheet.crop((0, 0, sheet.width, min(sheet.height, 2 * sheet.width)))
    height, width = tile
    rows = max(round(columns * width / height), 1)
    return sheet.crop((0, 0, min(sheet.width, columns * width), min(sheet.height, rows * height)))


def flat(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB, composited onto gray."""
    if image.mode not in ('LA', 'RGBA'):
        return image.convert('RGB')
    behind = PIL.Image.new('RGBA', image.size, (*BACKGROUND, 255))
    return PIL.Image.alpha_composite(behind, image.convert('RGBA')).convert('RGB')


def _fit(image: PIL.Image.Image, max_px: int) -> PIL.Image.Image:
    """At most max_px wide and high. Small images are enlarged by integer factors, to keep pixels square."""
    longest = max(image.size)
    if longest > max_px:
        image.thumbnail((max_px, max_px), PIL.Image.Resampling.LANCZOS)
        return image
    factor = max(max_px // 2 // longest, 1)
    size = image.width * factor, image.height * factor
    return image.resize(size, PIL.Image.Resampling.NEAREST)


def encode(image: PIL.Image.Image, max_bytes: int) -> str:
    """A data URI of an image of at most max_bytes: PNG if possible, else JPEG, reduced if necessary."""
    data, kind = _bytes(image, 'PNG'), 'png'
    for quality in QUALITIES:
        if len(data) <= max_bytes:
            break
        data, kind = _bytes(image, 'JPEG', quality=quality), 'jpeg'
    if len(data) > max_bytes and min(image.size) > 1:
        return encode(image.reduce(2), max_bytes)
    return f'data:image/{kind};base64,{base64.b64encode(data).decode("ascii")}'


def _bytes(image: PIL.Image.Image, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=image_format, optimize=True, **options)
    except OSError as error:
        raise UserError(f'progress.html: a sample sheet cannot be encoded ({error}); see the .png files') \
            from error
    return buffer.getvalue()
