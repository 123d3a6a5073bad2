# SPDX-License-Identifier: Apache-2.0
"""style_mixing.py: recorded tables, conditional and small networks, and the errors that a user can make."""
import numpy as np
import PIL.Image
import pytest
import torch
from golden_cases import arrays, cases, golden_dir
from small_networks import save_small_network

import generate
import style_mixing
from training.sampling import mixing


def run(*args, tool=style_mixing):
    """Run the command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(a) for a in args])
    return exit_info.value.code or 0


def read(path):
    with PIL.Image.open(path) as image:
        return image.mode, np.asarray(image)


@pytest.fixture
def network(tmp_path):
    """Function: path of a snapshot of a small generator with these arguments."""
    return lambda **changes: save_small_network(tmp_path / 'net.pkl', **changes)


def is_mixing(case):
    return case['tool'] == 'style_mixing'


@pytest.mark.parametrize('case', cases('cli_generate', where=is_mixing))
def test_recorded_table(case, tmp_path, capsys):
    network_path = golden_dir() / 'official_pickle' / case['network']
    if not network_path.is_file():
        pytest.skip(f'{network_path} is not in this folder of cases')
    status = run('--network', network_path, '--outdir', tmp_path, '--device=cpu', *case['args'])
    if status != 0:
        assert status == 2 and 'Error' in capsys.readouterr().err
        assert case['exit_code'] != 0 or 'quirk' in case
        return
    if {'quirk', 'exception'} & set(case):  # a weakness of the published tool, which need not be repeated
        assert {p.name for p in tmp_path.iterdir()} >= {'grid.png', *case.get('desired_files', [])}
        return
    assert case['exit_code'] == 0 and sorted(p.name for p in tmp_path.iterdir()) == sorted(case['files'])
    for name, expected in case['files'].items():
        mode, pixels = read(tmp_path / name)
        recorded = arrays('cli_generate.npz')[f'{case["name"]}/{name}']
        assert mode == expected['mode'] and pixels.shape == recorded.shape
        difference = np.abs(pixels.astype(int) - recorded.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


def test_a_table_of_a_conditional_rgba_network_that_is_not_square(network, tmp_path):
    out = tmp_path / 'out'
    path = network(c_dim=3, img_channels=4, img_resolution=(16, 24))
    options = ['--rows=5-6', '--cols=6,7,6', '--class=1', '--device=cpu']
    assert run('--network', path, '--outdir', out, *options) == 0
    names = {'5-5', '6-6', '7-7', '5-6', '5-7', '6-7', 'grid'}
    assert {file.stem for file in out.iterdir()} == names
    mode, sheet = read(out / 'grid.png')
    assert mode == 'RGBA' and sheet.shape == (3 * 16, 4 * 24, 4)
    assert not sheet[:16, :24].any()
    cells = {(row, column): sheet[16 * row:16 * row + 16, 24 * column:24 * column + 24]
             for row in range(3) for column in range(4)}
    for place, name in {(0, 1): '6-6', (0, 2): '7-7', (0, 3): '6-6', (1, 0): '5-5', (2, 0): '6-6',
                        (1, 1): '5-6', (1, 3): '5-6', (2, 1): '6-6', (2, 2): '6-7'}.items():
        assert np.array_equal(cells[place], read(out / f'{name}.png')[1])


@pytest.mark.parametrize('num_ws, expected, words', [
    (1, [0], '0-0 of 1'), (4, [0, 1], '0-1 of 4'), (6, [0, 1, 2], '0-2 of 6'), (7, [0, 1, 2], '0-2 of 7'),
    (8, list(range(7)), '0-6 of 8 (--styles); the coarse half is --styles=0-3'),
    (14, list(range(7)), '0-6 of 14'), (18, list(range(7)), '0-6 of 18')])
def test_the_default_styles_are_the_published_ones_unless_they_are_all_of_a_network(
        capsys, num_ws, expected, words):
    assert mixing.checked_styles(None, num_ws) == expected
    assert capsys.readouterr().err.strip().removeprefix('Note: columns give ws ').removesuffix(
        ' (--styles)') == words


def test_a_mixture_of_a_small_network_is_neither_its_row_nor_its_column(network, tmp_path, capsys):
    path = network()  # 16x16: num_ws is 6, fewer than the published default
    assert run('--network', path, '--outdir', tmp_path, '--rows=1', '--cols=2', '--device=cpu') == 0
    pixels = {name: read(tmp_path / f'{name}.png')[1] for name in ('1-1', '1-2', '2-2')}
    assert not np.array_equal(pixels['1-2'], pixels['2-2'])
    assert not np.array_equal(pixels['1-2'], pixels['1-1'])
    assert 'ws 0-2 of 6' in capsys.readouterr().err


@pytest.mark.parametrize('noise', ['const', 'random'])
def test_a_seed_looks_as_generate_makes_it_whatever_the_batch(network, tmp_path, noise):
    options = ['--network', network(), '--trunc=0.7', f'--noise-mode={noise}', '--device=cpu']
    assert run('--outdir', tmp_path / 'mix', '--rows=4', '--cols=8', '--batch=3', *options) == 0
    assert run('--outdir', tmp_path / 'gen', '--seeds=4,8', *options, tool=generate) == 0
    for seed in (4, 8):
        ours = read(tmp_path / 'mix' / f'{seed}-{seed}.png')[1].astype(int)
        assert np.abs(ours - read(tmp_path / 'gen' / f'seed{seed:04d}.png')[1]).max() <= 1


def test_mix_takes_the_named_ws_of_the_column():
    row, column = torch.zeros(4, 2), torch.ones(4, 2)
    assert mixing.mix(row, column, [0, 2])[:, 0].tolist() == [1, 0, 1, 0]
    assert not row.any()
    assert not mixing.mix(row, column, []).any()


@pytest.mark.parametrize('options, hint', [
    (['--rows=1', '--cols=2', '--styles=0-6'], '0 to 5'), (['--rows=3-1', '--cols=2'], '--rows'),
    (['--rows=1'], '--cols'), (['--rows=1', '--cols=a'], 'neither a range'), (['--cols=1'], '--rows'),
    (['--rows=0-4000000000', '--cols=1'], '100000'),
    (['--rows=1', '--cols=1', '--styles=x'], 'neither a range')])
def test_a_wrong_option_is_one_clean_message(network, tmp_path, capsys, options, hint):
    assert run('--network', network(), '--outdir', tmp_path / 'out', '--device=cpu', *options) == 2
    message = capsys.readouterr().err
    assert hint in message and 'Traceback' not in message
    assert not (tmp_path / 'out').exists()


def test_a_table_is_not_written_as_a_dataset(network, tmp_path, capsys):
    options = ['--outdir', tmp_path / 'out.zip', '--rows=1', '--cols=2', '--device=cpu']
    assert run('--network', network(), *options) == 2
    assert 'out.zip: must be a folder' in capsys.readouterr().err and not (tmp_path / 'out.zip').exists()


def test_a_class_is_ignored_with_a_warning_where_there_are_none(network, tmp_path, capsys):
    assert run('--network', network(), '--outdir', tmp_path, '--rows=1', '--cols=2', '--class=1',
               '--device=cpu') == 0
    assert 'Warning: --class=1' in capsys.readouterr().err
