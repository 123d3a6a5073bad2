# SPDX-License-Identifier: Apache-2.0
"""The building blocks of StyleGAN, with the shapes of the textbook, and its generator."""
import numpy as np
import pytest
import torch

from training import networks
from training.systems.stylegan1 import (
    AdaIN,
    MappingNetwork,
    NoiseInjection,
    StyleGAN1Generator,
    SynthesisBlock,
)

SMALL = {'z_dim': 8, 'c_dim': 0, 'w_dim': 8, 'img_resolution': 16, 'img_channels': 3,
         'mapping_kwargs': {'num_layers': 2}, 'synthesis_kwargs': {'channel_base': 64, 'channel_max': 8}}


def small_generator(**changes):
    torch.manual_seed(0)
    return StyleGAN1Generator(**{**SMALL, **changes})


def with_noise(G, strength=0.5):
    with torch.no_grad():
        for module in G.modules():
            if isinstance(module, NoiseInjection):
                module.weight.fill_(strength)
    return G


def test_the_mapping_network_makes_w_of_z():
    mapping = MappingNetwork(512, 512)
    assert mapping.num_layers == 8
    z = torch.randn(4, 512)
    w = mapping(z)
    assert w.shape == (4, 512)
    # The input has unit mean square, whatever its length.
    torch.testing.assert_close(mapping(3 * z), w, rtol=1e-3, atol=1e-4)


def test_each_layer_of_the_mapping_is_linear_with_a_leaky_relu_of_slope_0_2():
    mapping = MappingNetwork(16, 8, num_layers=1)
    z = networks.normalize_2nd_moment(torch.randn(5, 16))
    layer = mapping.fc0
    linear = z @ (layer.weight * layer.weight_gain).t() + layer.bias * layer.bias_gain
    expected = torch.nn.functional.leaky_relu(linear, 0.2) * np.sqrt(2)
    torch.testing.assert_close(mapping(z), expected)


def test_adain_gives_each_feature_map_the_mean_and_deviation_that_w_says():
    torch.manual_seed(0)
    layer, x, w = AdaIN(64, 512), torch.randn(4, 64, 32, 32) * 7 + 3, torch.randn(4, 512)
    y = layer(x, w)
    assert y.shape == (4, 64, 32, 32)
    torch.testing.assert_close(y.mean(dim=[2, 3]), layer.style_bias(w), rtol=1e-4, atol=1e-4)
    deviation = y.std(dim=[2, 3], correction=0)
    torch.testing.assert_close(deviation, layer.style_scale(w).abs(), rtol=1e-4, atol=1e-4)


def test_adain_does_not_see_the_scale_of_its_input():
    layer, x, w = AdaIN(3, 4), torch.randn(2, 3, 8, 8), torch.randn(2, 4)
    torch.testing.assert_close(layer(x * 5 - 2, w), layer(x, w), rtol=1e-4, atol=1e-4)


def test_adain_starts_as_instance_normalisation_where_w_is_zero():
    x = torch.randn(2, 3, 8, 8)
    expected = torch.nn.functional.instance_norm(x)
    torch.testing.assert_close(AdaIN(3, 4)(x, torch.zeros(2, 4)), expected, rtol=1e-4, atol=1e-4)


def test_noise_of_weight_zero_changes_nothing():
    layer, x = NoiseInjection(64), torch.randn(2, 64, 4, 4)
    assert layer.weight.shape == (1, 64, 1, 1) and not layer.weight.any()
    assert torch.equal(layer(x), x)
    assert torch.equal(layer(x, torch.randn(2, 1, 4, 4)), x)


def test_noise_is_added_to_each_feature_map_by_its_weight():
    layer, x, noise = NoiseInjection(3), torch.zeros(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, 1.0, -2.0])[None, :, None, None])
    y = layer(x, noise)
    assert torch.equal(y, torch.cat([0 * noise, noise, -2 * noise], dim=1))
    # One map for all channels, another for each image and call.
    drawn = layer(x)
    assert torch.equal(drawn[:, 2], -2 * drawn[:, 1]) and not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(layer(x), drawn)


@pytest.mark.parametrize(('use_upsample', 'side'), [(True, 32), (False, 16)])
def test_a_block_has_the_shapes_of_the_textbook(use_upsample, side):
    block = SynthesisBlock(128, 64, 512, use_upsample=use_upsample)
    assert block(torch.randn(4, 128, 16, 16), torch.randn(4, 512)).shape == (4, 64, side, side)


