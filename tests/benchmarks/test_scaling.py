# SPDX-License-Identifier: Apache-2.0
"""The benchmark of several GPUs: its arithmetic, its tables in the docs, and a tiny measurement."""
import json
import re
import shlex

import pytest
from benchmark_programs import benchmark_module
from click.testing import CliRunner
from golden_cases import ROOT
from small_run import SmallRun, small_config

from dnnlib.util import UserError
from torch_utils import distributed

DOCS = ROOT / 'docs' / 'distributed.md'
TABLES = re.findall(r'<!-- (model .*?) -->\n(.*?)<!-- end -->', DOCS.read_text(), re.DOTALL)


@pytest.fixture(scope='module')
def scaling():
    with benchmark_module('scaling') as module:
        yield module


@pytest.fixture
def links(scaling):
    """A million bytes a second without latency, within and between machines."""
    return scaling.Link('inside', 1e6, 0.0), scaling.Link('between', 1e6, 0.0)


@pytest.mark.parametrize(('command', 'text'), TABLES, ids=[command for command, _ in TABLES])
def test_tables_in_the_docs_are_what_the_command_beside_them_prints(scaling, command, text):
    done = CliRunner().invoke(scaling.main, shlex.split(command))
    assert done.exit_code == 0 and done.output == text
    assert f'`python benchmarks/scaling.py {command}`' in DOCS.read_text()


def test_the_docs_have_tables():
    assert len(TABLES) == 2


def test_messages_are_the_buffers_that_a_training_sums(scaling):
    config = small_config()
    run = SmallRun(config)
    sums = {m.name: m for m in scaling.messages(config)}
    for phase in run.phases:
        if phase.name in sums:
            assert sums[phase.name].bytes == 4 * phase.gradients.buffer.numel()
            assert sums[phase.name].per_step == 1 / phase.interval
    # The demo has no path lengths, and so nothing to sum in that phase.
    assert {'Gmain', 'Dmain', 'Dreg'} <= set(sums) and 'Greg' not in sums


@pytest.mark.parametrize(('gpus', 'seconds'), [(1, 0.0), (2, 1.0), (8, 1.75), (16, 2.75)])
def test_a_sum_sends_twice_all_but_one_share_within_and_between_machines(scaling, links, gpus, seconds):
    assert scaling.all_reduce_sec(1e6, gpus, *links) == pytest.approx(seconds)


def test_latency_grows_with_the_logarithm_of_the_machines(scaling):
    inside, between = scaling.Link('inside', 1e9, 0.0), scaling.Link('between', 1e9, 1.0)
    times = [scaling.all_reduce_sec(0, gpus, inside, between) for gpus in (8, 16, 64, 512)]
    assert times == pytest.approx([0, 2, 6, 12])


def test_efficiency_is_the_share_of_a_step_that_is_not_waiting(scaling, links):
    sums = [scaling.Message('all', 10 ** 6, 1.0), scaling.Message('half', 10 ** 6, 0.5)]
    assert scaling.communication_sec(sums, 2, *links) == pytest.approx(1.5)
    assert scaling.efficiency(4.5, sums, 2, *links) == pytest.approx(0.75)
    assert scaling.efficiency(4.5, sums, 1, *links) == 1.0


def test_the_step_can_be_a_measured_one(scaling, tmp_path):
    path = tmp_path / 'm.json'
    path.write_text(json.dumps({'rows': [{'sec_per_kimg': 12.5, 'batch': 32}]}))
    assert scaling.measured_ms(path) == [400.0]
    done = CliRunner().invoke(scaling.main, ['model', '--cfg=demo', '--resolution=32', f'--measured={path}'])
    assert done.exit_code == 0 and done.output.count('| 400 ms |') == len(scaling.BETWEEN)


def test_variants_share_the_batch_and_rows_compare_them_within_a_round(scaling):
    variants = scaling.variants_of([1, 2], True, 'demo', 32, 16)
    assert [(v.name, v.processes, v.config.num_gpus, v.config.batch_size) for v in variants] == [
        ('1', 1, 1, 16), ('2 together', 2, 2, 16), ('2 unconnected', 2, 1, 8)]
    rounds = [[{'seconds': seconds, 'in_sums': 0.5, 'sums': 16} for seconds in each]
              for each in ((4.0, 2.0, 2.5), (8.0, 5.0, 4.0))]
    rows = {row['processes']: row for row in scaling.rows_of(variants, rounds)}
    assert rows['2 together']['speedup'] == pytest.approx((2 + 1.6) / 2)
    assert rows['2 unconnected']['img_per_sec'] == pytest.approx(16 * 16 / 3.25)
    assert rows['2 together']['sums_percent'] == pytest.approx(100 / 7)
    assert rows['1']['efficiency'] == 1.0 and rows['1']['sums_per_step'] == 1.0


def test_numbers_of_processes_must_be_numbers(scaling):
    done = CliRunner().invoke(scaling.main, ['measure', '--gpus=1,two'])
    assert isinstance(done.exception, UserError) and '--gpus=1,two' in str(done.exception)


def test_processes_train_together_and_count_their_sums(scaling, monkeypatch):
    # Started afresh, each process would import PyTorch for seconds.
    monkeypatch.setattr(distributed, 'START_METHOD', 'fork')
    config = scaling.config_of('demo', 8, batch=4, gpus=2, cbase=32, cmax=4)
    with scaling.crews_of([scaling.Variant('2 together', 2, config)]) as (crew,):
        for result in (crew.run(), crew.run()):
            # Of 16 iterations: Gmain, Dmain and the means in each, Dreg in one, and p every fourth.
            assert result['sums'] == 3 * 16 + 1 + 4 and 0 < result['in_sums'] < result['seconds']


def test_processes_that_end_before_their_turn_are_missed(scaling, monkeypatch, capfd):
    monkeypatch.setattr(distributed, 'START_METHOD', 'fork')
    config = scaling.config_of('demo', 8, batch=4, cbase=32, cmax=4)
    monkeypatch.setattr(scaling, 'Trainer', None)
    with scaling.crews_of([scaling.Variant('1', 1, config)]) as (crew,), \
            pytest.raises(UserError, match='the processes of "1" have ended'):
        crew.run()
    assert 'TypeError' in capfd.readouterr().err
