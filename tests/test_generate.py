# SPDX-License-Identifier: Apache-2.0
"""generate.py: recorded images, any kind of network, and every error that a user can make."""
import numpy as np
import PIL.Image
import pytest
import torch
from golden_cases import arrays, cases, golden_dir
from small_networks import save_small_network, small_generator

import generate
import legacy
from training.formats import pickled
from training.sampling import output, sampler


def run(*args):
    """Run the command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as exit_info:
        generate.main([str(a) for a in args])
    return exit_info.value.code or 0


def read(path):
    with PIL.Image.open(path) as image:
        return image.mode, np.asarray(image)


# Refused by the published program: a conditional network without --class, and StyleGAN3's seeds.
ALLOWED = ('gen_cond_missing', 'gen_mixed_seed_forms')


def is_generate(case):
    return case['tool'] == 'generate'


def test_a_cpu_keeps_the_memory_of_its_tensors(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sampler, 'keep_freed_memory', asked.append)
    network = save_small_network(tmp_path / 'net.pkl')
    assert run('--network', network, '--outdir', tmp_path / 'out', '--device=cpu', '--seeds=0') == 0
    assert asked == [torch.device('cpu')]


@pytest.mark.parametrize('case', cases('cli_generate', where=is_generate))
def test_recorded_run(case, tmp_path, capsys):
    out, projected = tmp_path / 'out', tmp_path / 'in'
    if 'input' in case:
        projected.mkdir()
        np.savez(projected / 'pw.npz', w=arrays('cli_generate.npz')[case['input']])
    args = [a.replace('{out}', str(projected)) for a in case['args']]
    network_path = golden_dir() / 'official_pickle' / case['network']
    if not network_path.is_file():
        pytest.skip(f'{network_path} is not in this folder of cases')
    status = run('--network', network_path, '--outdir', out, '--device=cpu', *args)
    if status != 0:
        assert status == 2 and 'Error' in capsys.readouterr().err
        assert case['exit_code'] != 0 or 'quirk' in case
        return
    if {'quirk', 'exception'} & set(case):  # a weakness of the published tool, which need not be repeated
        assert {path.name for path in out.iterdir()} >= set(case.get('desired_files', []))
        return
    if case['name'] in ALLOWED:
        assert case['exit_code'] == 2 and list(out.iterdir())
        return
    assert case['exit_code'] == 0
    check_files(out, case)
    if any('warning' in sign for sign in case['signs']):
        assert 'Warning' in capsys.readouterr().err


def check_files(out, case):
    """The files of a recorded run: names, modes, and at most one value of a hundred off by one."""
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(case['files'])
    for name, expected in case['files'].items():
        mode, pixels = read(out / name)
        recorded = arrays('cli_generate.npz')[f'{case["name"]}/{name}']
        assert mode == expected['mode'] and pixels.shape == recorded.shape
        difference = np.abs(pixels.astype(int) - recorded.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


@pytest.fixture
def network(tmp_path):
    """Function: path of a snapshot of a small generator with these arguments."""
    return lambda **changes: save_small_network(tmp_path / 'net.pkl', **changes)


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA')])
def test_channels_decide_the_mode_and_shapes_are_kept(network, tmp_path, channels, mode):
    path, out = network(img_channels=channels, img_resolution=(16, 24)), tmp_path / 'a' / 'b'
    assert run('--network', path, '--outdir', out, '--seeds=1-5', '--grid', '--device=cpu') == 0
    found_mode, pixels = read(out / 'seed0001.png')
    assert found_mode == mode and pixels.shape[:2] == (16, 24)
    found_mode, sheet = read(out / 'grid.png')
    assert found_mode == mode and sheet.shape[:2] == (48, 48)
    assert np.array_equal(sheet[:16, :24], pixels)


def test_pixels_are_those_of_the_python_api(network, tmp_path):
    path = network()
    assert run('--network', path, '--outdir', tmp_path, '--seeds=3', '--trunc=0.5', '--device=cpu') == 0
    z = torch.from_numpy(np.random.RandomState(3).randn(1, 8))
    with torch.no_grad():
        image = legacy.load_network(path).G_ema(z, None, truncation_psi=0.5, noise_mode='const')
    expected = ((image[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(read(tmp_path / 'seed0003.png')[1] - expected).max() <= 1


@pytest.mark.parametrize('noise', ['const', 'random', 'none'])
def test_the_image_of_a_seed_does_not_depend_on_its_company(network, tmp_path, noise):
    options = ['--network', network(), f'--noise-mode={noise}', '--device=cpu']
    assert run('--outdir', tmp_path / 'alone', '--seeds=7', *options) == 0
    assert run('--outdir', tmp_path / 'batch', '--seeds=2,9,7,4', '--batch=3', *options) == 0
    alone, company = (read(tmp_path / name / 'seed0007.png')[1].astype(int) for name in ('alone', 'batch'))
    assert np.abs(alone - company).max() <= 1 and (alone != company).mean() <= 0.01


def test_random_noise_differs_from_saved_noise(network, tmp_path):
    path = network()
    for noise in ('const', 'random'):
        options = [f'--noise-mode={noise}', '--seeds=7', '--device=cpu']
        assert run('--network', path, '--outdir', tmp_path / noise, *options) == 0
    const, drawn = (read(tmp_path / name / 'seed0007.png')[1] for name in ('const', 'random'))
    assert not np.array_equal(const, drawn)


def test_projected_w_is_rendered_in_batches_with_either_spelling(network, tmp_path):
    path, file = network(c_dim=3), tmp_path / 'w.npz'
    num_ws = legacy.load_network(path).G_ema.num_ws
    np.savez(file, w=np.random.RandomState(0).randn(3, num_ws, 8))
    for name, option in (('a', '--projected-w'), ('b', '--projected_w')):
        out = tmp_path / name
        assert run('--network', path, '--outdir', out, option, file, '--batch=2', '--device=cpu') == 0
        assert sorted(p.name for p in out.iterdir()) == ['proj00.png', 'proj01.png', 'proj02.png']


@pytest.mark.parametrize('options, hint', [
    (['--seeds=0', '--class=3'], '0 to 2'), (['--seeds=0', '--class=-1'], '0 to 2'),
    (['--seeds=0', '--class=red'], 'no names'), (['--seeds=0', '--label=1,0'], 'numbers'),
    (['--seeds=0', '--label=1,0,nan'], 'finite'), (['--seeds=0', '--label=1,0,1e39'], 'finite'),
    (['--seeds=0', '--class=' + '9' * 5000], 'no names'),
    (['--seeds=' + '9' * 5000], '4294967295'),
    (['--seeds=0', '--class=1', '--label=0,0,1'], 'exclude'),
    (['--seeds=4294967296'], '4294967295'), (['--seeds=-3'], 'neither a range'),
    (['--seeds='], 'neither a range'), (['--seeds=1,,2'], 'neither a range'),
    (['--seeds=1', '--class=1', '--trunc=nan'], '--trunc'),
    (['--seeds=1', '--class=1', '--batch=0'], '--batch'), (['--seeds=1', '--noise-mode=loud'], 'loud'),
    (['--projected-w=absent.npz'], 'absent.npz'), ([], '--seeds')])
def test_a_wrong_option_is_one_clean_message(network, tmp_path, capsys, options, hint):
    assert run('--network', network(c_dim=3), '--outdir', tmp_path / 'out', '--device=cpu', *options) == 2
    message = capsys.readouterr().err
    assert hint in message and 'Traceback' not in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('contents', [
    {'v': np.zeros(3)}, {'w': np.zeros([1, 2, 8])}, {'w': np.zeros(8)}, {'w': np.array(['a'])},
    {'w': np.array([None])}, {'w': np.full([1, 6, 8], np.nan)}, {'w': np.zeros([0, 6, 8])},
    b'not an npz', b'PK\x03\x04 broken', b''])
def test_a_wrong_projection_file_is_one_clean_message(network, tmp_path, capsys, contents):
    file = tmp_path / 'w.npz'
    if isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        np.savez(file, **contents)
    options = ['--outdir', tmp_path / 'out', '--projected-w', file, '--device=cpu']
    assert run('--network', network(), *options) == 2
    message = capsys.readouterr().err
    # NumPy would recommend an argument of its own.
    assert 'w.npz' in message and 'allow_pickle' not in message and message.count('\n') == 1


def test_options_without_effect_on_projections_are_announced(network, tmp_path, capsys):
    np.savez(tmp_path / 'w.npz', w=np.zeros([1, 6, 8]))
    assert run('--network', network(c_dim=3), '--outdir', tmp_path, '--projected-w', tmp_path / 'w.npz',
               '--class=1', '--seeds=1', '--device=cpu') == 0
    message = capsys.readouterr().err
    assert '--class is ignored' in message and '--seeds is ignored' in message and 'empty' not in message


def test_an_empty_path_is_named(tmp_path, capsys):
    assert run('--network=', '--outdir', tmp_path / 'out', '--seeds=0') == 2
    assert 'is empty' in capsys.readouterr().err


def test_files_that_are_no_networks_are_one_clean_message(tmp_path, capsys):
    (tmp_path / 'text.pkl').write_text('hello')
    for name in ('absent.pkl', 'text.pkl', '.'):
        assert run('--network', tmp_path / name, '--outdir', tmp_path / 'out', '--seeds=0') == 2
        assert capsys.readouterr().err.count('\n') == 1


def test_an_output_folder_that_cannot_be_made_is_one_clean_message(network, tmp_path, capsys):
    (tmp_path / 'file').write_text('in the way')
    path = network()
    for out in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        assert run('--network', path, '--outdir', out, '--seeds=0', '--device=cpu') == 2
        assert '--outdir' in capsys.readouterr().err


def test_images_that_no_png_can_hold_are_refused(network, tmp_path, capsys):
    assert run('--network', network(img_channels=5), '--outdir', tmp_path, '--seeds=0', '--device=cpu') == 2
    assert '5 channels' in capsys.readouterr().err


def test_truncation_needs_an_average_w(network, tmp_path, capsys):
    path = network(mapping_kwargs={'w_avg_beta': None})
    assert run('--network', path, '--outdir', tmp_path, '--seeds=0', '--device=cpu') == 0
    assert run('--network', path, '--outdir', tmp_path, '--seeds=0', '--trunc=0.5', '--device=cpu') == 2
    assert '--trunc=1' in capsys.readouterr().err


def test_a_snapshot_without_an_averaged_generator_is_refused(tmp_path, capsys):
    path = pickled.save_network_snapshot(tmp_path / 'net.pkl', G=small_generator(), D=None, G_ema=None)
    assert run('--network', path, '--outdir', tmp_path / 'out', '--seeds=0', '--device=cpu') == 2
    assert 'G_ema' in capsys.readouterr().err


def test_hostile_networks_are_named_and_do_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil.pkl').write_bytes(b"cos\nsystem\n(S'touch EXECUTED'\ntR.")
    assert run('--network=evil.pkl', '--outdir=out', '--seeds=0') == 2
    assert 'os.system' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['evil.pkl']


@pytest.mark.parametrize('count, shape, columns', [
    (1, (3, 8, 8), 1), (4, (3, 8, 8), 2), (10, (3, 8, 8), 3), (4, (3, 64, 8), 4), (3, (1, 8, 64), 1)])
def test_the_sheet_is_about_square(count, shape, columns):
    assert output.sheet_columns(count, shape) == columns
