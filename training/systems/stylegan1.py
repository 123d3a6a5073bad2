# SPDX-License-Identifier: Apache-2.0
"""The generator of StyleGAN (Karras et al. 2019): styles by adaptive instance normalisation.

Shapes as in training.networks. A level has two layers, each with its own w: num_ws is twice the number of
levels. The discriminator is that of training.networks with architecture='orig'.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dnnlib.resolution import Size, height_width, levels_of, size_at
from torch_utils import persistence
from training import networks

NEGATIVE_SLOPE = 0.2  # of all leaky ReLUs


@persistence.persistent_class
class MappingNetwork(networks.MappingNetwork):
    """z to w: fully connected layers with leaky ReLU, of unit mean square at the input (StyleGAN, Sec. 2).

    num_ws: number of copies of w, with a running average of w for truncation; None: w itself.
    c_dim: length of the label that comes with z.
    """

    def __init__(
        self, z_dim: int, w_dim: int, num_layers: int = 8, c_dim: int = 0, num_ws: int | None = None,
        w_avg_beta: float = 0.995,
    ):
        super().__init__(
            z_dim, c_dim, w_dim, num_ws, num_layers=num_layers,
            w_avg_beta=None if num_ws is None else w_avg_beta)

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, truncation_psi: float = 1,
        truncation_cutoff: int | None = None, skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] -> [N, w_dim], or [N, num_ws, w_dim]; see networks.MappingNetwork."""
        return super().forward(z, c, truncation_psi, truncation_cutoff, skip_w_avg_update)


@persistence.persistent_class
class AdaIN(torch.nn.Module):
    """Sets mean and deviation of each feature map by w (StyleGAN, Eq. 1; Huang and Belongie 2017, Eq. 8)."""

    def __init__(self, channels: int, w_dim: int):
        super().__init__()
        self.style_scale = networks.FullyConnectedLayer(w_dim, channels, bias_init=1)
        self.style_bias = networks.FullyConnectedLayer(w_dim, channels)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W], w [N, w_dim] -> [N, C, H, W]; |scale| and bias are deviation and mean over H, W."""
        scale, bias = self.style_scale(w)[:, :, None, None], self.style_bias(w)[:, :, None, None]
        var, mean = torch.var_mean(x, dim=[2, 3], unbiased=False, keepdim=True)
        return torch.addcmul(bias, x - mean, scale * (var + networks.NORM_EPS).rsqrt())


@persistence.persistent_class
class NoiseInjection(torch.nn.Module):
    """Adds one noise map to all feature maps, each with a learned weight that starts at 0.

    resolution: of a stored map, the buffer noise_const; None for none.
    """

    def __init__(self, channels: int, resolution: Size | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros([1, channels, 1, 1]))
        if resolution is not None:
            self.register_buffer('noise_const', torch.randn(height_width(resolution)))

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, C, H, W]; noise: broadcasts to [N, 1, H, W], None: random. Returns like x."""
        if noise is None:
            noise = torch.randn([x.shape[0], 1, *x.shape[2:]], device=x.device, dtype=x.dtype)
        return x + self.weight * noise


@persistence.persistent_class
class SynthesisBlock(torch.nn.Module):
    """Upsampling by 2 (bilinear), 3x3 convolution, noise, AdaIN, leaky ReLU.

    resolution: of the output, for a stored noise map; None for none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, use_upsample: bool = True,
        resolution: Size | None = None,
    ):
        super().__init__()
        # No bias: AdaIN would remove it. The layer upsamples and convolves in one pass.
        self.conv = networks.Conv2dLayer(
            in_channels, out_channels, kernel_size=3, bias=False, up=2 if use_upsample else 1)
        self.noise = NoiseInjection(out_channels, resolution)
        self.adain = AdaIN(out_channels, w_dim)

    def forward(self, x: torch.Tensor, w: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, I, H, W], w [N, w_dim] -> [N, O, 2H, 2W], or [N, O, H, W] without use_upsample."""
        return F.leaky_relu(self.adain(self.noise(self.conv(x), noise), w), NEGATIVE_SLOPE)


