# SPDX-License-Identifier: Apache-2.0
"""The five operations of the micro network against their formulas, and the network as a whole."""
import math

import pytest
import torch
import torch.nn.functional as F

from training.networks import FullyConnectedLayer
from training.systems.micro import MicroGenerator, MicroLayer, bias_tanh, constant_fill, leaky_relu_in_place


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def test_the_fill_is_the_same_constant_everywhere():
    y = constant_fill(torch.randn([3, 5]).double(), 7)
    assert y.shape == (3, 7, 4, 4) and y.dtype == torch.float64
    assert torch.equal(y, torch.ones_like(y))


def test_the_leaky_relu_keeps_what_is_positive_and_writes_over_its_input():
    x = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    y = leaky_relu_in_place(x)
    torch.testing.assert_close(y, torch.tensor([-0.4, -0.1, 0.0, 3.0]))
    assert y.data_ptr() == x.data_ptr()


def test_the_bias_is_added_to_each_channel_before_tanh():
    x, b = torch.randn([2, 3, 4, 5]), torch.tensor([0.5, -1.0, 2.0])
    y = bias_tanh(x, b)
    for c in range(3):
        torch.testing.assert_close(y[:, c], (x[:, c] + b[c]).tanh())


def test_the_convolution_has_the_modulated_and_demodulated_weight_of_each_sample():
    layer, x, w = MicroLayer(4, 6), torch.randn([3, 4, 8, 8]), torch.randn([3, 512])
    y = layer(x, w)
    styles = w @ layer.affine.weight.t() / math.sqrt(512) + 1
    for n in range(3):
        weight = layer.weight * styles[n][None, :, None, None]
        weight = weight / (weight.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        torch.testing.assert_close(y[n], F.conv2d(x[n:n + 1], weight, padding=1)[0], atol=1e-5, rtol=1e-4)


def test_the_fully_connected_layer_is_an_equalised_matrix_product_with_leaky_relu():
    layer, x = FullyConnectedLayer(512, 512, activation='lrelu'), torch.randn([4, 512])
    torch.nn.init.normal_(layer.bias)
    y = x @ layer.weight.t() / math.sqrt(512) + layer.bias
    torch.testing.assert_close(layer(x), torch.where(y > 0, y, 0.2 * y) * math.sqrt(2), atol=1e-5, rtol=1e-4)


def test_the_generator_makes_16x16_images_that_depend_on_the_latent_and_every_parameter():
    G = MicroGenerator(img_channels=1, channels=4)
    img = G(torch.randn([2, 512]))
    assert img.shape == (2, 1, 16, 16) and img.abs().max() < 1
    assert not torch.equal(img[0], img[1])
    img.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in G.parameters())


def test_its_parts_are_those_that_a_loss_calls():
    G, z = MicroGenerator(channels=4), torch.randn([2, 512])
    ws = G.mapping(z, torch.zeros([2, 0]), skip_w_avg_update=True)
    assert ws.shape == (2, G.num_ws, G.w_dim)
    torch.testing.assert_close(G.synthesis(ws), G(z))
