# SPDX-License-Identifier: Apache-2.0
"""One table per operator: arguments that the contract (test_op_contract.py) runs every operator through.

A sample is (name, arguments); arguments are made by a function of (dtype, device), so that each test has its
own. has_kernel: whether the operator's kernel, if there is one, computes it.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_utils.ops import (
    activated,
    bias_act,
    epilogue,
    modulated_conv2d,
    pixel_product,
    scaled_cast,
    upfirdn2d,
    warp,
)
from torch_utils.ops._registry import Op


@dataclass(frozen=True)
class Sample:
    name: str
    op: Op
    make: Callable[[torch.dtype, torch.device], tuple]
    has_kernel: bool = True


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


def _upfirdn2d_plus(*spec, **more):
    def make(dtype, device):
        args = _upfirdn2d(*spec, **more)(dtype, device)
        return *args, torch.randn_like(upfirdn2d._upfirdn2d.reference(*args))
    return make


UPFIRDN2D_PLUS = {
    'up': _upfirdn2d_plus(FILTER_2D, up=(2, 2), padding=(2, 1, 0, 3)),
    'up_and_down': _upfirdn2d_plus(FILTER_2D, up=(3, 2), down=(2, 3), padding=(3, 2, 1, 4)),
    'separable': _upfirdn2d_plus(FILTER_1D, up=(2, 1), down=(1, 2), padding=(3, 0, 2, 2)),
    'channels_last': _upfirdn2d_plus(
        FILTER_2D, up=(2, 2), padding=(1, 1, 1, 1), layout=torch.channels_last),
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


ACT_SPEC = ('lrelu', 0.2, 1.25, 0.8)


def _bias_act_plus(act, alpha, clamp, layout=torch.contiguous_format):
    def make(dtype, device):
        x, r = (randn(3, 2, 4, 5, dtype=dtype, device=device, layout=layout) for _ in range(2))
        return x, randn(2, dtype=dtype, device=device), r, act, alpha, 1.25, clamp
    return make


def _input_grad(wants_db, layout=torch.contiguous_format):
    def make(dtype, device):
        dy, x = (randn(3, 2, 4, 5, dtype=dtype, device=device, layout=layout) for _ in range(2))
        return dy, x, randn(2, dtype=dtype, device=device), wants_db, *ACT_SPEC
    return make


def _activated_filter(act, layout=torch.contiguous_format, flip=False):
    def make(dtype, device):
        x = randn(2, 2, 5, 6, dtype=dtype, device=device, layout=layout)
        taps = torch.tensor(FILTER_2D, dtype=torch.float32, device=device)
        b = randn(2, dtype=dtype, device=device)
        return x, taps, [1, 1, 2, 1], flip, b, act, 0.2 if act == 'lrelu' else 0.0, 1.25, 0.8
    return make


def _filtered_grad(*more, layout=torch.contiguous_format):
    """more: functions of (dtype, device) or arguments, after x."""
    def make(dtype, device):
        dy = randn(2, 2, 7, 6, dtype=dtype, device=device, layout=layout)
        x = randn(2, 2, 5, 6, dtype=dtype, device=device, layout=layout)
        taps = torch.tensor(FILTER_2D, dtype=torch.float32, device=device)
        rest = [randn(*m, dtype=dtype, device=device) if isinstance(m, tuple) else m for m in more]
        before = [rest.pop(0)] if isinstance(rest[0], float) else []
        return dy, taps, [1, 1, 0, -1], False, *before, x, *rest
    return make


BIAS_ACT_PLUS = {
    'lrelu': _bias_act_plus('lrelu', 0.2, 0.8), 'linear': _bias_act_plus('linear', 0.0, -1.0),
    'channels_last': _bias_act_plus('lrelu', 0.2, 0.8, torch.channels_last)}
INPUT_GRAD = {
    'both': _input_grad(True), 'only_image': _input_grad(False),
    'channels_last': _input_grad(True, torch.channels_last)}
ACTIVATED_FILTER = {
    'nchw': _activated_filter('lrelu'), 'nhwc': _activated_filter('lrelu', torch.channels_last),
    'flipped': _activated_filter('relu', torch.channels_last, flip=True)}
FILTERED_INPUT_GRAD = {
    'nchw': _filtered_grad((2,), True, *ACT_SPEC),
    'nhwc': _filtered_grad((2,), True, *ACT_SPEC, layout=torch.channels_last),
    'only_image': _filtered_grad((2,), False, *ACT_SPEC, layout=torch.channels_last)}
FILTERED_SCALE_GRAD = {
    'nchw': _filtered_grad(2.0, (2, 2)), 'nhwc': _filtered_grad(2.0, (2, 2), layout=torch.channels_last)}


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


def _epilogue_grad(noise_shape, wants=(True, True, True, True), bare=False, layout=torch.contiguous_format):
    def make(dtype, device):
        shape = (3, 2, 4, 5)
        dy, x, y = (randn(*shape, dtype=dtype, device=device, layout=layout) for _ in range(3))
        d = randn(*shape[:2], dtype=dtype, device=device)
        return (dy, None if bare else x, y, None if bare else d, list(noise_shape), list(wants), 'lrelu', 0.2,
                1.25, 0.8)
    return make


EPILOGUE_GRAD = {
    'all': _epilogue_grad((3, 1, 4, 5)),
    'shared_noise': _epilogue_grad((4, 5)),
    'only_image': _epilogue_grad((), (True, False, False, False)),
    'only_sums': _epilogue_grad((3, 1, 4, 5), (False, True, True, True)),
    'without_scale': _epilogue_grad((3, 1, 4, 5), (True, False, True, True), bare=True),
    'channels_last': _epilogue_grad((3, 1, 4, 5), layout=torch.channels_last),
}


def _filtered_epilogue(noise_shape, f, layout=torch.contiguous_format):
    def make(dtype, device):
        x = randn(2, 2, 5, 6, dtype=dtype, device=device, layout=layout)
        taps = torch.tensor(f, dtype=torch.float32, device=device)
        d = randn(2, 2, dtype=dtype, device=device)
        noise = None if noise_shape is None else randn(*noise_shape, dtype=dtype, device=device)
        height = 5 + 3 - taps.shape[0] + 1
        assert noise is None or noise.shape[-2] == height
        return (x, taps, [1, 1, 2, 1], False, 2.0, d, noise, randn(2, dtype=dtype, device=device), 'lrelu',
                0.2, 1.25, 1.5)
    return make


FILTERED = {
    'no_noise': _filtered_epilogue(None, FILTER_2D),
    'noise': _filtered_epilogue((2, 1, 7, 6), FILTER_2D),
    'channels_last': _filtered_epilogue((7, 6), FILTER_2D, torch.channels_last),
}


def _scaled_filtered_epilogue(noise_shape, layout=torch.contiguous_format):
    def make(dtype, device):
        *before, act, alpha, gain, clamp = _filtered_epilogue(noise_shape, FILTER_2D, layout)(dtype, device)
        return *before, randn(2, 2, dtype=dtype, device=device), True, act, alpha, gain, clamp
    return make


def _scaled_epilogue_grad(noise_shape, wants=(True, True, True, True), has_dy=True,
                          layout=torch.contiguous_format):
    def make(dtype, device):
        dscaled, dy, y = (randn(3, 2, 4, 5, dtype=dtype, device=device, layout=layout) for _ in range(3))
        s = randn(3, 2, dtype=dtype, device=device)
        return dscaled, dy if has_dy else None, y, s, list(noise_shape), list(wants), 'lrelu', 0.2, 1.25, 0.8
    return make


SCALED_FILTERED = {
    'no_noise': _scaled_filtered_epilogue(None),
    'noise': _scaled_filtered_epilogue((2, 1, 7, 6)),
    'channels_last': _scaled_filtered_epilogue((7, 6), torch.channels_last),
}
SCALED_GRAD = {
    'all': _scaled_epilogue_grad((3, 1, 4, 5)),
    'shared_noise': _scaled_epilogue_grad((4, 5), has_dy=False),
    'only_image': _scaled_epilogue_grad((), (True, False, False, False)),
    'only_sums': _scaled_epilogue_grad((3, 1, 4, 5), (False, True, True, True)),
    'channels_last': _scaled_epilogue_grad((3, 1, 4, 5), layout=torch.channels_last),
}


def _tensors(*shapes, after=()):
    def make(dtype, device):
        return (*[randn(*shape, dtype=dtype, device=device) for shape in shapes], *after)
    return make


def _modulated_weight(has_d):
    def make(dtype, device):
        weight, styles, d = (randn(*s, dtype=dtype, device=device) for s in [(2, 3, 3, 3), (4, 3), (4, 2)])
        return weight, styles, d if has_d else None, dtype
    return make


def _scaled_cast(layout=torch.contiguous_format):
    def make(dtype, device):
        return randn(3, 2, 3, 3, dtype=dtype, device=device, layout=layout), 0.3, dtype
    return make


def _modulation(normalise, layout=torch.contiguous_format):
    """Differentiable in the ordinary sense only without normalising, whose factors count as constants."""
    def make(dtype, device):
        weight = randn(2, 3, 3, 3, dtype=dtype, device=device, layout=layout)
        return weight, randn(4, 3, dtype=dtype, device=device), 1e-8, normalise, dtype
    return make


def _modulation_grad(has_factors, given=(True, True, True, True), wants=(True, True),
                     layout=torch.contiguous_format):
    """given: the gradients of scaled weight, scaled styles, d and energy."""
    def make(dtype, device):
        own = [randn(*shape, dtype=dtype, device=device, layout=layout)
               for shape in [(2, 3, 3, 3), (4, 3), (4, 2), (2, 3)]]
        own += [torch.rand(length if has_factors else 0, device=device) for length in (2, 4)]  # constants
        grads = [randn(*shape, dtype=dtype, device=device, layout=layout) if wanted else None
                 for shape, wanted in zip([(2, 3, 3, 3), (4, 3), (4, 2), (2, 3)], given, strict=True)]
        return *own, *grads, list(wants)
    return make


MODULATION_GRAD = {
    'all': _modulation_grad(True),
    'channels_last': _modulation_grad(True, layout=torch.channels_last),
    'of_d': _modulation_grad(False, (False, False, True, False)),
    'of_scaled': _modulation_grad(True, (True, True, False, False)),
    'only_weight': _modulation_grad(True, (True, True, True, False), (True, False)),
    'only_styles': _modulation_grad(True, (True, True, True, False), (False, True)),
}


def _act_grad(act, clamp=-1.0):
    def make(dtype, device):
        return (randn(3, 2, 5, dtype=dtype, device=device), randn(3, 2, 5, dtype=dtype, device=device),
                act, 0.2, 1.25, clamp)
    return make


def _act_grad_both(act, clamp=-1.0, layout=torch.contiguous_format):
    def make(dtype, device):
        dy, y = (randn(3, 2, 4, 5, dtype=dtype, device=device, layout=layout) for _ in range(2))
        return dy, y, act, 0.2, 1.25, clamp
    return make


ACT_GRAD_BOTH = {
    'linear_clamped': _act_grad_both('linear', clamp=0.7),
    'relu': _act_grad_both('relu'),
    'lrelu': _act_grad_both('lrelu', clamp=0.7),
    'channels_last': _act_grad_both('lrelu', layout=torch.channels_last),
}


def _pixel_product(layout, channels_last, bias=True):
    def make(dtype, device):
        x = randn(3, 4, 2, 5, dtype=dtype, device=device, layout=layout)
        w, b = (randn(*shape, dtype=dtype, device=device) for shape in [(3, 2, 4), (2,)])
        return x, w, b if bias else None, channels_last
    return make


def _pixel_outer(out_channels, in_channels):
    def make(dtype, device):
        return tuple(randn(2, c, 3, 5, dtype=dtype, device=device, layout=torch.channels_last)
                     for c in (out_channels, in_channels))
    return make


PIXEL_PRODUCT = {
    'nchw': _pixel_product(torch.contiguous_format, False),
    'nhwc': _pixel_product(torch.channels_last, True),
    'nhwc_to_nchw': _pixel_product(torch.channels_last, False, bias=False),
    'nchw_to_nhwc': _pixel_product(torch.contiguous_format, True, bias=False),
}


def _pixel_layer(layout, channels_last, act='lrelu', in_channels=3, out_channels=4):
    def make(dtype, device):
        x = randn(3, in_channels, 2, 5, dtype=dtype, device=device, layout=layout)
        w, b = (randn(*shape, dtype=dtype, device=device)
                for shape in [(3, out_channels, in_channels), (out_channels,)])
        return x, w, b, channels_last, act, 0.2, 1.25, 1.5
    return make


def _pixel_layer_grad(layout, wants=(True, True, True), out_channels=4):
    def make(dtype, device):
        dy, y = (randn(3, out_channels, 2, 5, dtype=dtype, device=device, layout=layout) for _ in range(2))
        x, w = (randn(*shape, dtype=dtype, device=device) for shape in [(3, 3, 2, 5), (3, out_channels, 3)])
        return dy, y, x, w, list(wants), 'lrelu', 0.2, 1.25, 0.8
    return make


PIXEL_LAYER_GRAD = {
    'nchw': _pixel_layer_grad(torch.contiguous_format),
    'nhwc': _pixel_layer_grad(torch.channels_last),
    'only_image': _pixel_layer_grad(torch.channels_last, (True, False, False)),
    'only_weight': _pixel_layer_grad(torch.channels_last, (False, True, False)),
    'only_sums': _pixel_layer_grad(torch.channels_last, (False, True, True), out_channels=40),
}
PIXEL_LAYER = {
    'nchw': _pixel_layer(torch.contiguous_format, False),
    'nhwc': _pixel_layer(torch.channels_last, True),
    'nchw_to_nhwc': _pixel_layer(torch.contiguous_format, True, 'relu'),
    'nhwc_to_nchw': _pixel_layer(torch.channels_last, False, 'linear', 4, 3),
}


# Turned, mirrored and shrunk, so that margins, corners outside of them and the image itself take part.
MATRICES = [[[0.6, -0.3, 0.1], [0.2, 0.5, -0.2], [0, 0, 1]], [[-1.1, 0, 0.3], [0, 0.7, 0.4], [0, 0, 1]]]


def _warp(in_size, size, margins, taps=12, is_adjoint=False):
    def make(dtype, device):
        x = randn(2, 3, *(size if is_adjoint else in_size), dtype=dtype, device=device)
        f = torch.linspace(-0.3, 1.0, taps, dtype=torch.float32, device=device)
        matrix = torch.tensor(MATRICES, dtype=torch.float32, device=device)
        return x, f, matrix, list(in_size if is_adjoint else size), list(margins)
    return make


WARP = {
    'margins': ((5, 4), (7, 6), (3, 2, 1, 4)),
    'no_margins': ((3, 6), (5, 9), (0, 0, 0, 0)),
    'one_pixel': ((1, 1), (4, 3), (0, 0, 0, 0)),
}


IMAGE, COLUMNS = (3, 2, 4, 5), (3, 2)
SMOOTH = [act for act, spec in bias_act.activation_funcs.items() if spec.curvature is not None]
SAMPLES = [
    *[Sample(f'upfirdn2d-{k}', upfirdn2d._upfirdn2d, v) for k, v in UPFIRDN2D.items()],
    *[Sample(f'upfirdn2d_plus-{k}', upfirdn2d._upfirdn2d_plus, v) for k, v in UPFIRDN2D_PLUS.items()],
    *[Sample(f'bias_act-{k}', bias_act._bias_act, v) for k, v in BIAS_ACT.items()],
    *[Sample(f'bias_act_grad-{act}', bias_act.act_grad, _act_grad(act)) for act in bias_act.activation_funcs],
    Sample('bias_act_grad-clamped', bias_act.act_grad, _act_grad('lrelu', clamp=0.7)),
    *[Sample(f'bias_act_grad_both-{k}', bias_act.act_grad_both, v) for k, v in ACT_GRAD_BOTH.items()],
    *[Sample(f'bias_act_curvature-{act}', bias_act.act_curvature,
             _tensors((2, 3), (2, 3), (2, 3), after=(act, 1.25, 0.4 if act == 'swish' else -1.0)))
      for act in SMOOTH],
    *[Sample(f'bias_act_plus-{k}', activated.bias_act_plus, v) for k, v in BIAS_ACT_PLUS.items()],
    *[Sample(f'bias_act_input_grad-{k}', activated.input_grad, v) for k, v in INPUT_GRAD.items()],
    *[Sample(f'activated_filter-{k}', activated.activated_filter, v) for k, v in ACTIVATED_FILTER.items()],
    *[Sample(f'filtered_input_grad-{k}', activated.filtered_input_grad, v)
      for k, v in FILTERED_INPUT_GRAD.items()],
    *[Sample(f'filtered_scale_grad-{k}', epilogue.filtered_scale_grad, v)
      for k, v in FILTERED_SCALE_GRAD.items()],
    *[Sample(f'modulated_epilogue-{k}', epilogue.epilogue, v) for k, v in EPILOGUE.items()],
    *[Sample(f'modulated_epilogue_grad-{k}', epilogue.epilogue_grad, v) for k, v in EPILOGUE_GRAD.items()],
    *[Sample(f'filtered_epilogue-{k}', epilogue.filtered_epilogue, v) for k, v in FILTERED.items()],
    Sample('scaled_cast', scaled_cast._scaled_cast, _scaled_cast()),
    Sample('scaled_cast-channels_last', scaled_cast._scaled_cast, _scaled_cast(torch.channels_last)),
    *[Sample(f'scaled_filtered_epilogue-{k}', epilogue.scaled_filtered_epilogue, v)
      for k, v in SCALED_FILTERED.items()],
    *[Sample(f'scaled_epilogue_grad-{k}', epilogue.scaled_epilogue_grad, v) for k, v in SCALED_GRAD.items()],
    *[Sample(f'warp-{k}', warp.warp, _warp(*v)) for k, v in WARP.items()],
    *[Sample(f'warp_adjoint-{k}', warp.warp_adjoint, _warp(*v, is_adjoint=True)) for k, v in WARP.items()],
    Sample('scale_channels', epilogue.scale_channels, _tensors(IMAGE, COLUMNS)),
    Sample('scale_channels_grad', epilogue.scale_channels_grad, _tensors(IMAGE, IMAGE, COLUMNS)),
    *[Sample(f'pixel_product-{k}', pixel_product.pixel_product, v, has_kernel=k != 'nchw')
      for k, v in PIXEL_PRODUCT.items()],
    *[Sample(f'pixel_layer-{k}', pixel_product.pixel_layer, v, has_kernel=k != 'nchw')
      for k, v in PIXEL_LAYER.items()],
    *[Sample(f'pixel_layer_grad-{k}', pixel_product.pixel_layer_grad, v, has_kernel=k != 'nchw')
      for k, v in PIXEL_LAYER_GRAD.items()],
    Sample('pixel_outer-nchw', pixel_product.pixel_outer, _tensors((3, 2, 4, 5), (3, 4, 4, 5)),
           has_kernel=False),
    Sample('pixel_outer-nhwc', pixel_product.pixel_outer, _pixel_outer(2, 4)),
    Sample('pixel_outer-of_few', pixel_product.pixel_outer, _pixel_outer(9, 3)),
    Sample('demodulation', modulated_conv2d._demodulation, _tensors((2, 3, 3, 3), (4, 3), after=(1e-8,))),
    Sample('modulation', modulated_conv2d._modulation, _modulation(False)),
    Sample('modulation-channels_last', modulated_conv2d._modulation, _modulation(False, torch.channels_last)),
    *[Sample(f'modulation_grad-{k}', modulated_conv2d._modulation_grad, v)
      for k, v in MODULATION_GRAD.items()],
    Sample('modulated_weight', modulated_conv2d._modulated_weight, _modulated_weight(True)),
    Sample('modulated_weight-no_d', modulated_conv2d._modulated_weight, _modulated_weight(False)),
]
