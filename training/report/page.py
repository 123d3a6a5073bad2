# SPDX-License-Identifier: Apache-2.0
"""progress.html: curves, images and options of a run on one self-contained page."""
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from dnnlib.util import format_time, read_regular, replace_file
from training.report.charts import chart, short_number
from training.report.curves import is_number, mean_of, read_jsonl, read_ticks, training_panels
from training.report.thumbnails import Thumbnail, evenly, fake_sheets, sheet_uri, thumbnail_uri

PAGE_NAME = 'progress.html'
WARNING = 'Warning: '
# Lines of log.txt that the page shows.
WARNING_LINE = re.compile(r'Warning: |Note: |Error: |.*(?:Remedies:|not saved|cannot be )')
MAX_WARNINGS, MAX_WARNING_CHARS = 20, 500
RECENT_TICKS = 20  # for the estimate of the remaining time
LOWER_IS_BETTER = ('fid', 'kid', 'swd', 'ppl')
Ticks = list[dict[str, Any]]
# page.html with page.css and page.js; all values are escaped.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
    lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def write_progress_page(run_dir: str | os.PathLike, state: str = '') -> Path:
    """Write progress.html into a run directory; returns its path.

    state: why the run has stopped, '' if it trains or is complete.  Needs stats.jsonl with a tick;
    training_options.json, metrics, sample sheets and log.txt are optional. The page stays below 2 MB for runs
    of any length. Raises UserError if there is no tick or the page cannot be written.
    """
    path = Path(run_dir, PAGE_NAME)
    text = progress_page(run_dir, state)
    with replace_file(path) as temporary:
        # The path of a dataset may hold bytes of no encoding.
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace')
    return path


def progress_page(run_dir: str | os.PathLike, state: str = '') -> str:
    """The text of the page: see write_progress_page."""
    folder = Path(run_dir).resolve()
    ticks, options = read_ticks(folder / 'stats.jsonl'), read_options(folder)
    total = options.get('total_kimg')
    total = total if is_number(total) and total > 0 else None
    kimg = mean_of(ticks[-1], 'Progress/kimg') or 0.0
    # A run that is stopped writes a sample sheet, but no tick.
    if state:
        kimg = max([kimg, *(shown for shown, _ in fake_sheets(folder))])
    share = None if total is None else min(kimg / total, 1.0)
    return TEMPLATES.get_template('page.html').render(
        name=folder.name, written=time.strftime('%Y-%m-%d %H:%M', time.localtime()), share=share,
        cards=[('kimg shown' if total is None else f'of {short_number(total)} kimg', short_number(kimg)),
               *_time_cards(ticks, total, share, state), *_tick_cards(ticks[-1]), *_metric_cards(folder)],
        warnings=log_warnings(folder / 'log.txt'), sheets=_sheets(folder, options),
        strip=_strip(folder, options), charts=[chart(panel) for panel in training_panels(ticks, folder)],
        facts=run_facts(options))


def eta_sec(ticks: Ticks, total_kimg: float) -> float | None:
    """Seconds until total_kimg at the speed of the latest ticks, including maintenance; None if unknown."""
    recent = ticks[-RECENT_TICKS:]
    points = [(mean_of(row, 'Progress/kimg'), mean_of(row, 'Timing/total_sec')) for row in recent]
    points = [(kimg, sec) for kimg, sec in points if kimg is not None and sec is not None]
    if len(points) < 2:
        return None
    (first_kimg, first_sec), (kimg, sec) = points[0], points[-1]
    # The clock of a resumed run may have restarted at zero.
    if kimg <= first_kimg or sec <= first_sec:
        return None
    return max(total_kimg - kimg, 0) * (sec - first_sec) / (kimg - first_kimg)


def log_warnings(log: str | os.PathLike) -> list[str]:
    """The latest warnings in a log.txt, without duplicates, oldest first; [] without such a file."""
    try:
        lines = Path(log).read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return []
    found = dict.fromkeys(line.strip() for line in lines if WARNING_LINE.match(line))
    return [line.removeprefix(WARNING)[:MAX_WARNING_CHARS] for line in list(found)[-MAX_WARNINGS:]]


def read_options(folder: Path) -> dict[str, Any]:
    """training_options.json of a run directory; {} if it cannot be read."""
    try:
        options = json.loads(read_regular(folder / 'training_options.json'))
    except (OSError, ValueError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}


