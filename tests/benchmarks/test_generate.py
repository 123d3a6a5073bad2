# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generating images, as a program."""
import json

import torch
from benchmark_programs import run_benchmark


def test_it_prints_a_row_for_each_variant_and_writes_them_with_the_environment(tmp_path):
    path = tmp_path / 'new' / 'g.json'
    done = run_benchmark('generate', '--cfg=demo', '--resolution=16', '--device=cpu', '--batch=2',
                         f'--json={path}')
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert written['environment']['torch'] == torch.__version__
    assert [row['variant'] for row in written['rows']] == ['default x2', 'fused x2', 'unfused x2']
    assert all(row['img_per_sec'] > 0 and 0 < row['peak_share'] < 1 for row in written['rows'])
    assert len(done.stdout.splitlines()) == 4


def test_a_preset_that_does_not_exist_is_one_line():
    done = run_benchmark('generate', '--cfg=huge')
    assert done.returncode == 2 and done.stderr.startswith('Error: ') and 'Traceback' not in done.stderr
