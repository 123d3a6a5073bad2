# SPDX-License-Identifier: Apache-2.0
"""What a run writes: log, statistics, sheets, curves; and what other ranks do not write."""
import json
import math
import os
import sys

import numpy as np
import pytest

from dnnlib.util import UserError
from torch_utils.training_stats import Store
from training.report.ticks import TickReport
from training.run import log as run_log
from training.run.log import RunLog, StatsWriter

REPORT = TickReport(
    tick=0, cur_nimg=1500, total_sec=3, sec_per_tick=2, sec_per_kimg=1, maintenance_sec=1, augment=0.5)
MOMENTS = {'num': 2, 'mean': 1.5, 'std': 0.5}


class Sink:
    """Stands in for TensorBoard and W&B."""

    def __init__(self):
        self.scalars, self.sheets, self.is_closed = [], [], False

    def add_scalars(self, scalars, cur_nimg, now):
        self.scalars += [(name, value, cur_nimg) for name, value in scalars.items()]

    def add_sheet(self, path, cur_nimg):
        self.sheets.append((path.name, cur_nimg))

    def close(self):
        self.is_closed = True


@pytest.fixture(autouse=True)
def sink(monkeypatch):
    sink = Sink()
    sink.asked = []

    def open_sinks(run_dir, start_time, wandb):
        sink.asked.append(wandb)
        return [sink]
    monkeypatch.setattr(run_log, 'open_sinks', open_sinks)
    return sink


def strict_rows(path):
    """The lines of a file as JSON proper, which knows no NaN."""
    def refuse(token):
        raise AssertionError(f'{token} is not JSON')
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_statistics_are_lines_of_valid_json_with_null_for_nan(tmp_path):
    writer = StatsWriter(tmp_path)
    writer.write({'a': MOMENTS, 'b': {'num': 0, 'mean': math.nan, 'std': math.inf}}, 0)
    writer.close()
    (row,) = strict_rows(tmp_path / 'stats.jsonl')
    assert row.pop('timestamp') > 1.6e9
    assert row == {'a': MOMENTS, 'b': {'num': 0, 'mean': None, 'std': None}}


def test_lines_are_appended_after_half_a_line_of_a_killed_run(tmp_path):
    path = tmp_path / 'stats.jsonl'
    path.write_text('{"a": 1}\n{"half')
    writer = StatsWriter(tmp_path)
    writer.write({}, 0)
    assert path.read_text().splitlines()[:2] == ['{"a": 1}', '{"half']  # readable before it is closed, too
    assert json.loads(path.read_text().splitlines()[2]).keys() == {'timestamp'}
    writer.close()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_a_full_disk_costs_the_line_but_not_the_run(tmp_path, capsys):
    (tmp_path / 'stats.jsonl').symlink_to('/dev/full')
    writer = StatsWriter(tmp_path)
    writer.write({'a': MOMENTS}, 0)
    writer.close()
    assert 'stats.jsonl: cannot be written' in capsys.readouterr().out


def test_new_values_are_passed_on(tmp_path, sink):
    writer = StatsWriter(tmp_path)
    writer.write({'a': MOMENTS, 'b': {'num': 0, 'mean': math.nan, 'std': 0}}, 4999)
    writer.write_metrics({'swd': 3.0}, 5000)
    writer.write_sheet(tmp_path / 'fakes.png', 6000)
    writer.close()
    assert sink.scalars == [('a', 1.5, 4999), ('Metrics/swd', 3.0, 5000)]
    assert sink.sheets == [('fakes.png', 6000)] and sink.is_closed


@pytest.mark.parametrize('wandb', [False, True])
def test_wandb_is_a_matter_of_rank_0_and_of_being_asked(tmp_path, sink, wandb):
    RunLog(tmp_path, rank=1, wandb=wandb).close()
    assert not sink.asked
    RunLog(tmp_path, wandb=wandb).close()
    assert sink.asked == [wandb]


