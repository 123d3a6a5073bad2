# SPDX-License-Identifier: Apache-2.0
"""projector.py: the files it writes for every kind of network, and every error that a user can make."""
import json

import imageio.v3 as imageio
import numpy as np
import PIL.Image
import pytest
import torch
from metrics_stand_in import write_detectors
from small_networks import save_small_network

import generate
import legacy
import projector
from dnnlib import util, video
from training.projection.search import replaced_noise

QUICK = ['--device=cpu', '--distance=pixel', '--num-steps=3']


def run(*args, main=projector.main):
    """Run the command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in args])
    return exit_info.value.code or 0


@pytest.fixture
def network(tmp_path):
    """Function: path of a snapshot of a small generator with these arguments."""
    return lambda **changes: save_small_network(tmp_path / 'net.pkl', **changes)


@pytest.fixture
def target(tmp_path):
    """Function: path of an image of noise."""
    def write(name='a.png', mode='RGB', size=(20, 30)):
        path, channels = tmp_path / name, len(mode)
        pixels = np.random.default_rng(0).integers(256, size=[size[1], size[0], channels], dtype=np.uint8)
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(path)
        return path
    return write


def read(path):
    with PIL.Image.open(path) as image:
        return image.mode, np.asarray(image)


def test_the_published_files_are_written(network, tmp_path, capsys):
    path, out, flat = network(), tmp_path / 'a' / 'b', tmp_path / 'flat.png'
    PIL.Image.new('RGB', (20, 30), (200, 80, 40)).save(flat)
    assert run('--network', path, '--target', flat, '--outdir', out, *QUICK) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        'proj.mp4', 'proj.png', 'projected_w.npz', 'projection.json', 'target.png']
    assert [read(out / name)[1].shape for name in ('target.png', 'proj.png')] == [(16, 16, 3)] * 2
    frames = imageio.imread(out / 'proj.mp4')
    assert frames.shape == (3, 256, 512, 3) and imageio.immeta(out / 'proj.mp4')['fps'] == 10
    # Videos have half as many colours as pixels: of a flat image nothing is lost, of others the mean stays.
    halves = frames[-1, :, :240], frames[-1, :, 272:]
    assert np.abs(halves[0].astype(int) - [200, 80, 40]).max() < 9
    assert abs(halves[1].mean() - read(out / 'proj.png')[1][:, 2:].mean()) < 9
    report = json.loads((out / 'projection.json').read_text())
    assert report['targets'] == [json.loads(capsys.readouterr().out)]
    row = report['targets'][0]
    assert row['image'] == 'proj.png' and row['steps'] == 3 and row['psnr'] > 3 and row['distance'] > 0
    assert report['distance'] == 'pixel' and report['seed'] == 303 and report['space'] == 'w'


def test_the_image_is_that_of_the_w_with_its_noise(network, target, tmp_path):
    path, out = network(), tmp_path / 'out'
    options = ['--network', path, '--outdir', out, '--save-video=false', *QUICK]
    assert run('--target', target(), *options) == 0
    G = legacy.load_network(path).G_ema
    with np.load(out / 'projected_w.npz') as arrays:
        w = torch.from_numpy(arrays['w'])
        noise = {name: torch.from_numpy(arrays[name][0]) for name in arrays if name != 'w'}
    with torch.no_grad(), replaced_noise(G.synthesis, noise):
        image = G.synthesis(w, noise_mode='const', force_fp32=True)
    expected = ((image[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    assert w.shape == (1, 6, 8) and len(noise) == 5
    assert np.abs(read(out / 'proj.png')[1] - expected).max() <= 1
    # With the noise kept, generate.py makes the same image.
    assert run('--target', target(), '--noise=keep', *options) == 0
    shown = ['--network', path, '--projected-w', out / 'projected_w.npz', '--outdir', out, '--device=cpu']
    assert run(*shown, main=generate.main) == 0
    assert np.array_equal(read(out / 'proj00.png')[1], read(out / 'proj.png')[1])


@pytest.mark.parametrize('changes, mode', [
    ({'img_channels': 1}, 'L'), ({'img_channels': 2}, 'LA'), ({'img_channels': 4}, 'RGBA'),
    ({'img_resolution': (16, 24)}, 'RGB')])
@pytest.mark.parametrize('distance', ['pixel', 'vgg16'])
def test_channels_and_shapes_of_every_kind(network, target, tmp_path, changes, mode, distance):
    detectors = write_detectors(tmp_path / 'detectors')
    options = ['--outdir', tmp_path / 'out', *QUICK, f'--distance={distance}', '--detector-dir', detectors]
    targets = ['--target', target('a.png', 'RGB'), '--target', target('b.png', 'RGBA')]
    assert run('--network', network(**changes), *targets, *options, '--space=w+') == 0
    size = changes.get('img_resolution', (16, 16))
    for name in ('target00.png', 'proj00.png', 'target01.png', 'proj01.png'):
        found_mode, pixels = read(tmp_path / 'out' / name)
        assert found_mode == mode and pixels.shape[:2] == size
    frames = imageio.imread(tmp_path / 'out' / 'proj01.mp4')
    scale = 256 // max(size)  # small networks are enlarged
    assert frames.shape == (3, scale * size[0], scale * 2 * size[1], 3)


def test_several_targets_in_batches_share_files(network, target, tmp_path):
    for name in ('c/1.png', 'c/2.png', 'c/3.png'):
        target(name)
    options = ['--network', network(), '--target', tmp_path / 'c', '--save-video=false', *QUICK]
    assert run(*options, '--batch=2', '--outdir', tmp_path / 'two') == 0
    assert run(*options, '--batch=1', '--outdir', tmp_path / 'one', '--init-w',
               tmp_path / 'two' / 'projected_w.npz') == 0
    with np.load(tmp_path / 'two' / 'projected_w.npz') as arrays:
        assert arrays['w'].shape == (3, 6, 8)
    rows = json.loads((tmp_path / 'two' / 'projection.json').read_text())['targets']
    assert [row['target'].split('/')[-1] for row in rows] == ['1.png', '2.png', '3.png']


def test_conditional_networks_take_a_class(network, target, tmp_path, capsys):
    options = ['--network', network(c_dim=3), '--target', target(), '--save-video=false', *QUICK]
    ws = []
    for index in (0, 2):
        assert run(*options, f'--class={index}', '--outdir', tmp_path / 'out') == 0
        with np.load(tmp_path / 'out' / 'projected_w.npz') as arrays:
            ws.append(arrays['w'])
    assert not np.array_equal(*ws)
    for wrong in (['--class=3'], ['--class=-1'], []):
        assert run(*options, *wrong, '--outdir', tmp_path / 'not') == 2
        assert '0 to 2' in capsys.readouterr().err
    assert not (tmp_path / 'not').exists()


def test_tuning_writes_a_network_that_shows_the_same_w(network, target, tmp_path):
    path, out = network(), tmp_path / 'out'
    options = ['--target', target(), '--outdir', out, '--save-video=false', *QUICK]
    assert run('--network', path, *options, '--tune=5', '--noise=keep') == 0
    row = json.loads((out / 'projection.json').read_text())['targets'][0]
    assert row['tuned_psnr'] > row['psnr'] and row['tuned_distance'] > 0
    shown = ['--network', out / 'tuned.pkl', '--projected-w', out / 'projected_w.npz', '--outdir', out]
    assert run(*shown, '--device=cpu', main=generate.main) == 0
    assert np.array_equal(read(out / 'proj00.png')[1], read(out / 'tuned.png')[1])
    assert not np.array_equal(read(out / 'proj.png')[1], read(out / 'tuned.png')[1])


def test_a_network_without_noise_is_projected(network, target, tmp_path):
    path = network(synthesis_kwargs={'channel_base': 64, 'channel_max': 8, 'use_noise': False})
    assert run('--network', path, '--target', target(), '--outdir', tmp_path / 'out', *QUICK) == 0


def test_safetensors_give_the_same_as_pickles(network, target, tmp_path):
    path, other = network(), tmp_path / 'net.safetensors'
    assert run('--source', path, '--dest', other, main=legacy.main) == 0
    for name in (path, other):
        out = tmp_path / name.suffix
        assert run('--network', name, '--target', target(), '--outdir', out, *QUICK) == 0
    assert np.array_equal(*[read(tmp_path / suffix / 'proj.png')[1] for suffix in ('.pkl', '.safetensors')])


@pytest.mark.parametrize('program', [None, '/nonexistent', 'fake'])
def test_without_ffmpeg_the_frames_are_kept(network, target, tmp_path, monkeypatch, capsys, program):
    fake = tmp_path / 'ffmpeg'
    fake.write_text('#!/bin/sh\necho "Unknown encoder libx264" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(video, 'find_ffmpeg', lambda: str(fake) if program == 'fake' else program)
    out = tmp_path / 'out'
    assert run('--network', network(), '--target', target(), '--outdir', out, '--tune=2', *QUICK) == 0
    message = capsys.readouterr().err
    assert 'ffmpeg' in message and 'Traceback' not in message and not (out / 'proj.mp4').exists()
    frames = sorted(path for path in out.rglob('*.png') if path.parent != out)
    assert len(frames) == 3 and read(frames[0])[1].shape == (256, 512, 3)
    assert {'tuned.pkl', 'projection.json', 'projected_w.npz'} <= {path.name for path in out.iterdir()}


def test_without_vgg16_pixels_are_compared_and_it_says_so(network, target, tmp_path, monkeypatch, capsys):
    open_url = util.open_url

    def offline(url, **kwargs):
        if url.endswith('/vgg16.pt'):
            raise util.UserError(f'{url}: no connection')
        return open_url(url, **kwargs)
    monkeypatch.setattr(util, 'open_url', offline)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    options = ['--network', network(), '--target', target(), '--outdir', tmp_path / 'out', *QUICK]
    assert run(*options, '--distance=auto') == 0
    assert '--distance=pixel' in capsys.readouterr().out
    assert run(*options, '--distance=vgg16') == 2
    assert '--distance=vgg16' in capsys.readouterr().err


@pytest.mark.parametrize('options, hint', [
    (['--target=absent.png'], 'absent.png'), (['--target=net.pkl'], 'net.pkl'), (['--target=empty'], 'empty'),
    (['--num-steps=0'], '--num-steps'), (['--seed=-1'], '--seed'), (['--seed=4294967296'], '--seed'),
    (['--space=z'], '--space'), (['--init-w=absent.npz'], '--init-w'), (['--noise=loud'], '--noise'),
    (['--distance=far'], '--distance'), (['--patience=0'], '--patience'), (['--tune=-1'], '--tune'),
    (['--batch=0'], '--batch'), (['--save-video=perhaps'], '--save-video'), (['--device=tpu'], '--device'),
    (['--network=absent.pkl'], 'absent.pkl'), (['--network=a.png'], 'a.png'),
    (['--distance=vgg16', '--detector-dir=broken'], 'vgg16.pt')])
def test_a_wrong_option_is_one_clean_message(
    network, target, tmp_path, monkeypatch, capsys, options, hint,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'vgg16.pt').write_text('no network')
    network(), target()
    assert run('--network=net.pkl', '--target=a.png', '--outdir=out', *QUICK, *options) == 2
    message = capsys.readouterr().err
    assert hint in message and 'Traceback' not in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('missing', ['--network', '--target', '--outdir'])
def test_required_options_are_named(missing, capsys):
    options = [option for option in ('--network=a', '--target=b', '--outdir=c')
               if not option.startswith(missing)]
    assert run(*options) == 2 and missing in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_one_clean_message(network, target, tmp_path, capsys):
    (tmp_path / 'file').write_text('in the way')
    options = ['--network', network(), '--target', target(), *QUICK]
    assert run(*options, '--outdir', tmp_path / 'file') == 2
    assert '--outdir' in capsys.readouterr().err


def test_images_that_no_png_can_hold_are_refused(network, target, tmp_path, capsys):
    options = ['--target', target(), '--outdir', tmp_path / 'out', *QUICK]
    assert run('--network', network(img_channels=5), *options) == 2
    assert '5 channels' in capsys.readouterr().err
