# SPDX-License-Identifier: Apache-2.0
"""The GPU check, with small programs in place of tests and benchmarks: limits, failures, table, results."""
import json
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from click.testing import CliRunner

from scripts import gpu_check
from scripts.gpu_check import ROOT, STAGES, TOTAL_SEC, Step, main, rehearsed, run_step, summary
from torch_utils import doctor
from torch_utils.ops._registry import OPS

GPU = {'gpu': 'a GPU', 'torch': '1', 'cuda': '1', 'driver': '1', 'commit': '1'}


def python(name, source, limit_sec=20):
    return Step(name, limit_sec, ('-c', source))


def run_all(steps, out, **options):
    return gpu_check.run_all(steps, out, GPU, **options)


@pytest.mark.parametrize('stage', STAGES)
def test_all_steps_fit_into_the_time_and_their_programs_exist(stage):
    steps = STAGES[stage]
    assert sum(step.limit_sec for step in steps) <= TOTAL_SEC < 600
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert step.command[0] == '-m' or (ROOT / step.command[0]).is_file()


@pytest.mark.parametrize('stage', STAGES)
def test_a_rehearsal_has_no_step_that_needs_a_gpu(stage):
    for step in map(rehearsed, STAGES[stage]):
        text = ' '.join(step.command)
        assert not re.search(r'=cuda|graphs|ada\b|=(256|512|1024)\b|fp16', text), text


@pytest.mark.slow
def test_the_first_stage_is_rehearsed_on_a_cpu(tmp_path):
    # Tests marked gpu skip; the benchmarks run on tiny networks.
    command = [sys.executable, 'scripts/gpu_check.py', '--rehearse', f'--out={tmp_path}',
               '--only=ceilings,doctor,train-auto-256,ops,profile-256']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {row['step']: row for row in json.loads((tmp_path / 'results.json').read_text())['steps']}
    assert {row['result'] for row in steps.values()} == {'ok'}
    measured = steps['train-auto-256']['measured']
    assert set(measured) == {'train-auto-256.json', 'train-auto-256-profile.json'}
    assert 's/kimg' in steps['train-auto-256']['summary']


