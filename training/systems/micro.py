# SPDX-License-Identifier: Apache-2.0
"""A StyleGAN2 generator for 16x16 images that consists of five operations, for timing training steps.

z [N, 512] -> ws [N, num_ws, 512] -> img [N, img_channels, 16, 16] in (-1, 1). The operations: a constant
fill, leaky ReLU in place, bias plus tanh, modulated 3x3 convolution, a 512x512 fully connected layer.
"""
import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_conv2d import modulated_conv2d
from training.networks import FullyConnectedLayer, normalize_2nd_moment

RESOLUTION, Z_DIM, START = 16, 512, 4  # pixels, numbers, pixels
START_VALUE = 1.0  # of all feature maps; the weights of the first layer are learned
NEGATIVE_SLOPE = 0.2


def constant_fill(like: torch.Tensor, channels: int) -> torch.Tensor:
    """Where synthesis starts: [N, channels, 4, 4] of START_VALUE, for like [N, ...], on its device."""
    return like.new_full([like.shape[0], channels, START, START], START_VALUE)


def leaky_relu_in_place(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0.2 x), overwriting x, which no other operation may need for its gradient."""
    return F.leaky_relu_(x, NEGATIVE_SLOPE)


def bias_tanh(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """tanh(x + b): x [N, C, H, W], b [C]."""
    return bias_act(x, b, act='tanh')


class MicroMapping(torch.nn.Module):
    """z to w by one fully connected layer of 512x512; the same w for every layer of the synthesis."""

    def __init__(self, num_ws: int):
        super().__init__()
        self.num_ws = num_ws
        self.fc0 = FullyConnectedLayer(Z_DIM, Z_DIM, activation='lrelu')

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """z [N, 512] -> ws [N, num_ws, 512]; c is ignored, and there is no w_avg."""
        return self.fc0(normalize_2nd_moment(z)).unsqueeze(1).repeat([1, self.num_ws, 1])


class MicroLayer(torch.nn.Module):
    """Modulated 3x3 convolution; up: 2 doubles the side."""

    def __init__(self, in_channels: int, out_channels: int, up: int = 1):
        super().__init__()
        self.up = up
        self.affine = FullyConnectedLayer(Z_DIM, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, 3, 3]))
        self.register_buffer('resample_filter', upfirdn2d.setup_filter([1, 3, 3, 1]))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x [N, I, H, W], w [N, 512] -> [N, O, H * up, W * up]."""
        return modulated_conv2d(
            x, self.weight, self.affine(w), up=self.up, padding=1, resample_filter=self.resample_filter,
            flip_weight=self.up == 1, fused_modconv=False)


class MicroSynthesis(torch.nn.Module):
    """A constant 4x4, then convolutions at 4x4, 8x8 and 16x16, and one to image channels."""

    def __init__(self, img_channels: int, channels: int):
        super().__init__()
        self.channels = channels
        self.conv0 = MicroLayer(channels, channels)
        self.conv1 = MicroLayer(channels, channels, up=2)
        self.conv2 = MicroLayer(channels, channels, up=2)
        self.torgb = MicroLayer(channels, img_channels)
        self.bias = torch.nn.Parameter(torch.zeros([img_channels]))
        self.num_ws = 4

    def forward(self, ws: torch.Tensor) -> torch.Tensor:
        """ws [N, 4, 512] -> img [N, img_channels, 16, 16] in (-1, 1)."""
        *styles, last = ws.unbind(dim=1)
        x = constant_fill(ws, self.channels)
        for layer, w in zip([self.conv0, self.conv1, self.conv2], styles, strict=True):
            x = leaky_relu_in_place(layer(x, w))
        return bias_tanh(self.torgb(x, last), self.bias)


class MicroGenerator(torch.nn.Module):
    """G(z, c) -> img, with the parts that a loss calls.  channels: feature maps of every layer."""

    def __init__(self, img_channels: int = 3, channels: int = 32):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = Z_DIM, 0, Z_DIM
        self.img_resolution, self.img_channels = RESOLUTION, img_channels
        self.synthesis = MicroSynthesis(img_channels, channels)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MicroMapping(self.num_ws)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """z [N, 512] -> img [N, img_channels, 16, 16] in (-1, 1)."""
        return self.synthesis(self.mapping(z, c))
