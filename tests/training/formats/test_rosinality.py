# SPDX-License-Identifier: Apache-2.0
"""The other widespread layout: names and shapes as specified, numbers kept both ways."""
import argparse
import os

import pytest
import torch
from small_networks import small_discriminator, small_generator

import legacy
from dnnlib.util import UserError
from training.formats import rosinality


@pytest.fixture(scope='module')
def nets():
    return {'G_ema': small_generator(img_resolution=32), 'G': small_generator(img_resolution=32),
            'D': small_discriminator(img_resolution=32)}


@pytest.fixture(scope='module')
def path(nets, tmp_path_factory):
    path = tmp_path_factory.mktemp('pt') / 'net.pt'
    assert rosinality.write(path, nets) == []
    return path


def test_names_and_shapes_are_those_of_the_layout(path, nets):
    held = torch.load(path, weights_only=True)
    assert sorted(held) == ['d', 'g', 'g_ema', 'latent_avg'] and held['latent_avg'].shape == (8,)
    g, d = held['g_ema'], held['d']
    expected = {
        'style.1.weight': [8, 8], 'style.2.bias': [8], 'input.input': [1, 8, 4, 4],
        'conv1.conv.weight': [1, 8, 8, 3, 3], 'conv1.conv.modulation.weight': [8, 8],
        'conv1.noise.weight': [1], 'conv1.activate.bias': [8], 'to_rgb1.conv.weight': [1, 3, 8, 1, 1],
        'to_rgb1.bias': [1, 3, 1, 1], 'to_rgbs.2.conv.modulation.bias': [2],
        'to_rgbs.0.upsample.kernel': [4, 4],
        'convs.0.conv.blur.kernel': [4, 4], 'convs.4.conv.weight': [1, 2, 4, 3, 3],
        'convs.5.conv.weight': [1, 2, 2, 3, 3], 'noises.noise_0': [1, 1, 4, 4],
        'noises.noise_5': [1, 1, 32, 32], 'noises.noise_6': [1, 1, 32, 32]}
    assert {key: list(g[key].shape) for key in expected} == expected
    assert g['convs.0.conv.blur.kernel'].sum() == 4 and d['convs.1.conv2.0.kernel'].sum() == 1
    assert not [key for key in g if key.startswith(('convs.6', 'to_rgbs.3', 'noises.noise_7', 'style.3'))]
    expected = {
        'convs.0.0.weight': [2, 3, 1, 1], 'convs.0.1.bias': [2], 'convs.1.conv1.0.weight': [2, 2, 3, 3],
        'convs.1.conv1.1.bias': [2], 'convs.1.conv2.1.weight': [4, 2, 3, 3], 'convs.3.conv2.2.bias': [8],
        'convs.2.skip.1.weight': [8, 4, 1, 1], 'final_conv.0.weight': [8, 9, 3, 3], 'final_conv.1.bias': [8],
        'final_linear.0.weight': [8, 128], 'final_linear.1.weight': [1, 8], 'final_linear.1.bias': [1]}
    assert {key: list(d[key].shape) for key in expected} == expected
    assert torch.equal(d['convs.1.conv1.0.weight'], nets['D'].b32.conv0.weight)
    assert torch.equal(g['convs.2.conv.weight'][0], nets['G'].synthesis.b16.conv0.weight)
    assert torch.equal(g['noises.noise_3'][0, 0], nets['G'].synthesis.b16.conv0.noise_const)


@torch.no_grad()
def test_images_and_logits_come_back_to_the_bit(path, nets):
    found, z = legacy.load_network(path), torch.randn(2, 8)
    options = {'truncation_psi': 0.5, 'noise_mode': 'const'}
    images = nets['G_ema'](z, None, **options)
    assert torch.equal(found.G_ema(z, None, **options), images)
    assert torch.equal(found.G(z, None, **options), images)
    assert torch.equal(found.D(images, None), nets['D'](images, None))
    assert found.training_set_kwargs is None and found.G_ema.init_kwargs.img_resolution == 32


@pytest.mark.parametrize('is_zip', [True, False])
def test_checkpoints_of_training_are_read_with_their_other_contents(path, tmp_path, is_zip):
    held = torch.load(path, weights_only=True)
    held = {'g_ema': held['g_ema'], 'args': argparse.Namespace(size=32), 'g_optim': {'state': {}, 'lr': 0.1}}
    torch.save(held, tmp_path / 'x.pt', _use_new_zipfile_serialization=is_zip)
    found = legacy.load_network(tmp_path / 'x.pt')
    assert found.G is None and found.D is None
    # Without the average it is estimated, from the same latents each time.
    w_avg = found.G_ema.mapping.w_avg
    with torch.no_grad():
        w = found.G_ema.mapping(torch.randn(4000, 8), None)[:, 0]
    assert (w_avg - w.mean(dim=0)).abs().max() < 0.1 * w.std() and w_avg.abs().max() > 0
    assert torch.equal(legacy.load_network(tmp_path / 'x.pt').G_ema.mapping.w_avg, w_avg)


