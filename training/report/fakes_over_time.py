# SPDX-License-Identifier: Apache-2.0
"""fakes_over_time.png: samples of the same latents over training, one row per sheet."""
import functools
import os
from pathlib import Path

import PIL.Image
import PIL.ImageDraw

from dnnlib.util import UserError, format_time, replace_file
from training.report.curves import mean_of, read_ticks
from training.report.page import read_options, tile_size
from training.report.thumbnails import READ_ERRORS, evenly, fake_sheets, flat

SHEET_NAME = 'fakes_over_time.png'
MAX_ROWS, COLUMNS = 12, 10
MIN_TILE_PX, MAX_TILE_PX = 48, 128  # smaller images are enlarged by integer factors, larger ones reduced
LABEL_PX, MARGIN_PX, LINE_PX = 100, 8, 14
BACKGROUND, TEXT = (255, 255, 255), (0, 0, 0)


def write_fakes_over_time(run_dir: str | os.PathLike) -> Path | None:
    """Write fakes_over_time.png into a run directory, from the sample sheets in it; returns its path.

    At most MAX_ROWS rows, evenly spaced in kimg, each labelled with kimg and training time. Returns None and
    writes nothing without a sheet or a known image size. Raises UserError if the file cannot be written.
    """
    folder = Path(run_dir)
    tile = tile_size(read_options(folder))
    rows = [] if tile is None else _rows(folder, tile)
    if not rows:
        return None
    path = folder / SHEET_NAME
    with replace_file(path) as temporary:
        _assemble(rows).save(temporary, format='PNG')
    return path


def _rows(folder: Path, tile: tuple[int, int]) -> list[tuple[list[str], PIL.Image.Image]]:
    """(lines of the label, images side by side) per row."""
    times = _times(folder)
    # The sheet at 0 kimg looks like fakes_init.png, so one of them is enough.
    moments = {kimg: (kimg, path) for kimg, path in reversed(fake_sheets(folder))}
    rows = []
    for kimg, path in evenly(sorted(moments.values()), MAX_ROWS):
        strip = _strip(path, tile, path.stat().st_mtime_ns)
        if strip is not None:
            rows.append(([f'{kimg:.10g} kimg', *_time_at(kimg, times)], strip))
    return rows


def _times(folder: Path) -> list[tuple[float, float]]:
    """(kimg, training time in seconds) of the ticks; [] before the first one."""
    try:
        ticks = read_ticks(folder / 'stats.jsonl')
    except UserError:
        return []
    return [(mean_of(row, 'Progress/kimg'), mean_of(row, 'Timing/total_sec')) for row in ticks]


def _time_at(kimg: float, times: list[tuple[float, float]]) -> list[str]:
    if kimg == 0:
        return ['start']
    # File names of sheets are rounded down to kimg, so look up the nearest tick.
    return [format_time(min(times, key=lambda tick: abs(tick[0] - kimg))[1])] if times else []


@functools.lru_cache(maxsize=8 * MAX_ROWS)
def _strip(path: Path, tile: tuple[int, int], modified_ns: int) -> PIL.Image.Image | None:
    """The first images of a sheet; None if it cannot be read. Cached: large sheets take a second."""
    height, width = tile
    try:
        with PIL.Image.open(path) as sheet:
            count = min(max(sheet.width // width, 1), COLUMNS)
            strip = flat(sheet.crop((0, 0, count * width, height)))
    except READ_ERRORS:
        return None
    longest = max(tile)
    if longest > MAX_TILE_PX:
        size = [max(round(side * MAX_TILE_PX / longest), 1) for side in strip.size]
        return strip.resize((size[0], size[1]), PIL.Image.Resampling.LANCZOS)
    factor = -(-MIN_TILE_PX // longest)
    return strip.resize((strip.width * factor, strip.height * factor), PIL.Image.Resampling.NEAREST)


def _assemble(rows: list[tuple[list[str], PIL.Image.Image]]) -> PIL.Image.Image:
    """All rows, each with its label on the left."""
    pitch = max(max(strip.height for _, strip in rows), 2 * LINE_PX) + 2
    width = LABEL_PX + max(strip.width for _, strip in rows) + MARGIN_PX
    image = PIL.Image.new('RGB', (width, pitch * len(rows) + 2 * MARGIN_PX), BACKGROUND)
    draw = PIL.ImageDraw.Draw(image)
    for i, (lines, strip) in enumerate(rows):
        top = MARGIN_PX + i * pitch
        image.paste(strip, (LABEL_PX, top))
        first_line = top + (pitch - LINE_PX * len(lines)) // 2
        for j, line in enumerate(lines):
            draw.text((MARGIN_PX, first_line + j * LINE_PX), line, fill=TEXT)
    return image
