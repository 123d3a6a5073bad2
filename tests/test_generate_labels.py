# SPDX-License-Identifier: Apache-2.0
"""Classes and label vectors in generate.py, style_mixing.py and projector.py; what their PNG files say."""
import json
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from small_networks import small_generator

import generate
import legacy
import projector
import style_mixing
from dnnlib.util import file_sha256
from training.formats.pickled import save_network_snapshot

NAMES = ['flag', 'flower', 'Face']


def run(*args, tool=generate):
    """Run the command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([*map(str, args), '--device=cpu'])
    return exit_info.value.code or 0


def read(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def info(path):
    with PIL.Image.open(path) as image:
        return dict(image.info)


@pytest.fixture
def network(tmp_path):
    """--network of a generator with three named classes."""
    save_network_snapshot(tmp_path / 'net.pkl', G=None, D=None, G_ema=small_generator(c_dim=3),
                          training_set_kwargs={'path': 'x.zip', 'class_names': NAMES})
    return ['--network', tmp_path / 'net.pkl']


def expected(path, seed, label):
    """The image of a seed with a label vector, by the Python interface."""
    G = legacy.load_network(str(path)).G_ema
    with torch.no_grad():
        image = G(torch.from_numpy(np.random.RandomState(seed).randn(1, 8)), torch.tensor([label]),
                  noise_mode='const', force_fp32=True)[0]
    return ((image + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize('option, label', [
    ('--class=1', [0., 1, 0]), ('--class=flower', [0., 1, 0]), ('--class=FLOWER', [0., 1, 0]),
    ('--class=face', [0., 0, 1]), ('--label=0.5,-2,1e-3', [.5, -2, 1e-3]), ('--label=0,1,0', [0., 1, 0])])
def test_a_class_or_a_vector_gives_the_images_of_its_label(network, tmp_path, option, label):
    assert run(*network, '--outdir', tmp_path, '--seeds=5', option) == 0
    assert np.abs(read(tmp_path / 'seed0005.png') - expected(network[1], 5, label)).max() <= 1
    assert run(*network, '--outdir', tmp_path, '--rows=5', '--cols=6', option, tool=style_mixing) == 0
    assert np.abs(read(tmp_path / '5-5.png') - expected(network[1], 5, label)).max() <= 1


@pytest.mark.parametrize('option, words', [
    ('--class=cat', ["the classes are 'flag' (0), 'flower' (1), 'Face' (2)", '0 to 2']),
    ('--class=3', ['0 to 2']), ('--label=1,0', ['2 numbers', '3'])])
def test_a_label_that_the_network_does_not_have_is_one_line(network, tmp_path, capsys, option, words):
    shared = [*network, '--outdir', tmp_path / 'out', option]
    PIL.Image.new('RGB', (16, 16)).save(tmp_path / 'a.png')
    for tool, more in ((generate, ['--seeds=1']), (style_mixing, ['--rows=1', '--cols=2']),
                       (projector, [f'--target={tmp_path}/a.png', '--distance=pixel'])):
        assert run(*shared, *more, tool=tool) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words) and message.count('\n') == 1


def test_names_that_are_numbers_of_others_are_said_and_foreign_names_are_not_trusted(tmp_path, capsys):
    G = small_generator(c_dim=3)
    for names, words in ((['0', '10', '1'], 'is a number here; the class of that name is --class=2'),
                         (['a', 'b'], ''), ([1, 2, 3], ''), ('abc', ''), (None, '')):
        save_network_snapshot(tmp_path / 'net.pkl', G=None, D=None, G_ema=G,
                              training_set_kwargs={'class_names': names})
        assert run('--network', tmp_path / 'net.pkl', '--outdir', tmp_path, '--seeds=1', '--class=1') == 0
        assert words in capsys.readouterr().err
        assert info(tmp_path / 'seed0001.png')['class'] == ('1 10' if words else '1')


def test_without_a_class_each_seed_gets_its_own_and_a_line_says_so(network, tmp_path, capsys):
    assert run(*network, '--outdir', tmp_path / 'a', '--seeds=0-11') == 0
    assert 'Note: each seed gets a random class of 3' in capsys.readouterr().err
    classes = {path.name: info(path)['class'] for path in (tmp_path / 'a').iterdir()}
    assert set(classes.values()) == {'0 flag', '1 flower', '2 Face'}
    # The same alone, in a batch, in a table, and in a dataset.
    assert run(*network, '--outdir', tmp_path / 'b', '--seeds=7,3', '--batch=2') == 0
    assert run(*network, '--outdir', tmp_path / 'mix', '--rows=3', '--cols=7', tool=style_mixing) == 0
    assert run(*network, '--outdir', tmp_path / 'set.zip', '--seeds=0-11') == 0
    for seed in (3, 7):
        image = read(tmp_path / 'a' / f'seed000{seed}.png')
        assert np.abs(image - read(tmp_path / 'b' / f'seed000{seed}.png')).max() <= 1
        assert np.abs(image - read(tmp_path / 'mix' / f'{seed}-{seed}.png')).max() <= 1
    with zipfile.ZipFile(tmp_path / 'set.zip') as archive:
        labels = dict(json.loads(archive.read('dataset.json'))['labels'])
    assert labels == {name: int(text[0]) for name, text in classes.items()}


def test_vectors_are_the_labels_of_a_dataset(network, tmp_path):
    assert run(*network, '--outdir', tmp_path / 'set.zip', '--seeds=1,2', '--label=0.5,0,1') == 0
    with zipfile.ZipFile(tmp_path / 'set.zip') as archive:
        assert json.loads(archive.read('dataset.json'))['labels'] == [
            ['seed0001.png', [0.5, 0, 1]], ['seed0002.png', [0.5, 0, 1]]]


def test_repeated_seeds_are_generated_once_and_said(network, tmp_path, capsys):
    assert run(*network, '--outdir', tmp_path / 'a', '--seeds=3,1,3,3', '--class=0', '--grid') == 0
    output = capsys.readouterr()
    assert 'Note: --seeds: 2 repeated' in output.err and 'Wrote 2 images and grid.png' in output.out
    assert read(tmp_path / 'a' / 'grid.png').size == 2 * 16 * 16 * 3


def test_png_files_say_how_they_were_made(network, tmp_path):
    common = [*network, '--outdir', tmp_path, '--trunc=0.7', '--class=flower']
    made = {'truncation_psi': '0.7', 'noise_mode': 'const', 'network_sha256': file_sha256(network[1])}
    assert run(*common, '--seeds=5', '--grid') == 0
    assert info(tmp_path / 'seed0005.png') == {'seed': '5', 'class': '1 flower', **made}
    assert info(tmp_path / 'grid.png') == made
    assert run(*common, '--rows=5', '--cols=6', '--styles=0,2', tool=style_mixing) == 0
    assert info(tmp_path / '5-6.png') == {'seed': '5', 'class': '1 flower', 'column_seed': '6',
                                          'column_class': '1 flower', 'styles': '0,2', **made}
    assert run(*common, '--seeds=5', '--truncation-sweep=0:1', '--columns=3') == 0
    assert info(tmp_path / 'seed0005-trunc+0.50.png')['truncation_psi'] == '+0.50'
    assert run(*common[:-1], '--seeds=5', '--class-sweep=0,2', '--columns=3') == 0
    assert info(tmp_path / 'seed0005-class0to2-0.50.png')['class'] == '0to2-0.50'
    options = [*network, '--outdir', tmp_path, f'--target={tmp_path}/grid.png', '--class=1', '--num-steps=1']
    assert run(*options, '--distance=pixel', '--save-video=0', tool=projector) == 0
    assert info(tmp_path / 'proj.png') == {**made, 'truncation_psi': '1', 'seed': '303', 'class': '1 flower'}
    assert run(*network, '--outdir', tmp_path, '--projected-w', tmp_path / 'projected_w.npz') == 0
    assert info(tmp_path / 'proj00.png')['truncation_psi'] == '1'


def test_captions_are_under_the_images_of_sheets_and_change_no_pixel_of_them(network, tmp_path):
    common = [*network, '--outdir', tmp_path, '--class=flower']
    for options, tool, name, first in (
            (['--seeds=1-4', '--grid'], generate, 'grid', 'seed0001'),
            (['--seeds=1,2', '--truncation-sweep=0:1', '--columns=2'], generate, 'sweep',
             'seed0001-trunc+0.00'),
            (['--rows=1', '--cols=2'], style_mixing, 'grid', '2-2')):
        assert run(*common, *options, tool=tool) == 0
        plain = read(tmp_path / f'{name}.png')
        assert run(*common, *options, '--captions', tool=tool) == 0
        sheet, image = read(tmp_path / f'{name}.png'), read(tmp_path / f'{first}.png')
        width = sheet.shape[1] // (plain.shape[1] // 16)
        scale = width // 16  # enlarged, so that the caption fits
        assert scale > 1
        column = width if tool is style_mixing else 0
        cell = sheet[:scale * 16, column:column + width]
        assert np.array_equal(cell, image.repeat(scale, axis=0).repeat(scale, axis=1))
        assert sheet[scale * 16:scale * 16 + 14, column:column + width].any()
