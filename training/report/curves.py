# SPDX-License-Identifier: Apache-2.0
"""Training curves as training_curves.png: losses, outputs of D, augmentation, image quality."""
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import UserError, read_regular, replace_file
from training.report.ticks import nimg_of_name

# Distinguishable with any colour vision deficiency (Okabe and Ito 2008).
COLORS = BLUE, ORANGE, GREEN = '#0072b2', '#d55e00', '#009e73'
Points = list[tuple[float, float]]  # (kimg, value), ascending


@dataclass(frozen=True)
class Curve:
    """A line in a panel."""

    label: str
    points: Points
    color: str


@dataclass(frozen=True)
class Panel:
    """One set of axes. limits: of the y axis, None: from the curves."""

    title: str
    y_label: str
    curves: list[Curve]
    limits: tuple[float, float] | None = None


def plot_training_curves(stats_jsonl: str | os.PathLike, png_path: str | os.PathLike) -> None:
    """Plot stats.jsonl, and metric-*.jsonl in the same directory, over kimg.

    Ticks that a resumed run repeated are ignored. Raises UserError if the file is missing or contains no
    tick.
    """
    rows = read_ticks(stats_jsonl)
    _draw(training_panels(rows, Path(stats_jsonl).parent), png_path)


def read_ticks(stats_jsonl: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of stats.jsonl, ascending in kimg, without those that a resumed run repeated.

    Raises UserError if the file is missing or contains no tick.
    """
    rows = _without_abandoned(read_jsonl(stats_jsonl))
    if not rows:
        raise UserError(f'{stats_jsonl}: contains no tick yet; train until the first status line appears')
    return rows


def training_panels(rows: list[dict[str, Any]], run_dir: str | os.PathLike) -> list[Panel]:
    """Panels of the statistics in rows from read_ticks, and of metric-*.jsonl in run_dir."""
    # Not every configuration has R1 or path length regularisation.
    optional = [panel for panel in _side_panels(rows) if any(curve.points for curve in panel.curves)]
    return [*_loss_panels(rows), *_metric_panels(Path(run_dir), rows), *optional]


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file; invalid lines, for example after a crash, are skipped."""
    try:
        lines = read_regular(path).decode(errors='replace').splitlines()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}); give stats.jsonl of a '
                        'run') from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def curve_points(rows: list[dict[str, Any]], x: Callable[[dict], Any], y: Callable[[dict], Any]) -> Points:
    """(x, y) of the rows where both are finite, ascending in x; the last row of each x counts."""
    pairs = ((x(row), y(row)) for row in rows)
    return sorted({a: b for a, b in pairs if is_number(a) and is_number(b)}.items())


def is_number(value: Any) -> bool:
    """Whether this is a finite number that fits a float; JSON has integers of any length."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def mean_of(row: dict[str, Any], name: str) -> float | None:
    """The mean of a statistic in a line of stats.jsonl; None if it has no value."""
    moments = row.get(name)
    mean = moments.get('mean') if isinstance(moments, dict) else None
    return mean if is_number(mean) else None


def _kimg(row: dict[str, Any]) -> float | None:
    return mean_of(row, 'Progress/kimg')


def _without_abandoned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ticks without those that were repeated after resuming from an earlier training state."""
    kept, earliest = [], math.inf
    # From the end: a line counts if all later ones have a larger kimg.
    for row in reversed(rows):
        kimg = _kimg(row)
        if is_number(kimg) and kimg < earliest:
            kept.append(row)
            earliest = kimg
    return kept[::-1]


def _curve(rows: list[dict[str, Any]], label: str, name: str, color: str) -> Curve:
    return Curve(label, curve_points(rows, _kimg, lambda row: mean_of(row, name)), color)


def _loss_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    return [
        Panel('Losses', 'loss per image', [
            _curve(rows, 'generator', 'Loss/G/loss', BLUE),
            _curve(rows, 'discriminator', 'Loss/D/loss', ORANGE)]),
        Panel('Discriminator: mean sign of its output', 'sign', [
            _curve(rows, 'real images (r_t)', 'Loss/signs/real', BLUE),
            _curve(rows, 'generated images', 'Loss/signs/fake', ORANGE)], limits=(-1.05, 1.05)),
        Panel('Augmentation probability', 'p', [
            _curve(rows, 'p', 'Progress/augment', GREEN)], limits=(-0.02, 1.02)),
    ]


