# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain, clamp."""
import torch

import dnnlib


def _record(func, gain, alpha=None):
    return dnnlib.EasyDict(func=func, def_gain=gain, def_alpha=alpha)


activation_funcs = {
    'linear': _record(lambda x, **_: x, 1),
    'relu': _record(lambda x, **_: x.relu(), 2 ** 0.5),
    'lrelu': _record(lambda x, alpha, **_: torch.nn.functional.leaky_relu(x, alpha), 2 ** 0.5, 0.2),
    'sigmoid': _record(lambda x, **_: x.sigmoid(), 1),
    'swish': _record(lambda x, **_: x.sigmoid() * x, 2 ** 0.5),
}


def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='cuda'):
    """x of any shape; b along one dimension of it."""
    assert clamp is None or clamp >= 0
    spec = activation_funcs[act]
    if b is not None:
        assert b.ndim == 1 and b.shape[0] == x.shape[dim] and b.dtype == x.dtype
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = spec.func(x, alpha=float(spec.def_alpha or 0) if alpha is None else alpha)
    x = x * float(spec.def_gain if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)