def test_a_tick_prints_its_line_and_writes_losses_and_timings(tmp_path, capsys):
    store = Store()
    store.report('Loss/G/loss', 99.0)  # before the log is made: not included
    with RunLog(tmp_path, store=store) as log:
        store.report('Loss/G/loss', [1.0, 3.0])
        log.tick(REPORT, {'Gmain': 12.5})
        log.tick(REPORT)
    first, second = strict_rows(tmp_path / 'stats.jsonl')
    assert first['Loss/G/loss'] == {'num': 2, 'mean': 2.0, 'std': 1.0}
    assert first['Timing/Gmain'] == {'num': 1, 'mean': 12.5, 'std': 0.0}
    assert list(first) == ['Loss/G/loss', *REPORT.statistics(), 'Timing/Gmain', 'timestamp']
    # Old values are not repeated as if they were new.
    assert second['Loss/G/loss'] == {'num': 0, 'mean': None, 'std': None}
    assert capsys.readouterr().out == f'{REPORT.line()}\n' * 2
    assert (tmp_path / 'log.txt').read_text() == f'{REPORT.line()}\n' * 2


def test_a_continued_run_appends_to_its_files(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path) as log:
            log.tick(REPORT)
    assert len(strict_rows(tmp_path / 'stats.jsonl')) == 2
    assert len((tmp_path / 'log.txt').read_text().splitlines()) == 2


def test_other_ranks_write_nothing_but_take_part(tmp_path, capsys):
    store = Store(rank=1)
    with RunLog(tmp_path, rank=1, store=store) as log:
        store.report('Loss/G/loss', 1.0)
        log.tick(REPORT, {'Gmain': 1.0})
        log.save_grid('a.png', np.zeros([1, 3, 2, 2]), (0, 1), (1, 1))
        log.write_metrics({'swd': 1.0}, 0)
        log.plot()
        assert log.collector.num('Loss/G/loss') == 1 and log.collector.num('Progress/kimg') == 0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''


def test_sheets_metrics_curves_and_the_page_land_in_the_run_folder(tmp_path, sink):
    pytest.importorskip('matplotlib')
    with RunLog(tmp_path) as log:
        log.save_grid('reals.png', np.zeros([1, 3, 2, 2]), (0, 1), (1, 1))
        log.tick(REPORT)
        log.save_grid('fakes000001.png', np.zeros([1, 3, 2, 2]), (0, 1), (1, 1))
        log.write_metrics({'swd': 1.0}, 1500)
        log.warn('p is high')
        assert log.plot() == tmp_path / 'training_curves.png'
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        'reals.png', 'fakes000001.png', 'stats.jsonl', 'log.txt', 'training_curves.png', 'progress.html'}
    assert ('Metrics/swd', 1.0, 1500) in sink.scalars
    # Training images do not change, and need no place among those over time.
    assert sink.sheets == [('fakes000001.png', 1500)]
    assert 'Warning: p is high' in (tmp_path / 'log.txt').read_text()
    assert '<li>p is high</li>' in (tmp_path / 'progress.html').read_text()


def test_curves_that_cannot_be_drawn_cost_one_line_and_not_the_run(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise UserError('no matplotlib')
    monkeypatch.setattr(run_log, 'plot_training_curves', fail)
    with RunLog(tmp_path) as log:
        log.tick(REPORT)
        capsys.readouterr()
        log.plot()
        log.plot()
    assert capsys.readouterr().out == 'Training continues, but no matplotlib\n'
    assert (tmp_path / 'progress.html').is_file()


def test_streams_are_given_back_after_an_error(tmp_path):
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), RunLog(tmp_path) as log:
        assert sys.stdout is not before[0]
        raise KeyError
    assert (sys.stdout, sys.stderr) == before
    log.close()


def test_a_folder_that_cannot_be_written_is_named_and_streams_stay(tmp_path):
    before = sys.stdout, sys.stderr
    with pytest.raises(UserError, match=r'stats\.jsonl: cannot be written'):
        RunLog(tmp_path / 'missing')
    (tmp_path / 'log.txt').mkdir()
    with pytest.raises(UserError, match=r'log\.txt: cannot be written'):
        RunLog(tmp_path)
    assert (sys.stdout, sys.stderr) == before
