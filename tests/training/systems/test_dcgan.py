# SPDX-License-Identifier: Apache-2.0
"""The networks of DCGAN: sizes, initial weights, and what batch normalisation does in training and use."""
import pytest
import torch

from training.systems.dcgan import DCGANDiscriminator, DCGANGenerator


def small_networks(side=16, channels=1):
    torch.manual_seed(0)
    G = DCGANGenerator(z_dim=10, img_resolution=side, img_channels=channels, ngf=4)
    return G, DCGANDiscriminator(img_resolution=side, img_channels=channels, ndf=4)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_known_networks_have_the_known_numbers_of_parameters():
    G, D = DCGANGenerator(img_channels=1), DCGANDiscriminator(img_channels=1)
    assert (count(G), count(D)) == (3_574_656, 2_763_520)
    # Two more channels are two more filters of 4x4 for each of 64 feature maps.
    assert count(DCGANGenerator()) - count(G) == count(DCGANDiscriminator()) - count(D) == 2 * 64 * 16


def test_the_known_generator_has_the_known_layers():
    G = DCGANGenerator(img_channels=1)
    shapes = [tuple(getattr(G.synthesis, f'conv{i}').weight.shape) for i in range(1, 6)]
    assert shapes == [(100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 1, 4, 4)]
    assert not hasattr(G.synthesis, 'bn5')


def test_the_known_discriminator_has_no_batch_norm_at_its_ends():
    D = DCGANDiscriminator(img_channels=1)
    assert [name for name, _ in D.named_children()] == [
        'conv1', 'conv2', 'bn2', 'conv3', 'bn3', 'conv4', 'bn4', 'conv5']


def test_initial_weights_are_normal_of_deviation_0_02():
    for module in (DCGANGenerator(), DCGANDiscriminator()):
        for name, p in module.named_parameters():
            if name.endswith('bias'):
                assert not p.any()
                continue
            mean = 1 if p.ndim == 1 else 0
            # Four deviations of the estimate from n samples.
            error = 4 * 0.02 / p.numel() ** 0.5
            assert abs(float(p.detach().mean()) - mean) < error, name
            assert abs(float(p.detach().std()) - 0.02) < error, name


@pytest.mark.parametrize('side', [8, 16, 32, 64])
@pytest.mark.parametrize('channels', [1, 3])
def test_images_have_the_asked_shape_and_range(side, channels):
    G, D = small_networks(side, channels)
    img = G(torch.randn(2, 10), torch.zeros(2, 0))
    assert img.shape == (2, channels, side, side) and img.abs().max() < 1
    assert D(img, torch.zeros(2, 0)).shape == (2, 1)


def test_the_layers_are_those_of_the_paper():
    G, D = small_networks(8)
    z = torch.randn(3, 10)
    s = G.synthesis
    x = torch.nn.functional.conv_transpose2d(z[:, :, None, None], s.conv1.weight)
    x = torch.relu(torch.nn.functional.batch_norm(x, None, None, s.bn1.weight, s.bn1.bias, training=True))
    x = torch.tanh(torch.nn.functional.conv_transpose2d(x, s.conv2.weight, stride=2, padding=1))
    torch.testing.assert_close(G(z), x)
    y = torch.nn.functional.leaky_relu(
        torch.nn.functional.conv2d(x, D.conv1.weight, stride=2, padding=1), 0.2)
    torch.testing.assert_close(D(x), torch.nn.functional.conv2d(y, D.conv2.weight)[:, :, 0, 0])


def test_an_image_depends_on_its_batch_in_training_only():
    G, _ = small_networks()
    z = torch.randn(4, 10)
    assert not torch.allclose(G(z)[:1], G(z[:2])[:1], atol=1e-4)
    G.eval()
    torch.testing.assert_close(G(z)[:1], G(z[:1]))


def test_running_statistics_follow_batches_in_training_only():
    G, _ = small_networks()
    G.eval()(torch.randn(4, 10))
    assert int(G.synthesis.bn1.num_batches_tracked) == 0
    G.train()(torch.randn(4, 10))
    assert int(G.synthesis.bn1.num_batches_tracked) == 1 and G.synthesis.bn1.running_mean.any()


def test_the_generator_can_be_called_like_any_other():
    G, _ = small_networks()
    G.eval()
    z = torch.randn(2, 10, dtype=torch.float64)
    ws = G.mapping(z, torch.zeros(2, 0), truncation_psi=1)
    assert ws.shape == (2, G.num_ws, G.w_dim)
    expected = G.synthesis(ws, noise_mode='const', force_fp32=True)
    assert torch.equal(G(z, None, noise_mode='const', force_fp32=True), expected)


@pytest.mark.parametrize('side', [4, 48, (64, 32)])
def test_other_sizes_are_refused(side):
    for network in (DCGANGenerator, DCGANDiscriminator):
        with pytest.raises(ValueError, match='must be a power of two'):
            network(img_resolution=side)


def test_wrong_input_is_refused():
    G, D = small_networks()
    with pytest.raises(ValueError, match='truncation_psi must be 1'):
        G(torch.zeros(2, 10), None, truncation_psi=0.7)
    with pytest.raises(ValueError, match=r'z must be \[N, 10\]'):
        G(torch.zeros(2, 11))
    with pytest.raises(ValueError, match=r'ws must be \[N, 1, 10\]'):
        G.synthesis(torch.zeros(2, 2, 10))
    with pytest.raises(ValueError, match=r'img must be \[N, 1, 16, 16\]'):
        D(torch.zeros(2, 1, 8, 8))
    for network in (DCGANGenerator, DCGANDiscriminator):
        with pytest.raises(ValueError, match='DCGAN is unconditional'):
            network(c_dim=3)
