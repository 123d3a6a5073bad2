# SPDX-License-Identifier: Apache-2.0
"""Curves as SVG: ticks, thinning, and that every image is well-formed and small."""
import json
import xml.etree.ElementTree as ET

import pytest

from training.report.charts import HEIGHT_PX, WIDTH_PX, chart, nice_ticks, short_number, thin
from training.report.curves import BLUE, ORANGE, Curve, Panel


def parse(panel):
    """(root element, data for the pointer)."""
    root = ET.fromstring(chart(panel))
    data = root.get('data-chart')
    return root, json.loads(data) if data else None


def polyline(root, css):
    (line,) = root.findall(f".//polyline[@class='line {css}']")
    return [tuple(map(float, point.split(','))) for point in line.get('points').split()]


@pytest.mark.parametrize('low, high, count, expected', [
    (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-1.05, 1.05, 5, [-1, -0.5, 0, 0.5, 1]),
    (0, 25000, 6, [0, 5000, 10000, 15000, 20000, 25000]), (0, 0.0007, 2, [0, 0.0005]), (3, 3, 5, [3])])
def test_ticks_are_round_numbers_within_the_range(low, high, count, expected):
    assert nice_ticks(low, high, count) == pytest.approx(expected)


def test_numbers_are_short():
    shown = [short_number(x) for x in (0.123456, 12.3456, 25000.4, -1234)]
    assert shown == ['0.1235', '12.35', '25,000', '-1,234']


def test_short_curves_stay_and_long_ones_become_means_with_a_range():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    assert thin(points[:100], 100) == (points[:100], [])
    line, band = thin(points, 100)
    assert len(line) == len(band) == 100 and line[0] == (4.5, 0.5) and band[-1] == (994.5, 0.0, 1.0)


def test_curves_go_from_left_to_right_and_higher_values_are_higher_up():
    root, data = parse(Panel('t', 'y', [Curve('a', [(0, 0), (5, 1), (10, 2)], BLUE)]))
    line = polyline(root, 'c0')
    assert [x for x, _ in line] == [0, data['width'] / 2, data['width']]
    assert line[0][1] > line[1][1] > line[2][1] >= 0 and line[0][1] <= HEIGHT_PX
    assert data['curves'] == [{'label': 'a', 'color': 'c0', 'x': [0, 5, 10], 'y': [0, 1, 2]}]
    assert data['total'] == WIDTH_PX and data['end'] == 10


def test_fixed_limits_hold_and_zero_is_marked_between_both_signs():
    root, _ = parse(Panel('t', 'y', [Curve('a', [(1, 1.0)], BLUE)], limits=(-1.0, 1.0)))
    assert polyline(root, 'c0')[0][1] == 0
    assert len(root.findall(".//line[@class='axis'][@x2='426']")) == 2  # zero, and the bottom


def test_a_lone_spike_leaves_the_image_so_that_the_rest_can_be_seen():
    values = [100.0] + [1.0] * 99
    root, _ = parse(Panel('t', 'y', [Curve('a', [(float(i), y) for i, y in enumerate(values)], BLUE)]))
    line = polyline(root, 'c0')
    assert line[0][1] < 0 < line[1][1] < HEIGHT_PX / 2


def test_names_from_a_file_are_escaped():
    text = chart(Panel('<script>', 'y', [Curve('"><img src=x>', [(1, 1)], BLUE)]))
    assert '<script>' not in text and '<img' not in text
    ET.fromstring(text)


def test_empty_curves_are_left_out_and_an_empty_panel_says_so():
    root, data = parse(Panel('t', 'y', [Curve('a', [], BLUE), Curve('b', [(1, 2), (2, 3)], ORANGE)]))
    assert [curve['label'] for curve in data['curves']] == ['b'] and polyline(root, 'c1')
    assert 'no values yet' in chart(Panel('t', 'y', [Curve('a', [], BLUE)]))


@pytest.mark.parametrize('points', [[(0, 0)], [(5, -3.0)], [(0, 1e-9), (1, 1e9)], [(0, 0), (3, 0)]])
def test_odd_values_give_a_image(points):
    root, _ = parse(Panel('t', 'y', [Curve('a', points, 'red')]))
    assert all(abs(y) < 1e4 for _, y in polyline(root, 'c0'))


def test_a_long_run_makes_no_larger_image():
    points = [(i * 4.0, 1 + (i * 7919 % 1000) / 1000) for i in range(20000)]
    assert len(chart(Panel('t', 'y', [Curve('a', points, BLUE), Curve('b', points, ORANGE)]))) < 30_000
