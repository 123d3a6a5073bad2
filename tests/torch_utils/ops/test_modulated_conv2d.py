# SPDX-License-Identifier: Apache-2.0
"""Modulated convolution: its two forms, the whole layer, overflow in float16, memory of the training form."""
import contextlib

import pytest
import torch

from torch_utils.ops import bias_act, conv2d_gradfix, modulated_conv2d, upfirdn2d


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


@pytest.mark.parametrize('act', ['lrelu', 'swish'])
@pytest.mark.parametrize('up', [1, 2])
@pytest.mark.parametrize('is_scaled', [True, False])
def test_the_layer_is_convolution_then_noise_then_bias_and_activation(act, up, is_scaled):
    kwargs = arguments(up=up)
    noise, bias = torch.randn(3, 1, 5 * up, 6 * up).double(), torch.randn(2).double()
    next_scale = torch.randn(3, 2).double() if is_scaled else None
    inputs = [kwargs['x'], kwargs['weight'], kwargs['styles'], bias, *([next_scale] if is_scaled else [])]
    inputs = [t.requires_grad_() for t in inputs]
    y = modulated_conv2d.modulated_conv2d(**kwargs, noise=noise, fused_modconv=False)
    expected = bias_act.bias_act(y, bias, act=act, gain=0.5, clamp=0.4)
    expected = expected * next_scale[:, :, None, None] if is_scaled else expected
    epilogue = modulated_conv2d.Epilogue(act, bias_act.activation_funcs[act].def_alpha, 0.5, 0.4)
    how = {k: kwargs[k] for k in ('up', 'padding', 'flip_weight')}

    def layer():
        modulation = modulated_conv2d.modulate(kwargs['weight'], kwargs['styles'], torch.float64)
        return modulated_conv2d.finished_convolution(
            kwargs['x'], modulation, noise, bias, epilogue, next_scale, f=kwargs['resample_filter'], **how)
    for one, other in zip(gradients(layer(), inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(layer(), expected)


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
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_the_product_for_few_channels_is_the_convolution_with_its_gradients(layout, kernel_size):
    x = torch.randn(3, 4, 5, 6).double().contiguous(memory_format=layout)
    weight, styles, bias = (torch.randn(s).double() for s in [(2, 4, *[kernel_size] * 2), (3, 4), (2,)])
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


def normalised_layer(weight, styles, x, eps, is_constant):
    """(layer with weights and styles normalised, its demodulation coefficients); float64."""
    a, b = 1 / (weight.abs().amax([1, 2, 3]) * weight[0].numel() ** 0.5), 1 / styles.abs().amax(1)
    if is_constant:
        weight, styles, d, *_ = modulated_conv2d._modulation(weight, styles, eps, True, torch.float64)
    else:
        weight, styles = weight * a[:, None, None, None], styles * b[:, None]
        d, _ = modulated_conv2d._demodulation(weight, styles, eps)
    y = torch.nn.functional.conv2d(x * styles[:, :, None, None], weight)
    return y * d[:, :, None, None], d


@pytest.mark.parametrize('eps', [modulated_conv2d.DEMODULATION_EPS, 1e-2])
def test_gradients_with_constant_factors_differ_from_the_published_ones_within_eps(eps):
    # y is proportional to a / sqrt(a^2 q + eps), whose logarithm has the derivative eps * d^2 by log a.
    x, weight, styles = (torch.randn(s).double() for s in [(3, 4, 5, 5), (2, 4, 3, 3), (3, 4)])
    inputs = [weight.requires_grad_(), styles.requires_grad_()]
    published, d = normalised_layer(weight, styles, x, eps, is_constant=False)
    ours, _ = normalised_layer(weight, styles, x, eps, is_constant=True)
    torch.testing.assert_close(ours, published, rtol=1e-6, atol=1e-8)
    flow = (published.cos() * published).detach().abs()  # of the loss to the logarithm of y
    by_factor = eps * (flow.sum([2, 3]) * d.detach().square())
    bounds = [(by_factor.sum(0) / weight.detach().abs().amax([1, 2, 3])).max(),
              (by_factor.sum(1) / styles.detach().abs().amax(1)).max()]
    grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, published)]
    for a, b, bound in zip(*grads, bounds, strict=True):
        assert 0 < (a - b).abs().max() <= bound * 1.001 + 1e-14
        if eps == modulated_conv2d.DEMODULATION_EPS:
            assert bound < 1e-5 * b.abs().max()  # a hundredth of the last place of float16


@pytest.mark.parametrize('normalise', [True, False])
def test_what_layers_of_16_bits_use_has_the_gradients_of_products_with_constants(normalise):
    inputs = [torch.randn(2, 4, 3, 3).double().requires_grad_(), torch.randn(3, 4).double().requires_grad_()]
    a, b = modulated_conv2d._factors(*inputs) if normalise else (torch.ones(2), torch.ones(3))
    scaled = inputs[0] * a[:, None, None, None], inputs[1] * b[:, None]
    expected = [*scaled, modulated_conv2d.demodulation(*scaled)]
    actual = modulated_conv2d._modulation(*inputs, 1e-8, normalise, torch.float64)[:3]
    for one, other in zip(*[gradients(torch.cat([t.sin().flatten() for t in ts]), inputs)
                            for ts in (actual, expected)], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_styles_alone_get_gradients_where_those_of_weights_are_ruled_out(dtype):
    weight, styles = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    outcomes = []
    for rule in (contextlib.nullcontext, conv2d_gradfix.no_weight_gradients):
        made = modulated_conv2d.modulate(weight, styles, dtype)
        with rule():
            to_weight, to_styles = torch.autograd.grad(
                made.d.square().sum(), [weight, styles], create_graph=True, allow_unused=True)
        assert (to_weight is None) == (rule is not contextlib.nullcontext)
        outcomes.append([to_styles, torch.autograd.grad(to_styles.square().sum(), weight)[0]])
    for plain, ruled in zip(*outcomes, strict=True):
        torch.testing.assert_close(ruled, plain)
