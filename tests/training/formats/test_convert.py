# SPDX-License-Identifier: Apache-2.0
"""Which format a file gets, and the formats of snapshots."""
import pytest
import torch
from small_networks import small_discriminator, small_generator

import legacy
from dnnlib.util import UserError
from training.formats import convert, pickled


def snapshot():
    nets = {'G': small_generator(), 'D': small_discriminator(), 'G_ema': small_generator()}
    return pickled.copy_networks(pickled.HostCopies(), nets, {'path': 'x'})


def test_a_snapshot_is_written_in_each_format_asked_for(tmp_path):
    held = snapshot()
    paths = convert.write_snapshot(tmp_path / 'network-snapshot-000001.pkl', held, ['pkl', 'safetensors'])
    assert [p.name for p in paths] == ['network-snapshot-000001.pkl', 'network-snapshot-000001.safetensors']
    assert len(list(tmp_path.iterdir())) == 2
    found = [legacy.load_network(path) for path in paths]
    for key in ('G', 'D', 'G_ema'):
        for name, tensor in held[key].state_dict().items():
            assert all(torch.equal(tensor, f[key].state_dict()[name]) for f in found), name
    assert all(f.training_set_kwargs == {'path': 'x'} for f in found)
    assert convert.write_snapshot(tmp_path / 'x.pkl', held) == [tmp_path / 'x.pkl']


@pytest.mark.parametrize('name', ['x', 'x.npz', 'x.pkl.gz'])
def test_an_unknown_suffix_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r'--dest=.*must end in one of \.pkl'):
        convert.write(tmp_path / name, {}, convert.Choices())


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        convert.write(tmp_path / 'a' / 'x.pkl', {}, convert.Choices())


def test_the_generator_to_export_can_be_chosen(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(convert.exported, 'write_onnx', lambda path, images: chosen.append(images))
    contents = {'G': small_generator(), 'G_ema': small_generator()}
    path = tmp_path / 'x.onnx'
    for network in (None, 'G', 'G_ema'):
        notes = convert.write(path, contents, convert.Choices(0.5, 'none', network))
        assert 'pip install onnxruntime' in notes[0]
    convert.write(path, {'G': contents['G']}, convert.Choices())
    expected = [contents[key] for key in ('G_ema', 'G', 'G_ema', 'G')]
    assert all(images.G is G for images, G in zip(chosen, expected, strict=True))
    assert (chosen[0].truncation_psi, chosen[0].noise_mode) == (0.5, 'none')
    with pytest.raises(UserError, match='no G_ema to export'):
        convert.write(path, {'G': contents['G']}, convert.Choices(network='G_ema'))
