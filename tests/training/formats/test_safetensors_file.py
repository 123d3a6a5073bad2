# SPDX-License-Identifier: Apache-2.0
"""Networks in safetensors: there and back without a changed bit, and nothing believed that does not fit."""
import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from small_networks import small_discriminator, small_generator

import legacy
from dnnlib.util import UserError
from training import augment
from training.formats import pickled, safetensors_file

SHAPES = {
    'square': {}, 'conditional': {'c_dim': 3}, 'wide gray': {'img_resolution': (16, 24), 'img_channels': 1},
    'resnet': {'synthesis_kwargs': {'channel_base': 64, 'channel_max': 8, 'architecture': 'resnet'}},
    'channels last': {'synthesis_kwargs': {'channel_base': 64, 'channel_max': 8, 'num_fp16_res': 2,
                                           'fp16_channels_last': True, 'half_dtype': 'bfloat16'}}}


@torch.no_grad()
@pytest.mark.parametrize('shape', SHAPES)
def test_images_survive_pkl_to_safetensors_to_pkl_to_the_bit(shape, tmp_path):
    G = small_generator(**SHAPES[shape])
    first = pickled.save_network_snapshot(tmp_path / 'a.pkl', G=None, D=None, G_ema=G)
    second = safetensors_file.write(tmp_path / 'b.safetensors', legacy.load_network(first))
    found = legacy.load_network(second)
    third = pickled.save_network_snapshot(tmp_path / 'c.pkl', G=None, D=None, G_ema=found.G_ema)
    z, c = torch.randn(2, 8), torch.eye(3)[:2]
    images = [net(z, c, truncation_psi=0.7, noise_mode='const')
                for net in (G, found.G_ema, legacy.load_network(third).G_ema)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    strides = [{n: t.stride() for n, t in net.state_dict().items()} for net in (G, found.G_ema)]
    assert strides[0] == strides[1]


def test_every_network_and_option_of_a_snapshot_is_there(tmp_path):
    pipe = augment.AugmentPipe(xflip=1, imgfilter_bands=[1, 0, 1, 1])
    pipe.p.fill_(0.25)
    D = small_discriminator(c_dim=2, block_kwargs={'freeze_layers': 3})
    path = safetensors_file.write(tmp_path / 'a.safetensors', {
        'D': D, 'G_ema': small_generator(), 'augment_pipe': pipe,
        'training_set_kwargs': {'path': 'x', 'n': 1}})
    found = legacy.load_network(path)
    assert found.G is None and found.training_set_kwargs == {'path': 'x', 'n': 1}
    assert [n for n, _ in found.D.named_buffers()] == [n for n, _ in D.named_buffers()]
    images, labels = torch.ones(2, 3, 16, 16), torch.eye(2)
    assert torch.equal(found.D(images, labels), D(images, labels))
    assert found.augment_pipe.p == 0.25 and found.augment_pipe.init_kwargs == pipe.init_kwargs
    assert legacy.load_network(path, only=['D']).G_ema is None
    assert legacy.load_network(path, force_fp16=True).G_ema.synthesis.b16.use_fp16


def test_others_can_read_the_tensors_and_everybody_the_file(tmp_path):
    G = small_generator()
    path = safetensors_file.write(tmp_path / 'a.safetensors', {'G_ema': G, 'G': G})
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors['G_ema.mapping.w_avg'], G.mapping.w_avg) and 'G.mapping.w_avg' in tensors
    ordinary = tmp_path / 'ordinary'
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode and len(list(tmp_path.iterdir())) == 2


def test_positional_and_numpy_arguments_are_written(tmp_path):
    net = augment.AugmentPipe(1, imgfilter_bands=np.ones(4), xfrac=np.float32(0.5))
    path = safetensors_file.write(tmp_path / 'a.safetensors', {'G': small_generator(), 'augment_pipe': net})
    found = legacy.load_network(path).augment_pipe
    assert found.xflip == 1 and found.imgfilter_bands == [1, 1, 1, 1] and found.xfrac == 0.5


def test_a_network_of_a_foreign_class_is_not_written(tmp_path):
    with pytest.raises(UserError, match='class Linear'):
        safetensors_file.write(tmp_path / 'a.safetensors', {'G': torch.nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('good') / 'a.safetensors'
    return safetensors_file.write(path, {'G_ema': small_generator()}).read_bytes()


def changed(data, change):
    """The file with another header: change(header) works on its JSON value."""
    size, = struct.unpack('<Q', data[:8])
    header = json.loads(data[8:8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + size:]


def refusal(data, tmp_path):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        legacy.load_network(path)
    assert str(error.value).isprintable() and str(path) in str(error.value)
    return str(error.value)


def networks(change):
    """Change the description of G_ema inside the metadata."""
    def on_header(header):
        described = json.loads(header['__metadata__']['networks'])
        change(described['G_ema'])
        header['__metadata__']['networks'] = json.dumps(described)
    return on_header


CHANGES = {
    'constructor arguments of networks': lambda h: h.pop('__metadata__'),
    'metadata is not JSON': lambda h: h['__metadata__'].update(networks='['),
    'metadata is not a JSON object': lambda h: h['__metadata__'].update(networks='[]'),
    'holds no networks': lambda h: h['__metadata__'].update(networks='{}'),
    'damaged': lambda h: h['G_ema.mapping.w_avg'].update(data_offsets=[0, 1 << 50]),
    'no constructor arguments': networks(lambda net: net.update(init_kwargs=3)),
    'no constructor arguments;': networks(lambda net: net.pop('class_name')),
    'is of class System': networks(lambda net: net.update(class_name='System')),
    'img_resolution': networks(lambda net: net['init_kwargs'].update(img_resolution=1 << 40)),
    'cannot be constructed': networks(lambda net: net['init_kwargs'].update(evil=1)),
    'first synthesis.b32': networks(lambda net: net['init_kwargs'].update(img_resolution=32)),
    'first mapping.w_avg': lambda h: h.update({'G_ema.mapping.w_avg2': h.pop('G_ema.mapping.w_avg')})}


@pytest.mark.parametrize('text', CHANGES)
def test_a_file_that_does_not_fit_is_refused(text, good, tmp_path):
    assert text in refusal(changed(good, CHANGES[text]), tmp_path)


def test_truncated_files_are_refused(good, tmp_path):
    for length in (8, 9, 100, len(good) - 1):
        refusal(good[:length], tmp_path)
    assert legacy.load_network(write(good, tmp_path)).G_ema is not None


def write(data, tmp_path):
    path = tmp_path / 'good.safetensors'
    path.write_bytes(data)
    return path


def test_a_header_that_is_nested_without_end_is_refused(tmp_path):
    text = b'{"a":' + b'[' * 200_000
    refusal(struct.pack('<Q', len(text)) + text, tmp_path)