def _side_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """For debugging."""
    return [
        Panel('Discriminator: mean output', 'score', [
            _curve(rows, 'real images', 'Loss/scores/real', BLUE),
            _curve(rows, 'generated images', 'Loss/scores/fake', ORANGE)]),
        Panel('Regularisation', 'penalty', [
            _curve(rows, 'R1 (before gamma)', 'Loss/r1_penalty', BLUE),
            _curve(rows, 'path length', 'Loss/pl_penalty', ORANGE)]),
        Panel('Time for a thousand images', 'sec/kimg', [
            _curve(rows, 'sec/kimg', 'Timing/sec_per_kimg', GREEN)]),
    ]


def _metric_panels(run_dir: Path, stats: list[dict[str, Any]]) -> list[Panel]:
    """One panel per metric file, one curve per result in it."""
    panels = []
    for path in sorted(run_dir.glob('metric-*.jsonl')):
        rows = [row for row in read_jsonl(path) if isinstance(row.get('results'), dict)]
        title = f'Image quality: {path.stem.removeprefix("metric-")}'
        panels.append(Panel(title, 'metric', _curves(rows, stats)))
    return panels


def _curves(rows: list[dict[str, Any]], stats: list[dict[str, Any]]) -> list[Curve]:
    # A function binds the name immediately; a lambda in a loop would not.
    def points(name: str) -> Points:
        return curve_points(rows, lambda row: _metric_kimg(row, stats), lambda row: row['results'].get(name))
    names = dict.fromkeys(name for row in rows for name in row['results'])
    return [Curve(name, points(name), color) for name, color in zip(names, COLORS, strict=False)]


def _metric_kimg(row: dict[str, Any], stats: list[dict[str, Any]]) -> float | None:
    """kimg of a metric: from the name of the snapshot, else from the timestamp."""
    nimg = nimg_of_name(str(row.get('snapshot_pkl')), 'network-snapshot-')
    if nimg is not None:
        return nimg / 1000
    # Metrics that were evaluated without a snapshot have a timestamp only.
    times = curve_points(stats, lambda tick: tick.get('timestamp'), _kimg)
    if not times or not is_number(row.get('timestamp')):
        return None
    return float(np.interp(row['timestamp'], *zip(*times, strict=True)))


def _draw(panels: list[Panel], png_path: str | os.PathLike) -> None:
    # Without pyplot: it needs no display and shares no state with figures of the caller.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f'{png_path}: cannot be drawn without matplotlib; pip install matplotlib') from error
    columns = 2
    rows = -(-len(panels) // columns)
    width, height = 6.0 * columns, 3.4 * rows  # inches, as all below
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    # Fixed margins: tight_layout takes as long as plotting.
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.2 / width, bottom=0.55 / height, top=1 - 0.4 / height,
        wspace=0.8 / 5.1, hspace=1.0 / 2.45)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel)
    # With an odd number of panels, the last axes are unused.
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    with replace_file(png_path) as temporary:
        figure.savefig(temporary, format='png')


def _draw_panel(ax: Any, panel: Panel) -> None:
    curves = [curve for curve in panel.curves if curve.points]
    for curve in curves:
        x, y = zip(*curve.points, strict=True)
        # Few points are hard to see as a line alone.
        marker = 'o' if len(x) < 30 else None
        ax.plot(x, y, color=curve.color, label=curve.label, linewidth=1.6, marker=marker, markersize=3.5)
    if not curves:
        ax.text(0.5, 0.5, 'no values', transform=ax.transAxes, ha='center', va='center', color='gray')
    ax.set_title(panel.title, fontsize=11)
    ax.set_xlabel('images shown (kimg)')
    ax.set_ylabel(panel.y_label)
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)
    # Start at zero unless values are negative, to keep the curves comparable.
    if panel.limits is None:
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    else:
        ax.set_ylim(*panel.limits)
    if len(curves) > 1:
        ax.legend(fontsize=9, frameon=False)