def test_a_block_upsamples_then_convolves_then_adds_noise_then_styles():
    torch.manual_seed(0)
    block, x, w = SynthesisBlock(2, 3, 4), torch.randn(2, 2, 8, 8), torch.randn(2, 4)
    noise = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        block.noise.weight.normal_()
    y = torch.nn.functional.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
    # Layers that enlarge convolve, in the sense of mathematics; torch correlates.
    weight = block.conv.weight.flip([2, 3]) * block.conv.weight_gain
    y = torch.nn.functional.conv2d(y, weight, padding=1)
    # Away from the edge, where bilinear interpolation repeats pixels and filters see zeros.
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    torch.testing.assert_close(block.conv(x)[inner], y[inner], rtol=1e-4, atol=1e-5)
    rest = block.adain(block.noise(block.conv(x), noise), w)
    assert torch.equal(block(x, w, noise), torch.where(rest > 0, rest, 0.2 * rest))


def test_the_generator_begins_with_a_constant_of_4x4x512_and_has_two_layers_a_level():
    with torch.device('meta'):
        G = StyleGAN1Generator(512, 0, 512, 1024, 3)
    assert G.synthesis.b4_first.const.shape == (1, 512, 4, 4)
    assert G.num_ws == 18 and len(list(G.synthesis.children())) == 18 + 1
    assert G.mapping.num_layers == 8
    widths = [getattr(G.synthesis, f'b{level}_second').conv.weight.shape[0] for level in (32, 64, 256, 1024)]
    assert widths == [512, 256, 64, 16]


@pytest.mark.parametrize('resolution', [16, 32, (12, 20)])
@pytest.mark.parametrize('channels', [1, 3])
def test_the_generator_makes_images_of_any_shape(resolution, channels):
    G = small_generator(img_resolution=resolution, img_channels=channels)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    assert G(torch.randn(2, 8)).shape == (2, channels, *size)


def test_noise_modes_draw_repeat_or_leave_out_noise():
    G, z = with_noise(small_generator()).eval(), torch.randn(2, 8)
    images = {mode: [G(z, noise_mode=mode) for _ in range(2)] for mode in ('random', 'const', 'none')}
    assert not torch.equal(*images['random'])
    assert torch.equal(*images['const']) and torch.equal(*images['none'])
    assert not torch.equal(images['const'][0], images['none'][0])
    silent = with_noise(small_generator(), 0).eval()
    assert torch.equal(silent(z, noise_mode='none'), silent(z))


def test_each_w_reaches_its_own_layer():
    G, ws = small_generator().eval(), torch.randn(1, 6, 8)
    # The constant is flat at first, and normalising it leaves nothing to scale.
    with torch.no_grad():
        G.synthesis.b4_first.const.normal_()
    before = G.synthesis(ws, noise_mode='none')
    for i in range(G.num_ws):
        other = ws.clone()
        other[:, i] = -other[:, i]
        assert not torch.allclose(G.synthesis(other, noise_mode='none'), before), i


def test_truncation_pulls_towards_the_average_that_training_keeps():
    G, z = small_generator(), torch.randn(4, 8)
    G(z)
    assert G.mapping.w_avg.any()
    G.eval()
    ws = G.mapping(z, None, truncation_psi=0, truncation_cutoff=2)
    assert torch.equal(ws[:, :2], G.mapping.w_avg.expand(4, 2, 8))
    assert torch.equal(ws[:, 2:], G.mapping(z)[:, 2:])


def test_labels_change_the_image():
    G, z = small_generator(c_dim=3).eval(), torch.randn(1, 8)
    images = [G(z, torch.eye(3)[i:i + 1], noise_mode='none') for i in range(2)]
    assert not torch.allclose(*images)


def test_every_parameter_gets_a_gradient():
    G = with_noise(small_generator())
    with torch.no_grad():
        G.synthesis.b4_first.const.normal_()
    (G(torch.randn(4, 8)) * torch.randn(4, 3, 16, 16)).sum().backward()
    assert [name for name, p in G.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_wrong_input_is_refused():
    G = small_generator()
    with pytest.raises(ValueError, match=r'ws must be \[N, 6, 8\]'):
        G.synthesis(torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match='noise_mode'):
        G(torch.zeros(1, 8), noise_mode='loud')
    with pytest.raises(ValueError, match='z must be'):
        G(torch.zeros(1, 9))
