# SPDX-License-Identifier: Apache-2.0
"""The bundled network, found by name wherever a network is opened, and the script that makes it."""
import json
import os

import pytest
import safetensors
import torch
from small_networks import small_discriminator, small_generator

import generate
import train
from dnnlib.util import UserError
from metrics import evaluation
from scripts import make_network
from training.dataset import ImageFolderDataset, find_dataset
from training.formats.load import find_network, load_network
from training.formats.pickled import save_network_snapshot


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot in its run directory."""
    path = tmp_path / 'network-snapshot-000123.pkl'
    save_network_snapshot(path, G=None, D=small_discriminator(c_dim=2), G_ema=small_generator(c_dim=2),
                          training_set_kwargs={'path': '/home/me/x.zip'})
    options = {'run_dir': str(tmp_path), 'batch_size': 8, 'training_set_kwargs': {'path': '/home/me/x.zip'}}
    (tmp_path / 'training_options.json').write_text(json.dumps(options))
    return path


def test_a_snapshot_becomes_a_smaller_file_that_says_where_it_is_from(snapshot, tmp_path, capsys):
    dest = tmp_path / 'out.safetensors'
    assert make_network.main([str(snapshot), str(dest)]) == 0 and 'G_ema, D' in capsys.readouterr().out
    before, after = load_network(str(snapshot)), load_network(str(dest))
    for name in ('G_ema', 'D'):
        for one, other in zip(before[name].parameters(), after[name].parameters(), strict=True):
            torch.testing.assert_close(one.half().float(), other)
    assert after.training_set_kwargs['path'] == 'emoji32'
    assert after.training_set_kwargs['class_names'][6] == 'smileys'
    with safetensors.safe_open(dest, 'pt') as file:
        noted = file.metadata()
    assert noted['kimg'] == '123' and 'Noto' in noted['licence'] and str(tmp_path) not in str(noted)
    assert json.loads(noted['training_options'])['batch_size'] == 8 and '/home/me' not in str(noted)


def test_d_stays_behind_if_it_is_too_large(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(make_network, 'MAX_BYTES', 1)
    found = load_network(str(make_network.write_network(snapshot, tmp_path / 'out.safetensors')))
    assert found.G_ema is not None and found.D is None


def test_mistakes_are_told(snapshot, tmp_path, capsys):
    (tmp_path / 'training_options.json').unlink()
    assert make_network.main([str(snapshot), str(tmp_path / 'out.safetensors')]) == 2
    assert 'training_options.json' in capsys.readouterr().err
    assert make_network.main([]) == 2
    with pytest.raises(UserError, match='float16'):
        make_network.in_half(torch.nn.Linear(1, 1).requires_grad_(False).apply(
            lambda layer: layer.weight.fill_(1e6)), 'net')


def test_the_bundled_network_is_whole_and_fits_the_bundled_dataset():
    path = find_network('emoji32')
    found, dataset = load_network('emoji32'), ImageFolderDataset(find_dataset('emoji32'), use_labels=True)
    assert path != 'emoji32' and 1e6 < os.path.getsize(path) < 6e6
    assert found.G_ema.img_resolution == dataset.resolution and found.G_ema.c_dim == dataset.label_dim
    with safetensors.safe_open(path, 'pt') as file:
        options = json.loads(file.metadata()['training_options'])
    assert options['training_set_kwargs']['path'] == 'emoji32' and '"/' not in json.dumps(options)


@pytest.mark.parametrize('path', ['./emoji32', 'emoji32.safetensors', 'x', ''])
def test_other_names_are_paths(path):
    assert find_network(path) == path


def run(tool, *args):
    with pytest.raises(SystemExit) as left:
        tool.main(list(args))
    return left.value.code or 0


def test_tools_find_it_in_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ['--seeds=0-3', '--class=6', '--grid', '--batch=4', '--outdir=out']
    assert run(generate, '--network=emoji32', *options) == 0
    assert (tmp_path / 'out' / 'grid.png').is_file()
    assert evaluation.check_network('emoji32') == find_network('emoji32')
    with pytest.raises(UserError, match='emoji33: no such file'):
        evaluation.check_network('emoji33')


def test_a_run_fine_tunes_from_it(tmp_path, capfd):
    status = run(train, f'--outdir={tmp_path}', '--data=smileys', '--cfg=demo', '--kimg=1', '--batch=64',
                 '--cbase=128', '--cmax=8', '--aug=noaug', '--metrics=none', '--resume=emoji32',
                 '--workers=0')
    printed = capfd.readouterr()
    assert status == 0, printed.err
    assert 'Transfer from emoji32' in printed.out
    assert 'resumeemoji32' in next(tmp_path.glob('00000-smileys-demo-*')).name
