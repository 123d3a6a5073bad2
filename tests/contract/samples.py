# SPDX-License-Identifier: Apache-2.0
"""One table per operator: arguments that the contract (test_op_contract.py) runs every operator through.

A sample is (name, arguments); arguments are made by a function of (dtype, device), so that each test has its
own.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_utils.ops import bias_act, modulated_conv2d, upfirdn2d
from torch_utils.ops._registry import Op


@dataclass(frozen=True)
class Sample:
    name: str
    op: Op
    make: Callable[[torch.dtype, torch.device], tuple]


def randn(*shape, dtype, device, layout=torch.contiguous_format):
    x = torch.randn(*shape, dtype=torch.float64).to(dtype=dtype, device=device)
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x


def _upfirdn2d(f, up=(1, 1), down=(1, 1), padding=(0, 0, 0, 0), flip=False, gain=1.0, shape=(2, 3, 5, 4),
               layout=torch.contiguous_format):
    def make(dtype, device):
        x = randn(*shape, dtype=dtype, device=device, layout=layout)
        taps = None if f is None else torch.tensor(f, dtype=torch.float32, device=device)
        return x, taps, list(up), list(down), list(padding), flip, gain
    return make


FILTER_2D = [[1.0, 2.0, -1.0], [0.5, 1.0, 3.0]]
FILTER_1D = [1.0, 3.0, -2.0, 1.0]
UPFIRDN2D = {
    'odd_filter': _upfirdn2d(FILTER_2D, padding=(1, 1, 0, 1)),
    'flipped_gain': _upfirdn2d(FILTER_2D, flip=True, gain=-1.5),
    'up': _upfirdn2d(FILTER_2D, up=(2, 3), padding=(2, 1, 0, 3)),
    'down': _upfirdn2d(FILTER_2D, down=(2, 1), padding=(1, 1, 1, 1)),
    'up_and_down': _upfirdn2d(FILTER_2D, up=(3, 2), down=(2, 3), padding=(3, 2, 1, 4)),
    'crop': _upfirdn2d(FILTER_2D, up=(2, 2), padding=(-1, -2, 1, -3)),
    'separable': _upfirdn2d(FILTER_1D, up=(2, 1), down=(1, 2), padding=(3, 0, 2, 2)),
    'channels_last': _upfirdn2d(FILTER_2D, up=(2, 2), padding=(1, 1, 1, 1), layout=torch.channels_last),
    'channels_last_symmetric': _upfirdn2d(FILTER_2D, padding=(1, 1, 1, 1), layout=torch.channels_last),
    'one_pixel': _upfirdn2d(FILTER_2D, padding=(1, 1, 1, 0), shape=(1, 1, 1, 1)),
}


def _bias_act(act, shape=(3, 2, 2, 4), dim=1, bias=True, gain=1.25, clamp=-1.0, alpha=0.0):
    def make(dtype, device):
        x = randn(*shape, dtype=dtype, device=device)
        smooth = bias_act.activation_funcs[act].slope is not None
        b = randn(shape[dim], dtype=dtype, device=device) if bias and not smooth else None
        return x, b, dim, act, alpha, gain, clamp
    return make


BIAS_ACT = {
    **{act: _bias_act(act) for act in bias_act.activation_funcs},
    **{f'{act}_clamped': _bias_act(act, clamp=0.5) for act in ['linear', 'lrelu', 'swish', 'selu']},
    'lrelu_slope': _bias_act('lrelu', alpha=0.3),
    'lrelu_negative_gain': _bias_act('lrelu', alpha=0.3, gain=-0.7),
    'last_dim': _bias_act('lrelu', shape=(2, 3, 5), dim=2, alpha=0.2),
    'no_bias': _bias_act('relu', bias=False),
}


def _epilogue(noise_shape, clamp=-1.0, layout=torch.contiguous_format):
    def make(dtype, device):
        shape = (3, 2, 4, 5)
        x = randn(*shape, dtype=dtype, device=device, layout=layout)
        d = randn(*shape[:2], dtype=dtype, device=device)
        noise = None if noise_shape is None else randn(*noise_shape, dtype=dtype, device=device)
        return x, d, noise, randn(shape[1], dtype=dtype, device=device), 'lrelu', 0.2, 1.25, clamp
    return make


EPILOGUE = {
    'no_noise': _epilogue(None),
    'noise_per_sample': _epilogue((3, 1, 4, 5)),
    'noise_map_clamped': _epilogue((4, 5), clamp=0.8),
    'channels_last': _epilogue((3, 1, 4, 5), layout=torch.channels_last),
}


def _act_grad(act, clamp=-1.0):
    def make(dtype, device):
        return (randn(3, 2, 5, dtype=dtype, device=device), randn(3, 2, 5, dtype=dtype, device=device),
                act, 0.2, 1.25, clamp)
    return make


SAMPLES = [
    *[Sample(f'upfirdn2d-{k}', upfirdn2d._upfirdn2d, v) for k, v in UPFIRDN2D.items()],
    *[Sample(f'bias_act-{k}', bias_act._bias_act, v) for k, v in BIAS_ACT.items()],
    *[Sample(f'bias_act_grad-{act}', bias_act.act_grad, _act_grad(act)) for act in bias_act.activation_funcs],
    *[Sample(f'modulated_epilogue-{k}', modulated_conv2d._epilogue, v) for k, v in EPILOGUE.items()],
]
