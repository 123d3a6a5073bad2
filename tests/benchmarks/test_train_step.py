# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of steps and of the first tick, as programs on tiny networks."""
import contextlib
import json
import multiprocessing
import time

import pytest
import torch
from benchmark_programs import benchmark_module, run_benchmark

from dnnlib.util import UserError
from torch_utils.cuda_graphs import Captures
from training.config import DatasetInfo, resolve

SMALL = ('--device=cpu', '--resolution=8', '--cbase=32', '--cmax=4', '--batch=4')


def test_steps_are_timed_for_each_variant(tmp_path):
    path = tmp_path / 's.json'
    done = run_benchmark('train_step', *SMALL, '--cycles=1', '--precision=fp32,bf16', f'--json={path}')
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())['rows']
    assert [row['variant'] for row in rows] == ['fp32', 'bf16']
    assert all(row['warm_up_sec'] > 0 and row['capture_sec'] == 0 for row in rows)
    assert 0 <= rows[0]['peak_share'] < 1 and rows[1]['peak_share'] is None


def test_the_straightforward_implementation_is_timed_beside_ours(tmp_path):
    path = tmp_path / 's.json'
    done = run_benchmark('train_step', *SMALL, '--cycles=2', '--baseline', f'--json={path}')
    assert done.returncode == 0, done.stderr
    plain, ours = json.loads(path.read_text())['rows']
    assert (plain['variant'], plain['speedup'], ours['variant']) == ('straightforward', 1.0, 'auto')
    for row in (plain, ours):
        shares = [value for key, value in row.items() if key.endswith('_percent')]
        assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.fixture(scope='module')
def train_step():
    with benchmark_module('train_step') as module:
        yield module


@pytest.fixture
def tiny():
    flags = {'outdir': 'unused', 'data': 'random', 'cfg': 'demo', 'cbase': 32, 'cmax': 4, 'batch': 4}
    return resolve(flags, DatasetInfo('random', 100, 8, 8, 3))


def test_only_ours_keeps_freed_memory(train_step, tiny, monkeypatch):
    kept = []
    monkeypatch.setattr(train_step, 'keep_freed_memory', kept.append)
    here, there = multiprocessing.Pipe()
    here.send('cycle')
    here.close()
    with contextlib.suppress(BrokenPipeError):  # nobody takes the answer
        train_step._serve(there, tiny, torch.device('cpu'))
    assert kept == []
    train_step.Trainer(tiny, torch.device('cpu'), plain=False)
    assert kept == [torch.device('cpu')]


def test_the_straightforward_implementation_answers_from_a_process_of_its_own(train_step, tiny):
    plain = train_step.PlainTrainer(tiny, torch.device('cpu'))
    assert plain.cycle() > 0 and plain.phase_ms['Gmain'] > 0
    assert plain.warm_up() > 0 and set(plain.phase_ms.values()) == {0.0}
    plain._process.kill()
    plain._process.join()
    with pytest.raises(UserError, match='the process of the straightforward implementation has ended'):
        plain.cycle()


def test_augmentation_is_timed_at_work_and_phases_by_the_sum_of_their_runs(train_step):
    config = resolve({'outdir': 'unused', 'data': 'random', 'cfg': 'demo', 'cbase': 32, 'cmax': 4, 'batch': 4,
                      'aug': 'ada'}, DatasetInfo('random', 100, 8, 8, 3))
    trainer = train_step.Trainer(config, torch.device('cpu'), plain=False)
    assert trainer.state.augment_p == train_step.AUGMENT_P
    clock = train_step.CycleClock(torch.device('cpu'))
    for _ in range(3):
        with clock.measure('Gmain'):
            time.sleep(0.002)
    assert clock.milliseconds()['Gmain'] >= 6 and clock.milliseconds() == {}


def test_a_warm_up_with_graphs_lasts_until_none_has_been_captured_for_a_while(train_step, tiny, monkeypatch):
    trainer, runs = train_step.Trainer(tiny, torch.device('cpu'), plain=False), []

    def iterate():
        runs.append(len(runs))
        trainer.captures.seconds += len(runs) in (3, 7)
    monkeypatch.setattr(trainer, 'iterate', iterate)
    trainer.captures = Captures(None, print)
    trainer.warm_up()
    assert len(runs) == 7 + train_step.QUIET


def test_variants_are_named_by_words_and_the_first_is_profiled(tmp_path):
    path, profile = tmp_path / 's.json', tmp_path / 'p.json'
    done = run_benchmark('train_step', *SMALL, '--cycles=1', '--variants=fp32+nchw,fp32+ieee',
                         f'--json={path}', f'--profile={profile}')
    assert done.returncode == 0, done.stderr
    assert [row['variant'] for row in json.loads(path.read_text())['rows']] == ['fp32+nchw', 'fp32+ieee']
    found = json.loads(profile.read_text())
    times = [us for us, _, _ in found['kernels']]
    assert found['variant'] == 'fp32+nchw' and times == sorted(times, reverse=True)
    assert any('convolution' in name and calls >= 1 for _, calls, name in found['kernels'])
    assert 0 < found['kernel_us'] <= found['wall_us']


def test_an_unknown_variant_is_refused():
    done = run_benchmark('train_step', *SMALL, '--variants=fp64')
    assert done.returncode == 2 and "'fp64' is none of fp16" in done.stderr


def test_graphs_without_a_gpu_are_one_line():
    done = run_benchmark('train_step', *SMALL, '--graphs')
    assert done.returncode == 2 and '--cuda-graphs=on' in done.stderr and 'Traceback' not in done.stderr


def test_a_run_that_ends_before_its_first_tick_is_told_by_its_last_line():
    done = run_benchmark(
        'first_tick', '--device=cpu', '--resolution=8', '--cfg=demo', '--', '--batch=3', '--batch-gpu=2')
    assert done.returncode == 2 and 'before its first tick: Error: --batch=3' in done.stderr
