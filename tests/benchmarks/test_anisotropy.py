# SPDX-License-Identifier: Apache-2.0
"""The benchmark that measures stripes."""
import json

import pytest
import torch
from benchmark_programs import benchmark_module, run_benchmark
from dataset_cases import encode, make_image, write_zip
from small_networks import small_generator

from training.formats.pickled import save_network_snapshot


def test_stripes_are_told_by_their_direction():
    ramp = torch.arange(8.).expand(2, 3, 8, 8)  # changes from left to right
    with benchmark_module('anisotropy') as module:
        assert module.anisotropy(ramp + 0.5 * ramp.mT) == pytest.approx(4)
        assert module.anisotropy(ramp.mT + 0.5 * ramp) == pytest.approx(0.25)
        noise = torch.randn([64, 3, 16, 16], generator=torch.Generator().manual_seed(0))
        assert module.anisotropy(noise) == pytest.approx(1, abs=0.05)


def test_it_prints_a_row_for_the_data_and_each_snapshot(tmp_path):
    data = write_zip(tmp_path / 'x.zip', {f'{i}.png': encode(make_image(i, 16, 16)) for i in range(3)})
    options = {'training_set_kwargs': {'path': str(data), 'use_labels': False, 'xflip': True}}
    (tmp_path / 'training_options.json').write_text(json.dumps(options))
    for kimg in (4, 8):
        save_network_snapshot(tmp_path / f'network-snapshot-{kimg:06d}.pkl', G=None, D=None,
                              G_ema=small_generator())
    done = run_benchmark('anisotropy', str(tmp_path), '--images=5', f'--json={tmp_path}/out.json')
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [row['kimg'] for row in rows] == ['real images', 4, 8]
    assert rows[1]['anisotropy'] == rows[2]['anisotropy'] > 0


def test_a_folder_without_snapshots_is_one_line(tmp_path):
    done = run_benchmark('anisotropy', str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith('Error: ') and 'Traceback' not in done.stderr