MISFITS = {
    'conditional': {'c_dim': 2}, 'not square': {'img_resolution': (16, 24)}, 'channels': {'img_channels': 1},
    'z_dim': {'z_dim': 9}, 'lr_multiplier': {'mapping_kwargs': {'num_layers': 2, 'lr_multiplier': 0.1}},
    'architecture': {'synthesis_kwargs': {'channel_max': 8, 'architecture': 'orig'}},
    'use_noise': {'synthesis_kwargs': {'channel_max': 8, 'use_noise': False}},
    'activation': {'synthesis_kwargs': {'channel_max': 8, 'activation': 'relu'}},
    'filter': {'synthesis_kwargs': {'channel_max': 8, 'resample_filter': [1, 2, 1]}},
    'layer width': {'mapping_kwargs': {'num_layers': 2, 'layer_features': 7}}}


@pytest.mark.parametrize('what', MISFITS)
def test_generators_that_the_layout_cannot_express_are_refused(what, tmp_path):
    with pytest.raises(UserError, match=what):
        rosinality.write(tmp_path / 'x.pt', {'G_ema': small_generator(**MISFITS[what])})
    assert list(tmp_path.iterdir()) == []


def test_what_gets_lost_is_said(tmp_path):
    contents = {'G': small_generator(synthesis_kwargs={'channel_max': 8, 'conv_clamp': 256}),
                'D': small_discriminator(epilogue_kwargs={'mbstd_group_size': 2})}
    notes = rosinality.write(tmp_path / 'x.pt', contents)
    assert 'conv_clamp' in notes[0] and 'groups of 2' in notes[1]
    notes = rosinality.write(tmp_path / 'x.pt', {**contents, 'D': small_discriminator(architecture='skip')})
    assert 'D is dropped' in notes[1] and 'd' not in torch.load(tmp_path / 'x.pt')
    with pytest.raises(UserError, match='no generator'):
        rosinality.write(tmp_path / 'x.pt', {'D': small_discriminator()})


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('made',)


def refusal(held, tmp_path, **options):
    torch.save(held, tmp_path / 'x.pt', **options)
    with pytest.raises(UserError) as error:
        legacy.load_network(tmp_path / 'x.pt')
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize('is_zip', [True, False])
def test_hostile_checkpoints_are_refused_and_do_nothing(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    text = refusal({'g_ema': Hostile()}, tmp_path, _use_new_zipfile_serialization=is_zip)
    assert 'mkdir' in text and [p.name for p in tmp_path.iterdir()] == ['x.pt']


@pytest.mark.parametrize('held, text', [
    ([], 'list'), ({}, 'holds none'), ({'g_ema': {'a': 3}}, 'a is not a tensor'),
    ({'g_ema': {'a': torch.ones(1)}}, 'style.1.weight'), ({'d': {'a': torch.ones(1)}}, 'convs.0.0.weight'),
    ({'g_ema': {'a': torch.ones(2).to_sparse()}}, 'asks for torch._utils._rebuild_sparse_tensor'),
    ({'g': {3: torch.ones(2)}}, '3 is not a tensor')])
def test_other_contents_are_refused(held, text, tmp_path):
    assert text in refusal(held, tmp_path)


def test_missing_and_misshapen_tensors_are_named(path, tmp_path):
    for key, text in (('convs.3.conv.weight', 'convs.3.conv.weight'), ('style.2.bias', 'style.2.bias')):
        held = torch.load(path, weights_only=True)
        del held['g_ema'][key]
        assert text in refusal({'g_ema': held['g_ema']}, tmp_path)
    held = torch.load(path, weights_only=True)
    held['g_ema']['conv1.activate.bias'] = torch.zeros(9)
    assert 'synthesis.b4.conv1.bias' in refusal({'g_ema': held['g_ema']}, tmp_path)
    for shape in ([1, 0, 8, 8], [2, 1, 8, 8], [1]):
        held['g_ema']['noises.noise_1'] = torch.zeros(shape)
        assert f'noises.noise_1 has the shape {shape}' in refusal({'g_ema': held['g_ema']}, tmp_path)


def test_damaged_archives_are_refused(path, tmp_path):
    data = path.read_bytes()
    for damaged in (data[:100], data[:-50], b'PK\x03\x04' + b'\0' * 50):
        (tmp_path / 'x.pt').write_bytes(damaged)
        with pytest.raises(UserError, match=r'x\.pt'):
            legacy.load_network(tmp_path / 'x.pt')
