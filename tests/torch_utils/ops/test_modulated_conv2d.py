# SPDX-License-Identifier: Apache-2.0
"""Modulated convolution: its two forms, the whole layer, overflow in float16, memory of the training form."""
import pytest
import torch

from torch_utils.ops import bias_act, modulated_conv2d, upfirdn2d


def arguments(dtype=torch.float64, up=1, n=3):
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    return {
        'x': torch.randn(n, 4, 5, 6).to(dtype), 'weight': torch.randn(2, 4, 3, 3).to(dtype),
        'styles': torch.randn(n, 4).to(dtype), 'up': up, 'padding': 1, 'resample_filter': f,
        'flip_weight': up == 1,
    }


@pytest.mark.parametrize('up', [1, 2])
@pytest.mark.parametrize('demodulate', [True, False])
def test_scaling_activations_or_weights_gives_the_same_numbers_and_gradients(up, demodulate):
    kwargs = arguments(up=up)
    inputs = [kwargs[k].requires_grad_() for k in ('x', 'weight', 'styles')]
    results = []
    for fused in (True, False):
        y = modulated_conv2d.modulated_conv2d(**kwargs, demodulate=demodulate, fused_modconv=fused)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for fused, unfused in zip(*results, strict=True):
        torch.testing.assert_close(fused, unfused)


def test_the_layer_is_convolution_then_noise_then_bias_and_activation():
    kwargs = arguments(up=2)
    noise, bias = torch.randn(3, 1, 10, 12).double(), torch.randn(2).double()
    for act in ('lrelu', 'swish'):
        y = modulated_conv2d.modulated_conv2d(**kwargs, noise=noise, fused_modconv=False)
        expected = bias_act.bias_act(y, bias, act=act, gain=0.5, clamp=0.4)
        epilogue = modulated_conv2d.Epilogue(act, bias_act.activation_funcs[act].def_alpha, 0.5, 0.4)
        layer = {k: kwargs[k] for k in ('x', 'weight', 'styles', 'up', 'padding', 'flip_weight')}
        actual = modulated_conv2d.modulated_layer(
            **layer, noise=noise, bias=bias, epilogue=epilogue, f=kwargs['resample_filter'])
        torch.testing.assert_close(actual, expected)


def test_large_float16_styles_do_not_overflow():
    kwargs = arguments(torch.float32)
    exact = modulated_conv2d.modulated_conv2d(**kwargs)
    kwargs = {**kwargs, 'x': kwargs['x'].half(), 'styles': kwargs['styles'] * 1e6}
    for fused in (True, False):
        y = modulated_conv2d.modulated_conv2d(**kwargs, fused_modconv=fused)
        torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)


def test_the_training_form_keeps_no_weight_per_sample():
    kwargs = arguments(torch.float32, n=16)
    per_sample = 16 * kwargs['weight'].numel()
    kwargs['weight'].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        modulated_conv2d.modulated_conv2d(**kwargs, fused_modconv=False)
    activations = kwargs['x'].numel()
    assert per_sample not in saved and max(saved) <= activations


def test_wrong_styles_are_named():
    with pytest.raises(ValueError, match=r'styles must be \[N, I\] = \[3, 4\], not \[3, 5\]'):
        modulated_conv2d.modulated_conv2d(torch.zeros(3, 4, 2, 2), torch.zeros(2, 4, 1, 1), torch.zeros(3, 5))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_the_product_for_few_channels_is_the_convolution_with_its_gradients(layout):
    x = torch.randn(3, 4, 5, 6).double().contiguous(memory_format=layout)
    weight, styles, bias = (torch.randn(s).double() for s in [(2, 4, 1, 1), (3, 4), (2,)])
    inputs = [t.requires_grad_() for t in (x, weight, styles, bias)]
    y = modulated_conv2d.modulated_conv2d(x, weight, styles, demodulate=False, fused_modconv=False)
    expected = bias_act.bias_act(y, bias, clamp=0.7)
    actual = modulated_conv2d.modulated_product(x, weight, styles, bias, 0.7)
    for a, b in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def gradients(y, inputs):
    """y, its gradients, and those of a path length that is made of them."""
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return [y, *first, *[g for g in second if g is not None]]


def test_wrong_styles_of_a_product_are_named():
    with pytest.raises(ValueError, match=r'styles must be \[N, I\] = \[3, 4\], not \[3, 5\]'):
        modulated_conv2d.modulated_product(
            torch.zeros(3, 4, 2, 2), torch.zeros(2, 4, 1, 1), torch.zeros(3, 5), torch.zeros(2), None)