def test_what_was_measured_outlives_the_program(tmp_path):
    # The second step kills the program itself, as a machine that is taken back would.
    kill = 'import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(9)'
    source = (f'from scripts import gpu_check as g; from pathlib import Path; '
              f'g.run_all([g.Step("one", 9, ("-c", "print(1)")), g.Step("two", 9, ("-c", {kill!r}))], '
              f'Path({str(tmp_path)!r}), {{}})')
    done = subprocess.run([sys.executable, '-c', source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    rows = json.loads((tmp_path / 'results.json').read_text())['steps']
    assert [(row['step'], row['log_tail']) for row in rows] == [('one', '1\n')]
    with tarfile.open(tmp_path / 'logs.tar') as archive:
        assert archive.getnames() == ['one.log']


def test_failures_of_tests_are_streamed(tmp_path):
    path = tmp_path / 'failures.jsonl'
    (tmp_path / 'conftest.py').write_text((ROOT / 'tests/conftest.py').read_text())
    (tmp_path / 'test_it.py').write_text('def test_good(): pass\ndef test_bad(): assert 1 == 2\n')
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n', '2', '-c', '/dev/null', f'--rootdir={tmp_path}',
         f'--failures={path}', str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    (line,) = path.read_text().splitlines()
    failure = json.loads(line)
    assert failure['test'].endswith('test_bad') and any('assert 1 == 2' in end for end in failure['end'])


def test_a_failure_does_not_stop_the_rest(tmp_path):
    bad = python('bad', 'print("why"); raise SystemExit(3)')
    rows = run_all([bad, python('good', 'print("fine")')], tmp_path)
    assert [(row['step'], row['result'], row['summary']) for row in rows] == [
        ('bad', 'failed (3)', 'why'), ('good', 'ok', 'fine')]


def test_a_step_ends_at_its_limit_with_its_children(tmp_path):
    mark = tmp_path / 'mark'
    child = f'import time; time.sleep(2); open({str(mark)!r}, "w")'
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'
    start = time.monotonic()
    row = run_step(python('slow', parent), tmp_path, 0.5)
    assert row['result'] == 'out of time' and time.monotonic() - start < 1.9
    time.sleep(max(0, 2.4 - (time.monotonic() - start)))
    assert not mark.exists()


def test_steps_share_the_total_time(tmp_path):
    steps = [python('first', 'import time; time.sleep(5)'), python('second', 'pass')]
    rows = run_all(steps, tmp_path, total_sec=0.3)
    assert [row['result'] for row in rows] == ['out of time', 'out of time']


def test_a_benchmark_is_summed_up_by_its_numbers(tmp_path):
    rows = [{'variant': 'fp16', 'img_per_sec': 12.34, 'sec_per_kimg': 81.0},
            {'variant': 'batch 1', 'img_per_sec': 5}]
    (tmp_path / 'b.json').write_text(json.dumps({'rows': rows}))
    assert summary('b', tmp_path) == 'fp16: 12.3 img/s, 81.00 s/kimg; batch 1: 5.0 img/s'


def test_captures_and_first_ticks_are_summed_up(tmp_path):
    rows = [{'variant': 'fp16', 'img_per_sec': 50.0, 'sec_per_kimg': 20.0, 'capture_sec': 0.0},
            {'variant': 'fp16 graphs', 'img_per_sec': 100.0, 'sec_per_kimg': 10.0, 'capture_sec': 1.26}]
    (tmp_path / 'b.json').write_text(json.dumps({'rows': rows}))
    assert summary('b', tmp_path) == (
        'fp16: 50.0 img/s, 20.00 s/kimg; fp16 graphs: 100.0 img/s, 10.00 s/kimg, captured in 1.3 s')
    rows = [{'cache': 'empty', 'first_tick_sec': 21.04}, {'cache': 'full', 'first_tick_sec': 12.0}]
    (tmp_path / 'f.json').write_text(json.dumps({'rows': rows}))
    assert summary('f', tmp_path) == (
        'first tick after 21.0 s with the cache empty, 12.0 s with the cache full')


def test_operators_are_summed_up_by_their_share_of_a_copy(tmp_path):
    rows = [{'case': 'a', 'by': 'kernel', 'us': 9, 'copy_percent': 90.0, 'speedup': 4.0},
            {'case': 'b', 'by': 'kernel', 'us': 9, 'copy_percent': 70.0, 'speedup': 2.0},
            {'case': 'c', 'by': 'reference', 'us': 9, 'copy_percent': 5.0, 'speedup': 1.0},
            {'case': 'first call: k', 'us': 250000.0}]
    (tmp_path / 'o.json').write_text(json.dumps({'rows': rows}))
    assert summary('o', tmp_path) == (
        '2 of 3 cases by kernels: 80 % of the speed of a copy (least: 70 %, b), 3.0 x the references; '
        '1 compiled in 0.25 s')
    (tmp_path / 'o.json').write_text(json.dumps({'rows': rows[:3]}))
    assert summary('o', tmp_path).endswith('the references')
    (tmp_path / 'o.json').write_text(json.dumps({'rows': rows[2:3]}))
    assert summary('o', tmp_path) == 'none of 1 cases by kernels'


def test_snapshots_are_summed_up_without_the_first(tmp_path):
    rows = [{'stall_sec': stall, 'write_sec': 2.0, 'MiB': 700.4} for stall in (9, 0.1, 0.1)]
    (tmp_path / 's.json').write_text(json.dumps({'rows': rows}))
    assert summary('s', tmp_path) == 'stands still for 0.100 s of 2.00 s, 700 MiB'
    (tmp_path / 's.json').write_text(json.dumps({'rows': rows[:1]}))
    (tmp_path / 's.log').write_text('cut short')
    assert summary('s', tmp_path) == 'cut short'


def test_the_doctor_is_summed_up_by_what_the_operators_run_by(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, 'machine_problems', lambda: iter(['the cache is full', 'and more']))
    done = CliRunner().invoke(doctor.command)
    (tmp_path / 'd.log').write_text(done.output)
    assert done.exit_code == 1, done.output
    device = doctor.best_device()
    if device.type == 'cpu':
        plain = sum(op.native is None for op in OPS.values())
        counts = {'the device is cpu': len(OPS) - plain, 'has no kernel': plain}
        assert summary('d', tmp_path) == ', '.join(
            f'{count} operators by PyTorch ({why})' for why, count in counts.items() if count
            ) + '; the cache is full'
    (tmp_path / 'd.log').write_text(
        'operator  error  us  on cuda: implementation\na  1e-7  10.0  CUDA kernel\n'
        'bc  failed  0.0  failed\nd  1e-7  2.5  CUDA kernel\n\nNothing is wrong.\n')
    assert summary('d', tmp_path) == '2 operators by CUDA kernel, 1 operators by failed'


@pytest.mark.parametrize(('log', 'text'), [
    ('...\n== 3 failed, 20 passed, 1 skipped in 9.99s ==\nrest\n', '3 failed, 20 passed, 1 skipped in 9.99s'),
    ('20 passed in 1.00s\n', '20 passed in 1.00s'), ('No module named pytest\n\n', 'No module named pytest'),
    ('', '')])
def test_a_log_is_summed_up_by_its_counts_or_last_line(tmp_path, log, text):
    (tmp_path / 't.log').write_text(log)
    assert summary('t', tmp_path) == text


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, 'environment', lambda: GPU | {'gpu': None})
    assert main([f'--out={tmp_path / "out"}']) == 2
    assert 'no CUDA device' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_a_python_without_torch_counts_as_no_gpu(monkeypatch):
    monkeypatch.setattr(sys, 'executable', 'no-such-python')
    assert gpu_check.environment()['gpu'] is None


@pytest.mark.parametrize(('source', 'status'), [('print("done")', 0), ('raise SystemExit(1)', 1)])
def test_results_are_written_and_the_table_comes_last(tmp_path, monkeypatch, capsys, source, status):
    monkeypatch.setattr(gpu_check, 'environment', lambda: GPU)
    steps = python('one', source), python('two', 'print("end")')
    monkeypatch.setattr(gpu_check, 'STAGES', {'first': steps})
    assert main([f'--out={tmp_path / "out"}']) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ['step', 'result', 'seconds', 'summary'] and lines[-1].startswith('two')
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['environment']['gpu'] == 'a GPU' and len(results['steps']) == 2
    assert (tmp_path / 'out' / 'two.log').read_text() == 'end\n'


def test_one_step_can_be_chosen_and_an_unknown_one_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, 'environment', lambda: GPU)
    monkeypatch.setattr(gpu_check, 'STAGES', {'first': (python('one', 'pass'), python('two', 'pass'))})
    assert main([f'--out={tmp_path}', '--only=two']) == 0 and not (tmp_path / 'one.log').exists()
    with pytest.raises(SystemExit) as caught:
        main(['--only=three'])
    assert caught.value.code == 2 and 'one, two' in capsys.readouterr().err
