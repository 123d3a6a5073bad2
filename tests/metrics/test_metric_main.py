# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics, what a result holds, and where reports go."""
import json
import math

import numpy as np
import pytest
import torch
from small_networks import small_generator

from dnnlib.util import UserError
from metrics import metric_main
from metrics.metric_main import (
    calc_metric,
    is_valid_metric,
    list_valid_metrics,
    register_metric,
    report_metric,
)
from training.config.values import METRICS

RESULT = {'results': {'m': 1 / 3}, 'metric': 'm', 'total_time': 2.0, 'total_time_str': '2s', 'num_gpus': 1}


class Images:
    """Stands for an unlabelled dataset of 16x16 images, and counts how often they are read."""

    label_dim = 0

    def __init__(self, count=20):
        self.pixels = np.random.RandomState(0).randint(256, size=[count, 3, 16, 16], dtype=np.uint8)
        self.num_read = 0

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.num_read += 1
        return self.pixels[index], np.zeros([0], dtype=np.float32)


@pytest.fixture
def options():
    return {'G': small_generator(), 'dataset': Images(), 'device': torch.device('cpu')}


@pytest.fixture
def registered(monkeypatch):
    """A registry that forgets after the test."""
    monkeypatch.setattr(metric_main, '_METRICS', dict(metric_main._METRICS))


def test_the_command_line_knows_every_metric():
    assert set(list_valid_metrics()) == set(METRICS)


def test_a_registered_function_is_a_metric_of_its_name(registered, options):
    @register_metric
    def answer(metric_options):
        return {'answer_a': torch.tensor(42), 'answer_b': np.float32(metric_options.seed)}
    assert is_valid_metric('answer') and 'answer' in list_valid_metrics()
    result = calc_metric('answer', seed=3, **options)
    assert tuple(result)[:5] == metric_main.PUBLISHED_KEYS
    assert result.seed == 3 and result.device == 'cpu' and result.versions['torch'] == torch.__version__
    assert result.results == {'answer_a': 42.0, 'answer_b': 3.0} and result.metric == 'answer'
    assert json.loads(json.dumps(result.results)) == result.results
    assert result.total_time >= 0 and result.total_time_str == '0s' and result.num_gpus == 1


def test_unknown_metrics_are_refused_with_the_known_ones(options):
    assert not is_valid_metric('fid') and is_valid_metric('swd')
    with pytest.raises(UserError, match=r"unknown metric 'fid'.*swd"):
        calc_metric('fid', **options)


def test_swd_is_repeatable_and_reads_the_dataset_once_for_a_cache(options):
    cache, dataset = {}, options['dataset']
    result = calc_metric('swd', cache=cache, **options)
    first = result.results
    assert len(result.data_key) == 32
    assert list(first) == ['swd', 'swd_16'] and all(math.isfinite(v) and v > 0 for v in first.values())
    assert dataset.num_read == 2 * len(dataset), 'once for the key of its content'
    assert calc_metric('swd', cache=cache, **options).results == first, 'once for the key of its content'
    assert calc_metric('swd', **options).results == first


def test_a_report_is_one_line_in_the_published_order(tmp_path, capsys):
    run_dir = tmp_path / 'run'
    run_dir.mkdir()
    for number in range(2):
        report_metric({**RESULT, 'seed': 4}, run_dir, str(run_dir / f'network-snapshot-{number}.pkl'))
    printed = capsys.readouterr().out.splitlines()
    assert (run_dir / 'metric-m.jsonl').read_text().splitlines() == printed
    first = json.loads(printed[0])
    assert list(first) == [*RESULT, 'snapshot_pkl', 'timestamp', 'seed']
    assert first['results'] == RESULT['results']
    assert first['snapshot_pkl'] == 'network-snapshot-0.pkl' and first['timestamp'] > 1.6e9
    assert json.loads(printed[1])['snapshot_pkl'] == 'network-snapshot-1.pkl'


def test_without_a_run_folder_a_report_is_only_printed(tmp_path, capsys):
    report_metric(RESULT, snapshot_pkl='some/net.pkl')
    report_metric(RESULT, tmp_path / 'nothing', None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line['snapshot_pkl'] for line in lines] == ['some/net.pkl', None] and not list(tmp_path.iterdir())
