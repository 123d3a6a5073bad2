# SPDX-License-Identifier: Apache-2.0
"""Metrics while training: what can be had is reported, what cannot is named once, nothing stops the run."""
import json

import pytest

from metrics import metric_main
from metrics.training_metrics import TrainingMetrics


@pytest.fixture
def metrics(monkeypatch, tmp_path):
    """A run with one metric that works, one that needs what is missing, and one that nobody knows."""
    def count(options):
        options.cache['calls'] = options.cache.get('calls', 0) + 1
        return {'count_calls': options.cache['calls']}
    monkeypatch.setitem(metric_main._METRICS, 'count', count)
    return TrainingMetrics(['count', 'fid50k_full', 'nonsense'], dataset=None, run_dir=str(tmp_path))


def compute(metrics, said):
    snapshot_pkl = f'{metrics.run_dir}/net.pkl'
    return metrics.compute(G_ema=None, device=None, snapshot_pkl=snapshot_pkl, say=said.append)


def test_metrics_that_cannot_be_had_are_named_once_and_the_others_computed(metrics, tmp_path, capsys):
    said = []
    assert compute(metrics, said) == {'count_calls': 1}
    assert len(said) == 2 and 'fid50k_full' in said[0] and 'nonsense' in said[1]
    assert compute(metrics, said) == {'count_calls': 2}, 'the cache is kept from one call to the next'
    assert len(said) == 2
    lines = (tmp_path / 'metric-count.jsonl').read_text().splitlines()
    assert [json.loads(line)['results'] for line in lines] == [{'count_calls': 1}, {'count_calls': 2}]
    assert json.loads(lines[0])['snapshot_pkl'] == 'net.pkl'
    assert not (tmp_path / 'metric-fid50k_full.jsonl').exists()


def test_the_callers_list_of_names_stays_as_it_is(tmp_path):
    names = ['fid50k_full']
    compute(TrainingMetrics(names, dataset=None, run_dir=str(tmp_path)), [])
    assert names == ['fid50k_full']


def test_no_metrics_are_no_work(tmp_path):
    assert compute(TrainingMetrics([], dataset=None, run_dir=str(tmp_path)), []) == {}
    assert not list(tmp_path.iterdir())