@persistence.persistent_class
class ConstantBlock(torch.nn.Module):
    """The first layer: a learned constant, noise, AdaIN, leaky ReLU (StyleGAN, Fig. 1b)."""

    def __init__(self, channels: int, w_dim: int, resolution: Size):
        super().__init__()
        self.const = torch.nn.Parameter(torch.ones([1, channels, *height_width(resolution)]))
        self.noise = NoiseInjection(channels, resolution)
        self.adain = AdaIN(channels, w_dim)

    def forward(self, w: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """w [N, w_dim] -> [N, C, H, W]."""
        # On a CPU depthwise filters are far faster with the channels last, and later layers keep the layout.
        layout = torch.channels_last if w.device.type == 'cpu' else torch.contiguous_format
        x = self.const.expand(w.shape[0], -1, -1, -1).contiguous(memory_format=layout)
        return F.leaky_relu(self.adain(self.noise(x, noise), w), NEGATIVE_SLOPE)


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """ws to image: a constant, two blocks per level, and a 1x1 convolution to RGB."""

    def __init__(
        self, w_dim: int, img_resolution: Size, img_channels: int, channel_base: int = 16384,
        channel_max: int = 512,
    ):
        super().__init__()
        start, self.block_resolutions = levels_of(img_resolution)
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.num_ws = 2 * len(self.block_resolutions)
        in_channels = 0
        for level in self.block_resolutions:
            channels, size = min(channel_base // level, channel_max), size_at(level, start)
            first = (ConstantBlock(channels, w_dim, size) if level == 4
                     else SynthesisBlock(in_channels, channels, w_dim, resolution=size))
            setattr(self, f'b{level}_first', first)
            second = SynthesisBlock(channels, channels, w_dim, use_upsample=False, resolution=size)
            setattr(self, f'b{level}_second', second)
            in_channels = channels
        self.torgb = networks.Conv2dLayer(in_channels, img_channels, kernel_size=1)

    def forward(
        self, ws: torch.Tensor, noise_mode: str = 'random', force_fp32: bool = False,
        fused_modconv: bool | None = None,
    ) -> torch.Tensor:
        """ws [N, num_ws, w_dim] -> img [N, img_channels, H, W] float32, not clamped.

        noise_mode: 'random', 'const' or 'none'.  force_fp32, fused_modconv: ignored.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f'ws must be [N, {self.num_ws}, {self.w_dim}], not {list(ws.shape)}')
        if noise_mode not in ('random', 'const', 'none'):
            raise ValueError(f"noise_mode={noise_mode!r} must be 'random', 'const' or 'none'")
        styles, inputs = iter(ws.to(torch.float32).unbind(dim=1)), []
        for layer in self._layers():
            inputs = [layer(*inputs, next(styles), _noise_for(layer.noise, noise_mode))]
        return self.torgb(*inputs).contiguous()

    def _layers(self) -> list[torch.nn.Module]:
        names = [f'b{level}_{place}' for level in self.block_resolutions for place in ('first', 'second')]
        return [getattr(self, name) for name in names]


def _noise_for(injection: NoiseInjection, noise_mode: str) -> torch.Tensor | None:
    """The noise argument of a layer; None: random."""
    if noise_mode == 'random':
        return None
    return injection.noise_const if noise_mode == 'const' else torch.zeros_like(injection.weight[:, :1])


@persistence.persistent_class
class StyleGAN1Generator(torch.nn.Module):
    """Mapping and synthesis: G(z, c) -> img, called like networks.Generator."""

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, img_resolution: Size, img_channels: int,
        mapping_kwargs: dict[str, Any] | None = None, synthesis_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **(synthesis_kwargs or {}))
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim, w_dim, c_dim=c_dim, num_ws=self.num_ws, **(mapping_kwargs or {}))

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, truncation_psi: float = 1,
        truncation_cutoff: int | None = None, **synthesis_kwargs: Any,
    ) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] or None -> img [N, img_channels, H, W] float32; training moves w_avg."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)
