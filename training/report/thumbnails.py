# SPDX-License-Identifier: Apache-2.0
"""Sheets of samples as small pictures inside a page: cropped to what the eye can judge, encoded as text."""
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
MAX_REMEMBERED = 200
QUALITIES = (90, 80, 65, 50)
BEHIND_ALPHA = (186, 186, 186)
# A damaged or oversized file raises one of these.
READ_ERRORS = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


@dataclass(frozen=True)
class Sheet:
    """A picture for the page. uri: data:image/....  caption: plain text."""

    uri: str
    caption: str


def fake_sheets(run_dir: str | os.PathLike) -> list[tuple[float, Path]]:
    """(kimg, path) of the sheets of generated pictures in their order; fakes_init.png is the first, at 0."""
    folder = Path(run_dir)
    found = [(nimg / 1000, path) for path in folder.glob('fakes*.png')
             if (nimg := nimg_of_name(path.name, 'fakes')) is not None]
    initial = folder / 'fakes_init.png'
    return ([(0, initial)] if initial.is_file() else []) + sorted(found)


def evenly(sheets: list[tuple[float, Path]], count: int = MAX_THUMBNAILS) -> list[tuple[float, Path]]:
    """At most `count` of the sheets, evenly over time, the first and the last among them."""
    if len(sheets) <= count:
        return sheets
    kimg = np.array([number for number, _ in sheets], dtype=np.float64)
    wanted = np.linspace(kimg[0], kimg[-1], count)
    # A dictionary keeps one where two moments have the same nearest sheet.
    nearest = dict.fromkeys(int(np.abs(kimg - moment).argmin()) for moment in wanted[:-1])
    return [sheets[i] for i in nearest] + sheets[-1:]


def sheet_uri(path: Path, tile: tuple[int, int] | None) -> str | None:
    """The top left part of a sheet of pictures of tile = (height, width); None if it cannot be read.

    tile None: all of it.
    """
    return _encoded(path, tile, SHEET_COLUMNS, SHEET_PX, SHEET_BYTES)


def thumbnail_uri(path: Path, tile: tuple[int, int] | None) -> str | None:
    """The same, of a few pictures. Remembered: old sheets do not change, and decoding takes long."""
    try:
        modified_ns = path.stat().st_mtime_ns
    except OSError:
        return None
    return _thumbnail(path, tile, modified_ns)


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _thumbnail(path: Path, tile: tuple[int, int] | None, modified_ns: int) -> str | None:
    return _encoded(path, tile, THUMBNAIL_COLUMNS, THUMBNAIL_PX, THUMBNAIL_BYTES)


def _encoded(
    path: Path, tile: tuple[int, int] | None, columns: int, max_px: int, max_bytes: int,
) -> str | None:
    try:
        with PIL.Image.open(path) as sheet:
            picture = flat(_crop(sheet, tile, columns))
    except READ_ERRORS:
        return None
    return encode(_fit(picture, max_px), max_bytes)


def _crop(sheet: PIL.Image.Image, tile: tuple[int, int] | None, columns: int) -> PIL.Image.Image:
    """Whole pictures from the top left, about as wide as high."""
    if tile is None:
        return sheet.crop((0, 0, sheet.width, min(sheet.height, 2 * sheet.width)))
    height, width = tile
    rows = max(round(columns * width / height), 1)
    return sheet.crop((0, 0, min(sheet.width, columns * width), min(sheet.height, rows * height)))


def flat(picture: PIL.Image.Image) -> PIL.Image.Image:
    """RGB, with gray behind what is transparent."""
    if picture.mode not in ('LA', 'RGBA'):
        return picture.convert('RGB')
    behind = PIL.Image.new('RGBA', picture.size, (*BEHIND_ALPHA, 255))
    return PIL.Image.alpha_composite(behind, picture.convert('RGBA')).convert('RGB')


def _fit(picture: PIL.Image.Image, max_px: int) -> PIL.Image.Image:
    """At most max_px wide and high. Small pictures grow by whole factors, so that pixels stay square."""
    longest = max(picture.size)
    if longest > max_px:
        picture.thumbnail((max_px, max_px), PIL.Image.Resampling.LANCZOS)
        return picture
    factor = max(max_px // 2 // longest, 1)
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, PIL.Image.Resampling.NEAREST)


def encode(picture: PIL.Image.Image, max_bytes: int) -> str:
    """A data URI of at most about max_bytes: PNG where that is enough, else JPEG, smaller if need be."""
    data, kind = _bytes(picture, 'PNG'), 'png'
    for quality in QUALITIES:
        if len(data) <= max_bytes:
            break
        data, kind = _bytes(picture, 'JPEG', quality=quality), 'jpeg'
    if len(data) > max_bytes and min(picture.size) > 1:
        return encode(picture.reduce(2), max_bytes)
    return f'data:image/{kind};base64,{base64.b64encode(data).decode("ascii")}'


def _bytes(picture: PIL.Image.Image, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=image_format, optimize=True, **options)
    except OSError as error:
        raise UserError(f'progress.html: a sheet cannot be encoded ({error}); see the sheets themselves') \
            from error
    return buffer.getvalue()