def _part(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = options.get(name)
    return part if isinstance(part, Mapping) else {}


def _time_cards(
    ticks: Ticks, total: float | None, share: float | None, state: str,
) -> list[tuple[str, str]]:
    cards = []
    elapsed = mean_of(ticks[-1], 'Timing/total_sec')
    if elapsed is not None:
        cards.append(('elapsed', format_time(elapsed)))
    if state or share == 1:
        return [*cards, ('state', state or 'finished')]
    eta = None if total is None else eta_sec(ticks, total)
    return cards if eta is None else [*cards, ('remaining (estimate)', format_time(eta))]


def _tick_cards(tick: dict[str, Any]) -> list[tuple[str, str]]:
    speed, augment = mean_of(tick, 'Timing/sec_per_kimg'), mean_of(tick, 'Progress/augment')
    return ([('sec/kimg', short_number(speed))] if speed is not None else []) + (
        [('augment p', f'{augment:.3f}')] if augment is not None else [])


def _metric_cards(folder: Path) -> list[tuple[str, str]]:
    """The best value of each metric where lower is better, else the latest."""
    cards = []
    for path in sorted(folder.glob('metric-*.jsonl')):
        rows = [row for row in read_jsonl(path) if isinstance(row.get('results'), dict) and row['results']]
        if not rows:
            continue
        name = next(iter(rows[-1]['results']))
        values = [row['results'].get(name) for row in rows]
        numbers = [value for value in values if is_number(value)]
        if not numbers:
            continue
        if name.startswith(LOWER_IS_BETTER):
            cards.append((f'best {name}, now {short_number(numbers[-1])}', short_number(min(numbers))))
        else:
            cards.append((name, short_number(numbers[-1])))
    return cards


def _sheets(folder: Path, options: Mapping[str, Any]) -> list[Thumbnail]:
    """The latest samples and the training images."""
    tile, shown = tile_size(options), []
    for kimg, path in fake_sheets(folder)[-1:]:
        shown.append((path, f'Generated at {kimg:.10g} kimg'))
    shown.append((folder / 'reals.png', 'Training images'))
    return [Thumbnail(uri, caption) for path, caption in shown if (uri := sheet_uri(path, tile))]


def _strip(folder: Path, options: Mapping[str, Any]) -> list[Thumbnail]:
    """A few samples of the same latents, over time."""
    tile = tile_size(options)
    return [Thumbnail(uri, 'at the start' if path.stem == 'fakes_init' else f'{kimg:.10g} kimg')
            for kimg, path in evenly(fake_sheets(folder)) if (uri := thumbnail_uri(path, tile))]


def tile_size(options: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of an image; None if the options do not contain it."""
    size = _part(options, 'training_set_kwargs').get('resolution')
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2:
        return None
    return (sides[0], sides[1]) if all(isinstance(side, int) and side > 0 for side in sides) else None


def run_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are worth comparing between runs."""
    data, augment = _part(options, 'training_set_kwargs'), _part(options, 'augment_kwargs')
    tile = tile_size(options)
    facts = {
        'Data': os.path.basename(str(data.get('path') or '')),
        'Images': data.get('max_size'),
        'Resolution': f'{tile[1]}x{tile[0]}' if tile else None,
        'Mirrored': _yes_no(data.get('xflip')),
        'Labels': _yes_no(data.get('use_labels')),
        'Batch': _batch(options),
        'Learning rate': _learning_rates(options),
        'R1 gamma': _part(options, 'loss_kwargs').get('r1_gamma'),
        'Augmentation': _augmentation(options),
        'Transforms': ', '.join(name for name, factor in augment.items() if name != 'class_name' and factor),
        'Feature maps': _feature_maps(options),
        'EMA half-life': _with_unit(options.get('ema_kimg'), 'kimg'),
        'Fine-tuned from': os.path.basename(str(options.get('resume_pkl') or '')),
        'Seed': options.get('random_seed'),
    }
    return {name: value for name, value in facts.items() if value not in (None, '')}


def _yes_no(value: Any) -> str | None:
    return None if value is None else 'yes' if value else 'no'


def _with_unit(value: Any, unit: str) -> str | None:
    return None if value is None else f'{value} {unit}'


def _batch(options: Mapping[str, Any]) -> str | None:
    batch, gpus, each = (options.get(key) for key in ('batch_size', 'num_gpus', 'batch_gpu'))
    if batch is None:
        return None
    return f'{batch}, {each} per pass on {gpus} device{"" if gpus == 1 else "s"}'


def _learning_rates(options: Mapping[str, Any]) -> Any:
    G, D = (_part(options, name).get('lr') for name in ('G_opt_kwargs', 'D_opt_kwargs'))
    return G if G == D else f'{G} (G), {D} (D)'


def _feature_maps(options: Mapping[str, Any]) -> str | None:
    synthesis = _part(_part(options, 'G_kwargs'), 'synthesis_kwargs')
    base, most = synthesis.get('channel_base'), synthesis.get('channel_max')
    return None if base is None else f'{base} / resolution, at most {most}'


def _augmentation(options: Mapping[str, Any]) -> str:
    if options.get('ada_target') is not None:
        return f'adaptive, target {options["ada_target"]}'
    p = options.get('augment_p')
    return f'fixed, p = {p}' if p is not None else 'none'
