# SPDX-License-Identifier: Apache-2.0
"""progress.html: a run on one page, curves and pictures, that opens from a file and loads nothing."""
import html
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnnlib.util import format_time, replace_file
from training.report.charts import chart, short_number
from training.report.curves import mean_of, read_jsonl, read_ticks, training_panels
from training.report.template import POLICY, SCRIPT, STYLE
from training.report.thumbnails import Sheet, evenly, fake_sheets, sheet_uri, thumbnail_uri

PAGE_NAME = 'progress.html'
WARNING = 'Warning: '
# Lines of log.txt that somebody who looks at the run should see.
WARNING_LINE = re.compile(r'Warning: |Note: |Error: |.*(?:Remedies:|not saved|cannot be )')
MAX_WARNINGS, MAX_WARNING_CHARS = 20, 500
RECENT_TICKS = 20  # for the estimate of the remaining time
LOWER_IS_BETTER = ('fid', 'kid', 'swd', 'ppl')
Ticks = list[dict[str, Any]]


def write_progress_page(run_dir: str | os.PathLike) -> Path:
    """Write progress.html into the folder of a run, from what lies there; returns its path.

    Needs stats.jsonl with a tick; training_options.json, metrics, sheets and log.txt are shown if there. The
    page stays below 2 MB for runs of any length. Raises UserError if it cannot be written, or there is no
    tick.
    """
    path = Path(run_dir, PAGE_NAME)
    text = progress_page(run_dir)
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8')
    return path


def progress_page(run_dir: str | os.PathLike) -> str:
    """The text of the page: see write_progress_page."""
    folder = Path(run_dir).resolve()
    ticks, options = read_ticks(folder / 'stats.jsonl'), read_options(folder)
    charts = ''.join(chart(panel) for panel in training_panels(ticks, folder))
    title = html.escape(folder.name)
    parts = [_header(folder, ticks, options), _warnings(folder), _pictures(folder, options),
             f'<h2>Curves</h2><div class="charts">{charts}</div>', _facts(options)]
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n' + '\n'.join(parts)
            + f'\n</main><dialog><img alt=""></dialog><script>{SCRIPT}</script></body></html>\n')


def eta_sec(ticks: Ticks, total_kimg: float) -> float | None:
    """Seconds until total_kimg at the speed of the latest ticks, all work included; None if unknown."""
    recent = ticks[-RECENT_TICKS:]
    points = [(mean_of(row, 'Progress/kimg'), mean_of(row, 'Timing/total_sec')) for row in recent]
    points = [(kimg, sec) for kimg, sec in points if kimg is not None and sec is not None]
    if len(points) < 2:
        return None
    (first_kimg, first_sec), (kimg, sec) = points[0], points[-1]
    # The clock of a run that was started anew may have begun at zero.
    if kimg <= first_kimg or sec <= first_sec:
        return None
    return max(total_kimg - kimg, 0) * (sec - first_sec) / (kimg - first_kimg)


def log_warnings(log: str | os.PathLike) -> list[str]:
    """The latest warnings in a log.txt, each once, oldest first; empty if there is no such file."""
    try:
        lines = Path(log).read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return []
    found = dict.fromkeys(line.strip() for line in lines if WARNING_LINE.match(line))
    return [line.removeprefix(WARNING)[:MAX_WARNING_CHARS] for line in list(found)[-MAX_WARNINGS:]]


