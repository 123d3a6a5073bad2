# SPDX-License-Identifier: Apache-2.0
"""Curves as inline SVG: bounded in size for runs of any length, with values on hover."""
import html
import json
import math

import numpy as np

from training.report.curves import COLORS, Curve, Panel, Points

WIDTH_PX, HEIGHT_PX = 440, 230
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 58, 14, 10, 38
MAX_POINTS = 200  # per curve
SPIKE = 3.0  # times the 98th percentile: higher values are cut off
Band = list[tuple[float, float, float]]  # (kimg, lowest, highest)


def chart(panel: Panel) -> str:
    """The panel as HTML: a figure with title, legend with the latest values, and SVG."""
    curves = [(curve, *thin(curve.points)) for curve in panel.curves]
    drawn = [(curve, line, band) for curve, line, band in curves if line]
    if not drawn:
        return _figure(panel, '<p class="none">no values yet</p>', '')
    frame = _Frame(panel, [line for _, line, _ in drawn])
    marks = ''.join(_curve_marks(frame, curve, line, band) for curve, line, band in drawn)
    svg = (f'<svg viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-label="{html.escape(panel.title)}">'
           f'{frame.grid()}<svg x="{LEFT_PX}" y="{TOP_PX}" width="{frame.width}" height="{frame.height}" '
           f'overflow="hidden">{marks}</svg><line class="hair" y1="{TOP_PX}" '
           f'y2="{HEIGHT_PX - BOTTOM_PX}"/></svg><div class="tip"></div>')
    values = [{'label': curve.label, 'color': _color(curve), 'x': [_round(x) for x, _ in line],
               'y': [_round(y) for _, y in line]} for curve, line, _ in drawn]
    data = {'left': LEFT_PX, 'width': frame.width, 'total': WIDTH_PX, 'end': frame.x_end, 'curves': values}
    return _figure(panel, svg, html.escape(json.dumps(data, separators=(',', ':'))))


def thin(points: Points, max_points: int = MAX_POINTS) -> tuple[Points, Band]:
    """At most max_points points, as means of neighbours, and the ranges that the means hide."""
    if len(points) <= max_points:
        return points, []
    line, band = [], []
    for part in np.array_split(np.asarray(points, dtype=np.float64), max_points):
        x, y = part.mean(axis=0).tolist()
        line.append((x, y))
        band.append((x, float(part[:, 1].min()), float(part[:, 1].max())))
    return line, band


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    # Multiples of the step: adding it up would accumulate rounding errors.
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """Four significant digits; large numbers are rounded to integers."""
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


class _Frame:
    """Maps values to pixels."""

    def __init__(self, panel: Panel, lines: list[Points]) -> None:
        self.panel = panel
        self.width, self.height = WIDTH_PX - LEFT_PX - RIGHT_PX, HEIGHT_PX - TOP_PX - BOTTOM_PX
        self.x_end = max(line[-1][0] for line in lines) or 1.0
        self.low, self.high = panel.limits or _limits([y for line in lines for _, y in line])

    def x(self, value: float) -> float:
        return round(value / self.x_end * self.width, 1)

    def y(self, value: float) -> float:
        return round((self.high - value) / (self.high - self.low) * self.height, 1)

    def grid(self) -> str:
        """Grid lines, axes and tick labels."""
        parts = []
        right, bottom = WIDTH_PX - RIGHT_PX, HEIGHT_PX - BOTTOM_PX
        for value in nice_ticks(self.low, self.high, 5):
            y = TOP_PX + self.y(value)
            # The sign of D is its decision, so zero is emphasised.
            css = 'axis' if value == 0 and self.low < 0 else 'grid'
            parts.append(f'<line class="{css}" x1="{LEFT_PX}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         + _label(LEFT_PX - 7, y + 4, 'end', value))
        for value in nice_ticks(0, self.x_end, 6):
            x = LEFT_PX + self.x(value)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                         + _label(x, bottom + 17, 'middle', value))
        parts.append(f'<line class="axis" x1="{LEFT_PX}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
                     f'<text class="num" x="{right}" y="{HEIGHT_PX - 4}" text-anchor="end">kimg</text>')
        return ''.join(parts)


def _label(x: float, y: float, anchor: str, value: float) -> str:
    return f'<text class="num" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{short_number(value)}</text>'


def _limits(values: list[float]) -> tuple[float, float]:
    """From zero, or the minimum if negative, to the maximum without isolated spikes, with a margin."""
    low, high, usual = min(0.0, *values), max(0.0, *values), float(np.percentile(values, 98))
    if len(values) > 20 and usual > 0 and high > SPIKE * usual:
        high = usual * 1.3
    air = (high - low) * 0.06 or 1.0
    return low - air * (low < 0), high + air


def _curve_marks(frame: _Frame, curve: Curve, line: Points, band: Band) -> str:
    css = _color(curve)
    marks = ''
    if band:
        edge = [f'{frame.x(x)},{frame.y(high)}' for x, _, high in band]
        edge += [f'{frame.x(x)},{frame.y(low)}' for x, low, _ in reversed(band)]
        marks += f'<polygon class="band {css}" points="{" ".join(edge)}"/>'
    path = ' '.join(f'{frame.x(x)},{frame.y(y)}' for x, y in line)
    marks += f'<polyline class="line {css}" points="{path}"/>'
    # Few points are hard to see as a line alone.
    if len(line) <= 40:
        marks += ''.join(f'<circle class="dot {css}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="2.6"/>'
                         for x, y in line)
    return marks


def _figure(panel: Panel, body: str, data: str) -> str:
    legend = ''.join(
        f'<span class="key {_color(curve)}"><i></i>{html.escape(curve.label)} '
        f'<b>{short_number(curve.points[-1][1])}</b></span>' for curve in panel.curves if curve.points)
    return (f'<figure class="chart" data-chart="{data}"><figcaption><h3>{html.escape(panel.title)}</h3>'
            f'<div class="legend">{legend}</div></figcaption>{body}</figure>')


def _color(curve: Curve) -> str:
    """The CSS class of the colour, which depends on light and dark mode."""
    return f'c{COLORS.index(curve.color) if curve.color in COLORS else 0}'


def _round(value: float) -> float:
    return float(f'{value:.5g}')
