# SPDX-License-Identifier: Apache-2.0
"""The same networks done the straightforward way, to measure against; used by the benchmarks only.

Zero-stuffing and depthwise convolutions differentiated by autograd, per-sample modulated weights with a
grouped convolution, bias, activation and gain as separate operations, NCHW everywhere, unfused optimizer.
"""
import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from torch_utils.ops import bias_act as bias_act_module
from torch_utils.ops import conv2d_resample, modulated_conv2d, upfirdn2d
from training import networks, phases


def plain_upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='ref'):
    """Zero-stuff, pad, filter with autograd's own gradient, take every down-th sample."""
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = upfirdn2d._pair(up, 'up'), upfirdn2d._pair(down, 'down'), \
        upfirdn2d.parse_padding(padding)
    f = torch.ones([1, 1]) if f is None else f
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, ux - 1, 0, 0, 0, uy - 1]).reshape(n, c, h * uy, w * ux)
    x = F.pad(x, [x0, x1, y0, y1])
    f = (f * gain ** (f.ndim / 2)).to(x)
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    for taps in [f] if f.ndim == 2 else [f[None, :], f[:, None]]:
        x = F.conv2d(x, taps.expand(c, 1, *taps.shape), groups=c)
    return x[:, :, ::dy, ::dx]


def plain_bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='ref'):
    """One torch operation per stage."""
    spec = bias_act_module.activation_funcs[act]
    x = x if b is None else x + bias_act_module.bias_shaped(b, x.ndim, dim)
    x = spec.func(x, spec.def_alpha if alpha is None else alpha) * (spec.def_gain if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)


def plain_modulated_conv2d(  # noqa: PLR0913
    x, weight, styles, noise=None, up=1, down=1, padding=0, resample_filter=None, demodulate=True,
    flip_weight=True, fused_modconv=True,
):
    """Per-sample weights, demodulated by their own norms, and one grouped convolution."""
    n, _, h, w = x.shape
    per_sample = weight * styles[:, None, :, None, None]
    if demodulate:
        per_sample = per_sample * (per_sample.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    y = conv2d_resample.conv2d_resample(
        x.reshape(1, -1, h, w), per_sample.flatten(0, 1), resample_filter, up=up, down=down, padding=padding,
        groups=n,
        flip_weight=flip_weight)
    y = y.reshape(n, -1, *y.shape[2:])
    return y if noise is None else y + noise


def plain_modulated_product(x, weight, styles, bias, clamp, fused_modconv=False):
    """As any other modulated convolution."""
    y = plain_modulated_conv2d(x, weight, styles, demodulate=False, padding=weight.shape[2] // 2)
    return plain_bias_act(y, bias, clamp=clamp)


def plain_linear(layer, x):
    """Scaled copies of weight and bias, then a linear layer."""
    bias = None if layer.bias is None else layer.bias * layer.bias_gain
    return plain_bias_act(F.linear(x, layer.weight * layer.weight_gain, bias), act=layer.activation)


def plain_adam(parameters, lr, betas, eps, interval):
    """lazy_adam() without the fused kernel."""
    opt = phases.lazy_adam(parameters, lr, betas, eps, interval)
    group = opt.param_groups[0]
    return torch.optim.Adam(parameters, lr=group['lr'], betas=group['betas'], eps=eps)


@contextlib.contextmanager
def straightforward() -> Iterator[None]:
    """Within this context, networks compute and train the straightforward way."""
    replacements = [
        (upfirdn2d, 'upfirdn2d', plain_upfirdn2d), (conv2d_resample, 'upfirdn2d', plain_upfirdn2d),
        (networks, 'bias_act', plain_bias_act),
        (modulated_conv2d, 'modulated_conv2d', plain_modulated_conv2d),
        (modulated_conv2d, 'modulated_product', plain_modulated_product),
        (networks, '_compute_format',
         lambda block, device, force_fp32: (torch.float32, torch.contiguous_format)),
        (networks.SynthesisBlock, '_prefers_fused', lambda self, ws: True),
        (networks.FullyConnectedLayer, 'forward', plain_linear),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
