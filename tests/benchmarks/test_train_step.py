# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of steps and of the first tick, as programs on tiny networks."""
import json
import subprocess
import sys

from golden_cases import ROOT


def benchmark(name, *args):
    command = [sys.executable, f'benchmarks/{name}.py', '--device=cpu', *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_steps_are_timed_for_each_variant(tmp_path):
    path = tmp_path / 's.json'
    done = benchmark('train_step', '--resolution=8', '--cbase=32', '--cmax=4', '--batch=4', '--cycles=1',
                     '--precision=fp32,bf16', f'--json={path}')
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())['rows']
    assert [row['variant'] for row in rows] == ['fp32', 'bf16']
    assert all(row['first_cycle_sec'] > 0 and row['capture_sec'] == 0 for row in rows)


def test_graphs_without_a_gpu_are_one_line():
    done = benchmark('train_step', '--resolution=8', '--cbase=32', '--cmax=4', '--graphs')
    assert done.returncode == 2 and '--cuda-graphs=on' in done.stderr and 'Traceback' not in done.stderr


def test_a_run_that_ends_before_its_first_tick_is_told_by_its_last_line():
    done = benchmark('first_tick', '--resolution=8', '--cfg=demo', '--', '--batch=3', '--batch-gpu=2')
    assert done.returncode == 2 and 'before its first tick: Error: --batch=3' in done.stderr
