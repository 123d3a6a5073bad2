# SPDX-License-Identifier: Apache-2.0
"""Metrics while training: what can be had is reported, what cannot is named once, nothing stops the run."""
import json

import pytest
import torch
from metrics_stand_in import write_detectors, write_images
from small_run import small_training

from dnnlib.util import UserError
from metrics import metric_main
from metrics.training_metrics import TrainingMetrics
from training.training_loop import train


@pytest.fixture
def metrics(monkeypatch, tmp_path):
    """A run with a metric that works, one that needs what is missing, and one that nobody knows."""
    def count(options):
        options.cache['calls'] = options.cache.get('calls', 0) + 1
        return {'count_calls': options.cache['calls'], 'pr_calls': options.cache['calls']}

    def missing(options):
        raise UserError('no feature network')

    def flaky(options):
        raise RuntimeError('this time')
    for function in (count, missing, flaky):
        monkeypatch.setitem(metric_main._METRICS, function.__name__, function)
    monkeypatch.setitem(metric_main._METRICS, 'swd', lambda options: {'swd': 1})
    return TrainingMetrics(['count', 'missing', 'nonsense'], dataset=None, run_dir=str(tmp_path))


def compute(metrics, said, is_untrained=False):
    path = f'{metrics.run_dir}/network-snapshot-000001.pkl'
    return metrics.compute(None, torch.device('cpu'), path, said.append, is_untrained)


def test_metrics_that_cannot_be_had_are_named_once_and_the_others_computed(metrics, tmp_path, capsys):
    said = []
    assert compute(metrics, said)['count_calls'] == 1
    assert len(said) == 2 and 'missing' in said[0] and 'nonsense' in said[1]
    assert compute(metrics, said)['count_calls'] == 2, 'the cache is kept from one call to the next'
    assert len(said) == 2
    lines = (tmp_path / 'metric-count.jsonl').read_text().splitlines()
    assert [json.loads(line)['results']['count_calls'] for line in lines] == [1, 2]
    assert json.loads(lines[0])['snapshot_pkl'] == 'network-snapshot-000001.pkl'
    assert not (tmp_path / 'metric-missing.jsonl').exists()


def test_a_failure_is_told_and_tried_again(metrics):
    metrics.names, said = ['flaky', 'count'], []
    assert 'count_calls' in compute(metrics, said)
    assert 'training continues: RuntimeError: this time' in said[0]
    assert metrics.names == ['flaky', 'count']


def test_an_untrained_network_gets_the_cheap_metric_only(metrics):
    metrics.names = ['count', 'swd']
    assert compute(metrics, [], is_untrained=True) == {'swd': 1}
    assert set(compute(metrics, [])) == {'count_calls', 'pr_calls', 'swd'}


def test_the_callers_list_of_names_stays_as_it_is(metrics, tmp_path):
    names = ['missing']
    compute(TrainingMetrics(names, dataset=None, run_dir=str(tmp_path)), [])
    assert names == ['missing']


def test_no_metrics_are_no_work(tmp_path):
    assert compute(TrainingMetrics([], dataset=None, run_dir=str(tmp_path)), []) == {}
    assert not list(tmp_path.iterdir())


def test_a_training_measures_what_it_saves_but_not_noise_and_keeps_the_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setitem(metric_main._METRICS, 'fid5k_full', lambda options: metric_main.fid(
        options, 'fid5k_full', 20))
    data, run_dir = write_images(tmp_path / 'data', 8, shape=(8, 8)), tmp_path / 'run'
    run_dir.mkdir()
    train(small_training(data, run_dir, 0.016, metrics='fid5k_full', snap='1', keep=1,
                         detector_dir=write_detectors(tmp_path / 'detectors')))
    lines = [json.loads(line) for line in (run_dir / 'metric-fid5k_full.jsonl').read_text().splitlines()]
    measured = {line['snapshot_pkl']: line['results']['fid5k_full'] for line in lines}
    assert len(measured) == len(lines) >= 3, 'every snapshot has a number of its own'
    saved = sorted(path.name for path in run_dir.glob('network-snapshot-*.pkl'))
    first, last = 'network-snapshot-000000.pkl', lines[-1]['snapshot_pkl']
    assert first not in measured, 'after a single step there is nothing to measure'
    assert saved == sorted({min(measured, key=measured.get), last})
    assert 'skipped' not in capsys.readouterr().out and all(len(line['data_key']) == 32 for line in lines)
