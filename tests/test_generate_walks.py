# SPDX-License-Identifier: Apache-2.0
"""generate.py and style_mixing.py beyond single images: videos, sweeps, directions, datasets."""
import json
import zipfile

import imageio
import numpy as np
import PIL.Image
import pytest
from small_networks import save_small_network, small_generator

import generate
import style_mixing
from dnnlib import video
from training.dataset import ImageFolderDataset


def run(*args, tool=generate):
    """Run the command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(a) for a in args])
    return exit_info.value.code or 0


def read(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.fixture
def options(tmp_path):
    """Function: --network of a small generator with these arguments, --outdir and the device."""
    return lambda **changes: ['--network', save_small_network(tmp_path / 'net.pkl', **changes),
                              '--outdir', tmp_path / 'out', '--device=cpu']


def frames_of(folder):
    return [read(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize('name', ['walk.mp4', 'walk.webm', 'walk.gif'])
def test_a_walk_decodes_with_the_announced_frames_size_and_rate(options, tmp_path, name):
    walk = ['--seeds=1-4', f'--video={name}', '--video-grid=2x1', '--step-frames=5', '--fps=10',
            '--video-scale=2']
    assert run(*options(), *walk) == 0
    with imageio.get_reader(tmp_path / 'out' / name) as reader:
        meta, frames = reader.get_meta_data(), [np.asarray(frame) for frame in reader]
    assert len(frames) == 6 and frames[0].shape == (32, 64, 3)
    assert meta['duration'] == 100 if name.endswith('gif') else meta['fps'] == 10
    assert [path.name for path in (tmp_path / 'out').iterdir()] == [name]


@pytest.mark.parametrize('kind', ['linear', 'cubic', 'slerp'])
def test_a_walk_shows_the_images_of_its_seeds_and_closes_its_loop(options, tmp_path, kind):
    assert run(*options(), '--seeds=1-3', '--trunc=0.7') == 0
    images = [read(tmp_path / 'out' / f'seed000{seed}.png') for seed in (1, 2, 3)]
    assert run(*options(), '--seeds=1-3', '--trunc=0.7', '--video=walk', '--loop', '--step-frames=20',
               f'--interpolation={kind}', '--batch=7') == 0
    frames = frames_of(tmp_path / 'out' / 'walk')
    assert len(frames) == 60
    for frame, image in zip(frames[::20], images, strict=True):
        assert np.abs(frame - image).max() <= 1
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert 0 < steps[-1] <= 1.5 * max(steps[:-1])


def test_a_walk_through_projections_and_random_noise_that_does_not_flicker(options, tmp_path):
    G = small_generator()
    for name in 'ab':
        np.savez(tmp_path / f'{name}.npz', w=np.repeat(G.mapping.w_avg.numpy()[None, None], G.num_ws, 1))
    files = ['--projected-w', tmp_path / 'a.npz', '--projected-w', tmp_path / 'b.npz']
    assert run(*options(), *files, '--video=walk', '--step-frames=2', '--noise-mode=random') == 0
    frames = frames_of(tmp_path / 'out' / 'walk')
    assert len(frames) == 3 and all(np.array_equal(frame, frames[0]) for frame in frames)
    assert run(*options(), *files, '--video=b', '--interpolation=slerp') == 2


def test_a_truncation_sweep_ends_in_the_plain_images(options, tmp_path):
    assert run(*options(), '--seeds=3,4', '--truncation-sweep=0:1', '--columns=3', '--batch=2') == 0
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert names == {f'seed000{seed}-trunc{psi}.png' for seed in (3, 4) for psi in ('+0.00', '+0.50', '+1.00')
                     } | {'sweep.png'}
    assert run(*options(), '--seeds=3', '--trunc=0.5') == 0
    middle = read(tmp_path / 'out' / 'seed0003-trunc+0.50.png')
    assert np.abs(middle - read(tmp_path / 'out' / 'seed0003.png')).max() <= 1
    sheet = read(tmp_path / 'out' / 'sweep.png')
    assert sheet.shape == (32, 48, 3) and np.array_equal(sheet[:16, 16:32], middle)


def test_a_class_sweep_goes_from_class_to_class(options, tmp_path):
    conditional = options(c_dim=3)
    assert run(*conditional, '--seeds=3', '--class-sweep=0,2', '--columns=3') == 0
    names = {path.stem for path in (tmp_path / 'out').iterdir()}
    assert names == {'seed0003-class0', 'seed0003-class0to2-0.50', 'seed0003-class2', 'sweep'}
    assert run(*conditional, '--seeds=3', '--class=2') == 0
    plain, swept = (read(tmp_path / 'out' / f'{name}.png') for name in ('seed0003', 'seed0003-class2'))
    assert np.abs(plain - swept).max() <= 1
    for kind in ('linear', 'slerp'):
        assert run(*conditional, '--seeds=3-5', '--class-sweep=0-2', f'--video={kind}', '--step-frames=2',
                   f'--interpolation={kind}') == 0
        assert len(frames_of(tmp_path / 'out' / kind)) == 5


@pytest.mark.parametrize('method', ['sefa', 'pca'])
def test_directions_are_found_shown_and_followed(options, tmp_path, method):
    common, out = options(), tmp_path / 'out'
    assert run(*common, f'--find-directions={method}', '--num-directions=2', '--columns=3', '--seeds=0') == 0
    assert {p.name for p in out.iterdir()} == {'directions.npz', 'directions-seed0000.png'}
    sheet = read(out / 'directions-seed0000.png')
    assert sheet.shape == (32, 48, 3)
    assert run(*common, '--seeds=0', f'--direction={out}/directions.npz:1', '--strength=-3') == 0
    moved = read(out / 'seed0000.png')
    assert np.abs(moved - sheet[16:, :16]).max() <= 1
    assert run(*common, '--seeds=0') == 0
    plain = read(out / 'seed0000.png')
    assert np.abs(plain - sheet[16:, 16:32]).max() <= 1 and np.abs(plain - moved).max() > 5
    assert run(*common, '--seeds=0', f'--direction={out}/directions.npz:1', '--strength=-3:3', '--video=v',
               '--step-frames=2') == 0
    assert np.abs(frames_of(out / 'v')[0] - moved).max() <= 1


@pytest.mark.parametrize('c_dim, arguments, labels', [
    (0, [], None), (3, ['--class=1'], [1, 1, 1]), (3, ['--classes=2,0'], [2, 0, 2])])
def test_a_zip_is_a_dataset_with_labels(options, tmp_path, c_dim, arguments, labels):
    network, path = options(c_dim=c_dim, img_channels=4)[:2], tmp_path / 'set.zip'
    assert run(*network, '--outdir', path, '--seeds=8,9,8,10', '--device=cpu', '--batch=2', *arguments) == 0
    dataset = ImageFolderDataset(str(path), use_labels=labels is not None)
    assert dataset.image_shape == [4, 16, 16] and len(dataset) == 3
    with zipfile.ZipFile(path) as archive:
        stored = json.loads(archive.read('dataset.json'))['labels']
    assert (stored and dict(stored)) == (labels and dict(zip(
        ('seed0008.png', 'seed0009.png', 'seed0010.png'), labels, strict=True)))


def test_an_interrupted_dataset_leaves_nothing(options, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr('training.sampling.sampler.Sampler.images', stop)
    network = options()[:2]
    assert run(*network, '--outdir', tmp_path / 'set.zip', '--seeds=0-3', '--device=cpu') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['net.pkl']


def test_an_rgba_video_lies_on_the_background(options, tmp_path):
    common = [*options(img_channels=4), '--seeds=1,2', '--step-frames=1']
    assert run(*common, '--video=keep') == 0 and run(*common, '--video=flat', '--background=red') == 0
    keep, flat = (frames_of(tmp_path / 'out' / name)[0] for name in ('keep', 'flat'))
    alpha = keep[:, :, 3:] / 255
    assert flat.shape[2] == 3 and np.abs(keep[:, :, :3] * alpha + [255, 0, 0] * (1 - alpha) - flat).max() <= 1


def test_style_mixing_films_a_column_that_walks(options, tmp_path):
    table = [*options(), '--rows=1,2', '--cols=3,4', '--styles=0-3']
    assert run(*table, tool=style_mixing) == 0
    assert run(*table, '--video=mix', '--step-frames=3', '--batch=2', tool=style_mixing) == 0
    frames = frames_of(tmp_path / 'out' / 'mix')
    assert len(frames) == 4 and frames[0].shape == (48, 32, 3)
    for frame, column in ((frames[0], 3), (frames[3], 4)):
        for (row, col), name in {(0, 1): f'{column}-{column}', (1, 0): '1-1', (1, 1): f'1-{column}',
                                 (2, 1): f'2-{column}'}.items():
            cell = frame[16 * row:16 * row + 16, 16 * col:16 * col + 16]
            assert np.abs(cell - read(tmp_path / 'out' / f'{name}.png')).max() <= 1
    assert run(*options(), '--rows=1', '--cols=3', '--video=one', tool=style_mixing) == 2


def test_a_missing_ffmpeg_keeps_the_frames(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video, 'find_ffmpeg', lambda: None)
    assert run(*options(), '--seeds=1,2', '--video=walk.mp4', '--step-frames=1') == 0
    assert len(frames_of(tmp_path / 'out' / 'walk-frames')) == 2 and 'ffmpeg' in capsys.readouterr().err


@pytest.mark.parametrize('arguments, hint', [
    (['--video=a.avi'], '.webm'), (['--video=a.mp4', '--fps=0'], 'above 0'), (['--loop'], '--video'),
    (['--video=a.mp4', '--seeds=1'], 'at least 2'),
    (['--video=a.mp4', '--video-grid=2x1'], 'the same number'),
    (['--video=a', '--video-grid=2'], '3x2'), (['--video-grid=1x1'], '--video'),
    (['--video=a', '--background=loud'], 'loud'), (['--video=a', '--interpolation=slerp',
     '--truncation-sweep=0:1'], 'slerp'), (['--video=a', '--grid'], '--grid'),
    (['--video=a', '--video-grid=2x2', '--truncation-sweep=0:1'], '3 images'),
    (['--truncation-sweep=0:1:2'], '-3:3'), (['--truncation-sweep=nan'], '-3:3'),
    (['--truncation-sweep=0:1', '--class-sweep=0,1'], 'exclude each other'),
    (['--class-sweep=0,1'], 'no classes'),
    (['--classes=0'], 'no classes'), (['--classes=0', '--class=0'], 'one of them'),
    (['--classes=3-1'], 'empty range'), (['--strength=2'], '--direction'), (['--layers=2'], '--direction'),
    (['--direction=absent.npz:0'], 'absent.npz'), (['--direction=absent'], 'FILE:INDEX'),
    (['--find-directions=sefa', '--layers=6'], '0 to 5'), (['--find-directions=ica'], 'ica'),
    (['--find-directions=pca', '--num-directions=9'], 'at most 8'),
    (['--find-directions=pca', '--video=a'], '--find-directions')])
def test_a_wrong_option_is_one_clean_message(options, tmp_path, capsys, arguments, hint):
    assert run(*options(), '--seeds=1-3', *arguments) == 2
    message = capsys.readouterr().err
    assert hint in message and 'Traceback' not in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('arguments, hint', [
    (['--class-sweep=0'], 'two classes'), (['--class-sweep=0,3'], '0 to 2'), (['--classes=1-3'], '0 to 2')])
def test_wrong_classes_are_one_clean_message(options, capsys, arguments, hint):
    assert run(*options(c_dim=3), '--seeds=1', *arguments) == 2
    assert hint in capsys.readouterr().err


def test_a_dataset_holds_images_only_and_a_sweep_needs_seeds(options, tmp_path, capsys):
    network = options()[:2]
    for arguments in (['--grid'], ['--video=a.mp4'], ['--truncation-sweep=0:1']):
        assert run(*network, '--outdir', tmp_path / 'a.zip', '--seeds=1,2', *arguments) == 2
        assert 'a.zip' in capsys.readouterr().err
    assert run(*options(), '--projected-w=a.npz', '--truncation-sweep=0:1') == 2
    assert '--seeds' in capsys.readouterr().err


def test_a_truncation_sweep_needs_an_average_w(options, capsys):
    assert run(*options(mapping_kwargs={'w_avg_beta': None}), '--seeds=1', '--truncation-sweep=0:1') == 2
    assert '--truncation-sweep' in capsys.readouterr().err


def test_the_help_lists_every_option_under_a_heading(capsys):
    assert run('--help') == 0
    text = capsys.readouterr().out
    order = [text.index(part) for part in ('Network and output:', '--outdir', 'Images:', '--seeds',
             'Sweeps and directions:', '--strength', '\nVideo:', '--video-grid', 'Options:', '--help')]
    assert order == sorted(order)
