# SPDX-License-Identifier: Apache-2.0
"""Training curves: which points are drawn, and that a image comes out of whatever a run has left."""
import json

import numpy as np
import PIL.Image
import pytest

from dnnlib.util import UserError
from training.report import curves
from training.report.curves import plot_training_curves

pytest.importorskip('matplotlib')


def tick(kimg, **means):
    means = {'Progress/kimg': kimg, 'Loss/G/loss': 1.0, 'Progress/augment': 0.1} | means
    moments = {name: {'num': 1, 'mean': mean, 'std': 0.0} for name, mean in means.items()}
    return {**moments, 'timestamp': 1000 + kimg}


def write(path, rows):
    path.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows))


def draw(tmp_path, monkeypatch):
    """Plot tmp_path/stats.jsonl; returns {panel title: {curve label: points}}."""
    panels = []
    original = curves._draw
    monkeypatch.setattr(curves, '_draw', lambda p, path: (panels.extend(p), original(p, path)))
    plot_training_curves(tmp_path / 'stats.jsonl', tmp_path / 'curves.png')
    with PIL.Image.open(tmp_path / 'curves.png') as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image.convert('L')))) > 20
    return {panel.title: {curve.label: curve.points for curve in panel.curves} for panel in panels}


def test_panels_show_losses_signs_augmentation_and_metrics(tmp_path, monkeypatch):
    write(tmp_path / 'stats.jsonl', [
        tick(k, **{'Loss/G/loss': 1 + k, 'Loss/D/loss': 2 + k, 'Loss/signs/fake': -0.5})
        for k in (0.5, 1, 2)])
    write(tmp_path / 'metric-swd.jsonl', [
        {'results': {'swd': 9.0}, 'snapshot_pkl': 'network-snapshot-000000.pkl', 'timestamp': 1.0},
        {'results': {'swd': 4.0}, 'snapshot_pkl': 'network-snapshot-000002.pkl', 'timestamp': 2.0}])
    panels = draw(tmp_path, monkeypatch)
    assert panels['Losses'] == {'generator': [(0.5, 1.5), (1, 2), (2, 3)],
                                'discriminator': [(0.5, 2.5), (1, 3), (2, 4)]}
    signs = panels['Discriminator: mean sign of its output']
    assert signs == {'real images (r_t)': [], 'generated images': [(0.5, -0.5), (1, -0.5), (2, -0.5)]}
    assert panels['Augmentation probability'] == {'p': [(0.5, 0.1), (1, 0.1), (2, 0.1)]}
    assert panels['Image quality: swd'] == {'swd': [(0, 9), (2, 4)]}


def test_what_is_not_measured_has_no_panel(tmp_path, monkeypatch):
    measured = {'Loss/r1_penalty': 0.5, 'Timing/sec_per_kimg': 9.0}
    write(tmp_path / 'stats.jsonl', [tick(1), tick(2, **measured)])
    panels = draw(tmp_path, monkeypatch)
    assert panels['Regularisation'] == {'R1 (before gamma)': [(2, 0.5)], 'path length': []}
    assert panels['Time for a thousand images'] == {'sec/kimg': [(2, 9.0)]}
    assert 'Discriminator: mean output' not in panels


def test_a_run_with_a_single_tick_can_be_drawn(tmp_path, monkeypatch):
    write(tmp_path / 'stats.jsonl', [tick(0.1)])
    panels = draw(tmp_path, monkeypatch)
    assert panels['Losses'] == {'generator': [(0.1, 1.0)], 'discriminator': []}


def test_ticks_that_a_continued_run_wrote_again_are_dropped(tmp_path, monkeypatch):
    first = [tick(k, **{'Loss/G/loss': 1}) for k in (1, 2, 3, 4)]
    write(tmp_path / 'stats.jsonl', [*first, *(tick(k, **{'Loss/G/loss': 2}) for k in (2.5, 3, 5))])
    assert draw(tmp_path, monkeypatch)['Losses']['generator'] == [(1, 1), (2, 1), (2.5, 2), (3, 2), (5, 2)]


def test_broken_lines_and_values_that_are_no_numbers_are_skipped(tmp_path, monkeypatch):
    write(tmp_path / 'stats.jsonl', [
        '', '{"Progress/kimg": {"me', '[1]', tick(1), tick(2, **{'Loss/G/loss': None}),
        json.dumps(tick(3, **{'Loss/G/loss': float('nan')})), tick(4), {'timestamp': 1}])
    assert draw(tmp_path, monkeypatch)['Losses']['generator'] == [(1, 1), (4, 1)]


def test_a_metric_without_snapshot_is_placed_by_its_time(tmp_path, monkeypatch):
    write(tmp_path / 'stats.jsonl', [tick(0), tick(10)])
    write(tmp_path / 'metric-pr.jsonl', [
        {'results': {'precision': 0.5, 'recall': 0.25}, 'snapshot_pkl': None, 'timestamp': 1005},
        {'results': {'precision': 0.5}, 'timestamp': 1008}, {'results': None}, {'results': {'precision': 1}}])
    panels = draw(tmp_path, monkeypatch)
    assert panels['Image quality: pr'] == {'precision': [(5, 0.5), (8, 0.5)], 'recall': [(5, 0.25)]}


@pytest.mark.parametrize('rows', [None, [], ['{"broken'], [{'timestamp': 1}]])
def test_nothing_to_draw_is_said_in_one_line(rows, tmp_path):
    if rows is not None:
        write(tmp_path / 'stats.jsonl', rows)
    with pytest.raises(UserError, match=r'stats\.jsonl'):
        plot_training_curves(tmp_path / 'stats.jsonl', tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()