def read_options(folder: Path) -> dict[str, Any]:
    """training_options.json of a run's folder; empty if it cannot be read."""
    try:
        options = json.loads((folder / 'training_options.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return options if isinstance(options, dict) else {}


def _part(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = options.get(name)
    return part if isinstance(part, Mapping) else {}


def _header(folder: Path, ticks: Ticks, options: Mapping[str, Any]) -> str:
    """Name, bar and the numbers of the moment."""
    latest = ticks[-1]
    kimg = mean_of(latest, 'Progress/kimg') or 0.0
    total = options.get('total_kimg')
    has_total = isinstance(total, (int, float)) and total > 0
    share = min(kimg / total, 1.0) if has_total else None
    cards = [('kimg shown' if share is None else f'of {short_number(total)} kimg', short_number(kimg))]
    cards += _time_cards(ticks, total if has_total else None, share)
    augment, speed = mean_of(latest, 'Progress/augment'), mean_of(latest, 'Timing/sec_per_kimg')
    cards += [('sec/kimg', short_number(speed))] if speed is not None else []
    cards += [('augment p', f'{augment:.3f}')] if augment is not None else []
    cards += _metric_cards(folder)
    boxes = ''.join(f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
                    for label, value in cards)
    bar = '' if share is None else f'<div class="bar"><div style="width: {share:.2%}"></div></div>'
    when = time.strftime('%Y-%m-%d %H:%M', time.localtime())
    return (f'<div class="top"><h1>{html.escape(folder.name)}</h1><span class="soft">written {when}; reload '
            f'after the next snapshot</span></div>{bar or "<p></p>"}<div class="cards">{boxes}</div>')


def _time_cards(ticks: Ticks, total: float | None, share: float | None) -> list[tuple[str, str]]:
    cards = []
    elapsed = mean_of(ticks[-1], 'Timing/total_sec')
    if elapsed is not None:
        cards.append(('elapsed', format_time(elapsed)))
    if share == 1:
        return [*cards, ('state', 'finished')]
    eta = None if total is None else eta_sec(ticks, total)
    return cards if eta is None else [*cards, ('remaining (estimate)', format_time(eta))]


def _metric_cards(folder: Path) -> list[tuple[str, str]]:
    """The best value of each metric of which less is better, else the latest."""
    cards = []
    for path in sorted(folder.glob('metric-*.jsonl')):
        rows = [row for row in read_jsonl(path) if isinstance(row.get('results'), dict) and row['results']]
        if not rows:
            continue
        name = next(iter(rows[-1]['results']))
        values = [row['results'].get(name) for row in rows]
        numbers = [value for value in values if isinstance(value, (int, float)) and value == value]
        if not numbers:
            continue
        if name.startswith(LOWER_IS_BETTER):
            cards.append((f'best {name}, now {short_number(numbers[-1])}', short_number(min(numbers))))
        else:
            cards.append((name, short_number(numbers[-1])))
    return cards


def _warnings(folder: Path) -> str:
    lines = log_warnings(folder / 'log.txt')
    if not lines:
        return ''
    items = ''.join(f'<li>{html.escape(line)}</li>' for line in lines)
    return f'<h2>Warnings</h2><ul class="warnings">{items}</ul>'


def _pictures(folder: Path, options: Mapping[str, Any]) -> str:
    """The latest generated pictures beside training pictures, and how they came to be."""
    tile, sheets = tile_size(options), fake_sheets(folder)
    shown = []
    if sheets:
        kimg, path = sheets[-1]
        shown.append((path, f'Generated at {kimg:.10g} kimg'))
    shown.append((folder / 'reals.png', 'Training pictures'))
    large = [Sheet(uri, caption) for path, caption in shown if (uri := sheet_uri(path, tile))]
    strip = [Sheet(uri, 'at the start' if path.stem == 'fakes_init' else f'{kimg:.10g} kimg')
             for kimg, path in evenly(sheets) if (uri := thumbnail_uri(path, tile))]
    text = ''
    if large:
        figures = ''.join(_figure(sheet, 'h3') for sheet in large)
        text += f'<h2>Pictures</h2><div class="sheets">{figures}</div>'
    if len(strip) > 1:
        figures = ''.join(_figure(sheet, 'span') for sheet in strip)
        text += f'<h2>The same latents over time</h2><div class="strip">{figures}</div>'
    return text


def _figure(sheet: Sheet, tag: str) -> str:
    caption = html.escape(sheet.caption)
    return (f'<figure class="sheet"><figcaption><{tag}>{caption}</{tag}></figcaption>'
            f'<img src="{sheet.uri}" alt="{caption}"></figure>')


def tile_size(options: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of a picture, if the options tell."""
    size = _part(options, 'training_set_kwargs').get('resolution')
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2:
        return None
    return (sides[0], sides[1]) if all(isinstance(side, int) and side > 0 for side in sides) else None


def _facts(options: Mapping[str, Any]) -> str:
    """The options that one compares between runs."""
    data, augment = _part(options, 'training_set_kwargs'), _part(options, 'augment_kwargs')
    tile = tile_size(options)
    facts = {
        'Data': os.path.basename(str(data.get('path') or '')),
        'Pictures': data.get('max_size'),
        'Size': f'{tile[1]}x{tile[0]}' if tile else None,
        'Mirrored': _yes_no(data.get('xflip')),
        'Labels': _yes_no(data.get('use_labels')),
        'Batch': _batch(options),
        'Learning rate': _learning_rates(options),
        'R1 gamma': _part(options, 'loss_kwargs').get('r1_gamma'),
        'Augmentation': _augmentation(options),
        'Transforms': ', '.join(name for name, factor in augment.items() if name != 'class_name' and factor),
        'Feature maps': _feature_maps(options),
        'Average of G': _with_unit(options.get('ema_kimg'), 'kimg'),
        'Transfer from': os.path.basename(str(options.get('resume_pkl') or '')),
        'Seed': options.get('random_seed'),
    }
    rows = ''.join(f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>'
                   for name, value in facts.items() if value not in (None, ''))
    return f'<h2>Options</h2><dl class="facts">{rows}</dl>' if rows else ''


def _yes_no(value: Any) -> str | None:
    return None if value is None else 'yes' if value else 'no'


def _with_unit(value: Any, unit: str) -> str | None:
    return None if value is None else f'{value} {unit}'


def _batch(options: Mapping[str, Any]) -> str | None:
    batch, gpus, each = (options.get(key) for key in ('batch_size', 'num_gpus', 'batch_gpu'))
    if batch is None:
        return None
    return f'{batch}, {each} at a time on {gpus} device{"" if gpus == 1 else "s"}'


def _learning_rates(options: Mapping[str, Any]) -> Any:
    G, D = (_part(options, name).get('lr') for name in ('G_opt_kwargs', 'D_opt_kwargs'))
    return G if G == D else f'{G} (G), {D} (D)'


def _feature_maps(options: Mapping[str, Any]) -> str | None:
    synthesis = _part(_part(options, 'G_kwargs'), 'synthesis_kwargs')
    base, most = synthesis.get('channel_base'), synthesis.get('channel_max')
    return None if base is None else f'{base} / level, at most {most}'


def _augmentation(options: Mapping[str, Any]) -> str:
    if options.get('ada_target') is not None:
        return f'adaptive, target {options["ada_target"]}'
    p = options.get('augment_p')
    return f'fixed, p = {p}' if p is not None else 'none'
