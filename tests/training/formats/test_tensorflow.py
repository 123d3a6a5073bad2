# SPDX-License-Identifier: Apache-2.0
"""TensorFlow pickles: recorded ones and some made here become our networks, exactly, or are refused."""
import io
import json

import numpy as np
import pytest
import torch
from golden_cases import cases, golden_dir
from recorded_networks import open_recorded
from small_networks import small_discriminator, small_generator, without_end
from tensorflow_files import (
    D_STATIC,
    G_STATIC,
    discriminator_network,
    generator_network,
    network,
    tensorflow_pickle,
)

import legacy
from dnnlib.util import UserError

FOLDER = golden_dir() / 'legacy_tf'


@pytest.mark.parametrize('case', cases('legacy_tf'))
def test_recorded_networks_are_converted_as_recorded(case):
    found, recorded = open_recorded('legacy_tf', case)
    assert list(found) == case['result_keys']
    for key, expected in case['nets'].items():
        net = found[key]
        assert json.loads(json.dumps(net.init_kwargs)) == expected['init_kwargs']
        assert net.training == expected['training'] and not any(p.requires_grad for p in net.parameters())
        assert [name for name, _ in net.named_parameters()] == expected['parameters']
        assert [name for name, _ in net.named_buffers()] == expected['buffers']
        for name, tensor in net.state_dict().items():
            assert (tensor - recorded[f'{key}/{name}']).abs().max() <= 1e-6, name


@torch.no_grad()
@pytest.mark.parametrize('case', cases('legacy_tf'))
def test_recorded_networks_compute_what_was_recorded(case):
    found, recorded = open_recorded('legacy_tf', case)
    G, z, c = found.G_ema, recorded['z'], recorded.get('c')

    def check(actual, key):
        assert (actual - recorded[key]).abs().max() <= 1e-4, key
    check(G.mapping(z, c), 'ws')
    check(G(z, c, noise_mode='const', force_fp32=True), 'img_psi1')
    check(G(z, c, truncation_psi=0.7, noise_mode='const', force_fp32=True), 'img_psi0.7')
    check(G(z, c, noise_mode='none', force_fp32=True), 'img_none')
    check(found.D(recorded['img_psi1'], c, force_fp32=True), 'logits')


@pytest.mark.parametrize('case', cases('legacy_tf', key='errors'))
def test_recorded_errors_are_errors(case):
    with pytest.raises(UserError) as error:
        legacy.load_network(FOLDER / case['file'])
    assert case['file'] in str(error.value)


def load(**networks):
    return legacy.load_network_pkl(io.BytesIO(tensorflow_pickle(**networks)))


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_networks_made_here_come_back_to_the_bit(protocol):
    G, D = small_generator(), small_discriminator()
    found = legacy.load_network_pkl(io.BytesIO(tensorflow_pickle(protocol=protocol)))
    for ours, theirs in ((G, found.G), (G, found.G_ema), (D, found.D)):
        for name, tensor in ours.state_dict().items():
            # 1 was taken from this bias and added again.
            tolerance = 1e-6 if name.endswith('affine.bias') else 0
            assert (tensor - theirs.state_dict()[name]).abs().max() <= tolerance, name
    assert found.training_set_kwargs is None and found.augment_pipe is None


def test_arguments_that_change_nothing_are_ignored_and_no_average_decay_is_one():
    # A number of maps may be a float, too, as a product with one is.
    static = {**G_STATIC, 'truncation_psi': 0.5, 'style_mixing_prob': None, 'structure': 'auto',
              'w_avg_beta': None, 'fmap_base': 32.0}
    G = load(G=generator_network(small_generator(), static)).G
    assert G.mapping.w_avg_beta == 1 and G.init_kwargs.synthesis_kwargs['channel_base'] == 64


def test_levels_of_detail_mean_the_architecture_without_skips():
    D = small_discriminator(architecture='orig')
    found = load(D=discriminator_network(D, by_lod=True)).D
    assert found.b16.architecture == 'orig'
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(found(img, None), D(img, None))


def test_precision_can_be_forced():
    data = io.BytesIO(tensorflow_pickle())
    assert legacy.load_network_pkl(data, force_fp16=True).G.synthesis.b16.use_fp16


def refusal(**networks):
    with pytest.raises(UserError) as error:
        load(**networks)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize('argument', ['use_pagan', 'fused_modconv', 'fmap_decay', 'x\x1b'])
def test_unknown_arguments_are_refused_by_name(argument):
    text = refusal(G=generator_network(small_generator(), {**G_STATIC, argument: 1}))
    assert 'G: the TensorFlow argument' in text and argument.replace('\x1b', '?') in text


def test_older_formats_are_refused():
    assert 'format 3' in refusal(G=generator_network(small_generator(), version=3))


@pytest.mark.parametrize('change, text', [
    ({'label_size': 3}, 'LabelEmbed'), ({'resolution': 32}, '32x32'), ({'architecture': 'resnet'}, 'Skip'),
    ({'latent_size': 9}, 'mapping.fc0.weight'), ({'mapping_layers': 10 ** 9}, 'num_layers'),
    ({'num_channels': 'x'}, 'constructed'), ({'fmap_max': 2 ** 30}, 'channel_max')])
def test_arguments_that_do_not_fit_the_variables_are_refused(change, text):
    assert text in refusal(G=generator_network(small_generator(), {**G_STATIC, **change}))


@pytest.mark.parametrize('value, text', [
    (np.zeros([8, 3], np.float32), 'mapping.w_avg'), (np.zeros([1, 1], np.float32), 'mapping.w_avg'),
    ('text', 'no TensorFlow variable dlatent_avg')])
def test_a_variable_of_another_shape_or_kind_is_refused(value, text):
    G = generator_network(small_generator())
    G.variables[:] = [('dlatent_avg', value)]
    assert text in refusal(G=G)


@pytest.mark.parametrize('broken', [
    network(G_STATIC, [1]), network(G_STATIC, 3), network(None, []), network(G_STATIC, [], {'x': 3}),
    network(G_STATIC, [], version='4'), 7])
def test_a_malformed_network_is_refused(broken):
    refusal(G=broken)


@pytest.mark.parametrize('value', without_end(), ids=['doubled', 'cycle'])
def test_arguments_without_end_are_refused(value):
    refusal(G=generator_network(small_generator(), {**G_STATIC, 'resample_kernel': value}))


def test_variables_without_end_are_refused():
    many = network({}, [(f'v{i}', np.float32(0)) for i in range(1000)])
    assert 'too many nested' in refusal(G=network(G_STATIC, [], {str(i): many for i in range(50)}))


def test_a_network_inside_itself_is_refused():
    endless = network(G_STATIC, [])
    endless.components['x'] = endless
    assert 'too many nested' in refusal(G=endless)


def test_a_tuple_of_another_length_is_refused():
    data = tensorflow_pickle(D=network(D_STATIC, []))
    # The tuple of three becomes one of two.
    assert data[-3:-2] == b'\x87' or b'\x87' in data[-6:]
    at = data.rindex(b'\x87')
    with pytest.raises(UserError, match='three TensorFlow networks'):
        legacy.load_network_pkl(io.BytesIO(data[:at] + b'\x86' + data[at + 1:]))
