# SPDX-License-Identifier: Apache-2.0
"""What a run writes: log, statistics, sheets, curves; and what other ranks do not write."""
import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch

from dnnlib.util import UserError
from torch_utils.training_stats import Store
from training import run_log
from training.run_log import RunLog, StatsWriter
from training.ticks import TickReport

REPORT = TickReport(
    tick=0, cur_nimg=1500, total_sec=3, sec_per_tick=2, sec_per_kimg=1, maintenance_sec=1, augment=0.5)
MOMENTS = {'num': 2, 'mean': 1.5, 'std': 0.5}


class Events:
    """Stands in for TensorBoard's writer."""

    def __init__(self):
        self.scalars, self.is_closed = [], False

    def add_scalar(self, name, value, global_step, walltime):
        self.scalars.append((name, value, global_step, walltime))

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


@pytest.fixture(autouse=True)
def events(monkeypatch):
    events = Events()
    monkeypatch.setattr(run_log, '_open_tensorboard', lambda run_dir: events)
    return events


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


def test_tensorboard_gets_new_values_in_time_since_the_start(tmp_path, events, monkeypatch):
    monkeypatch.setattr(run_log.time, 'time', lambda: 1007.0)
    writer = StatsWriter(tmp_path, start_time=1000.0)
    writer.write({'a': MOMENTS, 'b': {'num': 0, 'mean': math.nan, 'std': 0}}, 4999)
    writer.write_metrics({'swd': 3.0}, 5000)
    writer.close()
    assert events.scalars == [('a', 1.5, 4, 7.0), ('Metrics/swd', 3.0, 5, 7.0)] and events.is_closed


def test_without_tensorboard_a_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    monkeypatch.delattr(torch.utils, 'tensorboard', raising=False)
    StatsWriter(tmp_path).close()
    assert 'pip install tensorboard' in capsys.readouterr().out


def test_with_tensorboard_events_go_to_the_run_folder(monkeypatch, tmp_path):
    monkeypatch.undo()
    module = types.ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = lambda folder: folder
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    monkeypatch.setattr(torch.utils, 'tensorboard', module, raising=False)
    assert run_log._open_tensorboard(tmp_path) == str(tmp_path)


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


def test_sheets_metrics_and_curves_land_in_the_run_folder(tmp_path, events):
    pytest.importorskip('matplotlib')
    with RunLog(tmp_path) as log:
        log.save_grid('reals.png', np.zeros([1, 3, 2, 2]), (0, 1), (1, 1))
        log.tick(REPORT)
        log.write_metrics({'swd': 1.0}, 1500)
        assert log.plot() == tmp_path / 'training_curves.png'
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'reals.png', 'stats.jsonl', 'log.txt', 'training_curves.png'}
    assert ('Metrics/swd', 1.0, 1) in [scalar[:3] for scalar in events.scalars]


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
