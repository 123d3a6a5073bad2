# SPDX-License-Identifier: Apache-2.0
"""profile_step.py as its users call it."""
import csv
import json
import re

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import profile_step
from training.profiling import job

SMALL = ['--cfg=demo', '--resolution=8', '--cbase=32', '--cmax=4', '--batch=2', '--device=cpu']


def run(*args):
    return CliRunner().invoke(profile_step.command, args, catch_exceptions=False)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Everything that a profile writes, and what it prints."""
    folder = tmp_path_factory.mktemp('profile')
    paths = {name: folder / f'out-{name}.{suffix}' for name, suffix in
             (('text', 'txt'), ('csv', 'csv'), ('json', 'json'), ('trace', 'json'))}
    result = run(*SMALL, '--rows=5', *(f'--{name}={path}' for name, path in paths.items()))
    assert result.exit_code == 0, result.output
    return {**{name: path.read_text() for name, path in paths.items()}, 'printed': result.output,
            'folder': folder}


def test_the_table_is_printed_with_sums(files):
    assert 'One training step: cfg demo, resolution 8x8, batch 2' in files['printed']
    for heading in ('5 slowest', 'By phase', 'By kind', 'By layer', 'By operation', '% of peak'):
        assert heading in files['printed']


def test_the_text_file_has_every_kernel_whatever_is_printed(files):
    count = int(re.search(r'Kernels: (\d+)\n', files['text'])[1])
    assert len(list(csv.DictReader(files['csv'].splitlines()))) == count > 100


def test_the_json_file_says_what_was_measured(files):
    data = json.loads(files['json'])
    assert data['environment']['cfg'] == 'demo' and data['environment']['batch'] == 2
    assert 0 < data['kernel_us'] <= data['step_us'] and data['peak_flop_per_sec']['float'] > 0


def test_the_trace_opens_as_a_time_line_with_the_layers_in_it(files):
    names = {event.get('name', '') for event in json.loads(files['trace'])['traceEvents']}
    assert any('synthesis.b8.conv1' in name for name in names)


def test_nothing_else_is_left_in_the_folder(files):
    assert len(list(files['folder'].iterdir())) == 4


def test_the_timeline_prints_a_line_an_iteration():
    result = run('--timeline', '--steps=2', *SMALL)
    lines = result.output.splitlines()
    assert 'resolution 8x8, batch 2, steps 2, learning rates G 0.006, D 0.006' in lines[0]
    pattern = r'Iter {} \| H2D +[\d.]+ ms \| Kern +[\d.]+ ms \| D2H +[\d.]+ ms \| Tot +[\d.]+ ms'
    for i in range(2):
        assert re.fullmatch(pattern.format(i), lines[2 + i])
    assert lines[4].startswith('Median') and len(lines) == 5


def test_the_timeline_is_of_the_micro_network_unless_told_otherwise():
    result = run('--timeline', '--steps=1', '--batch=2', '--cbase=64', '--device=cpu')
    assert result.output.startswith('Step timer: micro, resolution 16x16, batch 2, steps 1')


def test_the_micro_network_has_16_images_a_step_and_20_steps_by_default(monkeypatch):
    calls = []
    monkeypatch.setattr(job, 'print_timeline', lambda *args: calls.append(args))
    assert run('--timeline', '--device=cpu').exit_code == 0
    (built, name, num_steps), = calls
    assert (built.config.batch_size, built.config.data.size, name, num_steps) == (16, (16, 16), 'micro', 20)


def test_images_of_a_dataset_are_used_where_given(tmp_path):
    for i in range(3):
        PIL.Image.fromarray(np.full([8, 8], i, np.uint8)).save(tmp_path / f'{i}.png')
    args = ['--timeline', '--steps=1', f'--data={tmp_path}', *[a for a in SMALL if 'resolution' not in a]]
    assert 'demo, resolution 8x8' in run(*args).output


@pytest.mark.parametrize('args, words', [
    (['--timeline', '--rows=3'], ['--rows', '--timeline']),
    (['--timeline', '--csv=x.csv'], ['--csv', '--timeline']),
    (['--cfg=demo', '--steps=3'], ['--steps=3', '--timeline']),
    (['--cfg=demo', '--json=/no/such/folder/x.json'], ['--json=/no/such/folder/x.json', 'folder']),
    (['--cfg=micro', '--resolution=32'], ['--resolution=32', 'micro', '16x16']),
    (['--cfg=micro', '--aug=ada'], ['--aug=ada', 'micro']),
    (['--cfg=micro', '--data=x.zip'], ['--data=x.zip', 'micro']),
    (['--cfg=demo', '--data=x.zip', '--resolution=8'], ['--resolution=8', '--data']),
    (['--cfg=demo', '--data=no/such.zip'], ['no/such.zip']),
    (['--cfg=demo', '--batch=0'], ['--batch=0']),
    (['--cfg=demo', '--resolution=13'], ['13']),
])
def test_what_cannot_be_is_refused_in_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as status:
        profile_step.main(['--device=cpu', *args])
    error = capsys.readouterr().err.strip()
    assert status.value.code == 2 and error.startswith('Error: ') and '\n' not in error
    assert all(word in error for word in words), error
