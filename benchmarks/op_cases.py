# SPDX-License-Identifier: Apache-2.0
"""The calls of operators that benchmarks/ops.py times: arguments as the layers of the networks have them."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_utils.ops import layers  # noqa: F401 (its import registers all operators)
from torch_utils.ops._registry import OPS, Op
from torch_utils.ops.upfirdn2d import setup_filter

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
LAYOUTS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
LAYER_FILTER = [1, 3, 3, 1]
IMAGE_TAPS, IMAGE_CHANNELS = 12, 3  # of the augmentation, which filters images, not feature maps
ACT = ('lrelu', 0.2, math.sqrt(2))  # act, alpha, gain
CLAMP = 256.0  # of layers in float16
EPS = 1e-8
FEATURES = 512  # channels of the largest weights: [512, 512, 3, 3]
KERNEL_SIZE = 3


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of one call; size: [N, C, H, W] of the larger activation."""

    size: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: torch.memory_format
    device: torch.device

    def features(self, scale=1, extra=0, channels=None):
        """Random [N, C, H / scale + extra, W / scale + extra]."""
        n, c, h, w = self.size
        shape = [n, channels or c, h // scale + extra, w // scale + extra]
        return self.plain(*shape).contiguous(memory_format=self.layout)

    def plain(self, *shape, dtype=None):
        """Random, in the ordinary layout."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def styles(self):
        """[N, C]."""
        return self.plain(*self.size[:2])

    def bias(self):
        """[C]."""
        return self.plain(self.size[1])

    def noise(self):
        """[N, 1, H, W]."""
        return self.plain(self.size[0], 1, *self.size[2:])

    def image(self):
        """[N, 3, H, W] in the ordinary layout, whatever that of the layers is."""
        return self.plain(self.size[0], IMAGE_CHANNELS, *self.size[2:])

    def matrix(self):
        """Modulated weight [N, 3, C] of a layer that makes an image."""
        return self.plain(self.size[0], IMAGE_CHANNELS, self.size[1])

    def is_nhwc(self):
        """Whether results are to be laid out so."""
        return self.layout is torch.channels_last

    def layer_filter(self):
        """float32 [4, 4]."""
        return setup_filter(LAYER_FILTER, device=self.device)

    def image_filter(self):
        """float32 [12]; the speed does not depend on the values."""
        return setup_filter(torch.ones(IMAGE_TAPS), device=self.device)


@dataclass(frozen=True)
class Case:
    """Arguments for one operator. Without has_layout, only the number of samples matters, in fp32.

    makes_features: the result has the layout that is asked for.
    """

    op: Op
    arguments: Callable[[Maker], tuple]
    has_layout: bool = True
    makes_features: bool = True


def _resampling(x, f, up, down, padding):
    return x, f, [up, up], [down, down], list(padding), False, float(up ** 2)


def _weights(m):
    weight = m.plain(FEATURES, FEATURES, KERNEL_SIZE, KERNEL_SIZE, dtype=torch.float32)
    return weight, m.plain(m.size[0], FEATURES, dtype=torch.float32)


def _epilogue_grad(m):
    dy, x, y = m.features(), m.features(), m.features()
    n, _, h, w = m.size
    return dy, x, y, m.styles(), [n, 1, h, w], [True] * 4, *ACT, CLAMP


# What follows a transposed convolution is one pixel larger than the result, and padded by one on all sides.
CASES = {
    'up2 4x4': Case(OPS['upfirdn2d'], lambda m: _resampling(
        m.features(2), m.layer_filter(), 2, 1, [2, 1, 2, 1])),
    'down2 4x4': Case(OPS['upfirdn2d'], lambda m: _resampling(m.features(), m.layer_filter(), 1, 2, [1] * 4)),
    'filter 4x4': Case(OPS['upfirdn2d'], lambda m: _resampling(
        m.features(extra=1), m.layer_filter(), 1, 1, [1] * 4)),
    'up2 12': Case(OPS['upfirdn2d'], lambda m: _resampling(
        m.features(2, channels=IMAGE_CHANNELS), m.image_filter(), 2, 1, [6, 5, 6, 5])),
    'down2 12': Case(OPS['upfirdn2d'], lambda m: _resampling(
        m.features(channels=IMAGE_CHANNELS), m.image_filter(), 1, 2, [5] * 4)),
    'filter 12': Case(OPS['upfirdn2d'], lambda m: _resampling(
        m.features(channels=IMAGE_CHANNELS), m.image_filter(), 1, 1, [6, 5, 6, 5])),
    'bias_act': Case(OPS['bias_act'], lambda m: (m.features(), m.bias(), 1, *ACT, CLAMP)),
    'bias_act_grad': Case(OPS['bias_act_grad'], lambda m: (
        m.features(), m.features(), *ACT, CLAMP)),
    'bias_act_grad_both': Case(OPS['bias_act_grad_both'], lambda m: (
        m.features(), m.features(), *ACT, CLAMP)),
    'bias_act_plus': Case(OPS['bias_act_plus'], lambda m: (
        m.features(), m.bias(), m.features(), *ACT, CLAMP)),
    'bias_act_input_grad': Case(OPS['bias_act_input_grad'], lambda m: (
        m.features(), m.features(), m.bias(), True, *ACT, CLAMP)),
    'activated_filter': Case(OPS['activated_filter'], lambda m: (
        m.features(), m.layer_filter(), [2, 1, 2, 1], False, m.bias(), *ACT, CLAMP)),
    'filtered_input_grad': Case(OPS['filtered_input_grad'], lambda m: (
        m.features(extra=1), m.layer_filter(), [1] * 4, False, m.features(), m.bias(), True, *ACT, CLAMP)),
    'filtered_scale_grad': Case(OPS['filtered_scale_grad'], lambda m: (
        m.features(extra=1), m.layer_filter(), [1] * 4, False, 4.0, m.features(), m.styles())),
    'scale_channels': Case(OPS['scale_channels'], lambda m: (m.features(), m.styles())),
    'scale_channels_grad': Case(OPS['scale_channels_grad'], lambda m: (
        m.features(), m.features(), m.styles())),
    'epilogue': Case(OPS['modulated_epilogue'], lambda m: (
        m.features(), m.styles(), m.noise(), m.bias(), *ACT, CLAMP)),
    'epilogue_grad': Case(OPS['modulated_epilogue_grad'], _epilogue_grad),
    'filtered_epilogue': Case(OPS['filtered_epilogue'], lambda m: (
        m.features(extra=1), m.layer_filter(), [1] * 4, False, 4.0, m.styles(), m.noise(), m.bias(), *ACT,
        CLAMP)),
    # fromrgb with its gradient, torgb with the gradients of its input and its weight.
    'pixel_layer from image': Case(OPS['pixel_layer'], lambda m: (
        m.features(channels=IMAGE_CHANNELS), m.matrix().transpose(1, 2), m.bias(), m.is_nhwc(), *ACT, CLAMP)),
    'pixel_layer_grad': Case(OPS['pixel_layer_grad'], lambda m: (
        m.features(), m.features(), m.features(channels=IMAGE_CHANNELS), m.matrix().transpose(1, 2),
        [True] * 3,
        *ACT, CLAMP)),
    'pixel_layer to image': Case(OPS['pixel_layer'], lambda m: (
        m.features(), m.matrix(), m.plain(IMAGE_CHANNELS), False, 'linear', 0.0, 1.0, CLAMP),
        makes_features=False),
    'pixel_product from image': Case(OPS['pixel_product'], lambda m: (
        m.image(), m.matrix().transpose(1, 2), None, m.is_nhwc())),
    'pixel_outer': Case(OPS['pixel_outer'], lambda m: (m.image(), m.features()), makes_features=False),
    'scaled_cast': Case(
        OPS['scaled_cast'], lambda m: (_weights(m)[0], 1 / FEATURES, torch.float16), has_layout=False),
    'demodulation': Case(OPS['demodulation'], lambda m: (*_weights(m), EPS), has_layout=False),
    'modulated_weight': Case(OPS['modulated_weight'], lambda m: (
        *_weights(m), m.plain(m.size[0], FEATURES, dtype=torch.float32), torch.float16), has_layout=False),
}
