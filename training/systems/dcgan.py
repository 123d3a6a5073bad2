# SPDX-License-Identifier: Apache-2.0
"""DCGAN (Radford et al. 2016): transposed and strided 4x4 convolutions with batch normalisation.

Images are square with a power-of-two side of at least 8; the published network has 64. z [N, z_dim], img
[N, img_channels, side, side] in [-1, 1]. Both networks are called like those of training.networks.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from torch_utils import persistence

WEIGHT_DEVIATION = 0.02  # of convolutions around 0 and of batch-norm weights around 1 (Sec. 4)
NEGATIVE_SLOPE = 0.2
MIN_SIDE = 8


@persistence.persistent_class
class BatchNorm(torch.nn.BatchNorm2d):
    """Batch normalisation: statistics of the batch in training, running ones in evaluation."""

    def __init__(self, channels: int):
        super().__init__(channels)
        torch.nn.init.normal_(self.weight, 1, WEIGHT_DEVIATION)


@persistence.persistent_class
class Enlarge(torch.nn.ConvTranspose2d):
    """Transposed 4x4 convolution without bias: to twice the side or, if `is_first`, from 1x1 to 4x4."""

    def __init__(self, in_channels: int, out_channels: int, is_first: bool = False):
        stride, padding = (1, 0) if is_first else (2, 1)
        super().__init__(in_channels, out_channels, 4, stride, padding, bias=False)
        torch.nn.init.normal_(self.weight, 0, WEIGHT_DEVIATION)


@persistence.persistent_class
class Reduce(torch.nn.Conv2d):
    """4x4 convolution without bias: to half the side or, if `is_last`, from 4x4 to 1x1."""

    def __init__(self, in_channels: int, out_channels: int, is_last: bool = False):
        stride, padding = (1, 0) if is_last else (2, 1)
        super().__init__(in_channels, out_channels, 4, stride, padding, bias=False)
        torch.nn.init.normal_(self.weight, 0, WEIGHT_DEVIATION)


@persistence.persistent_class
class LatentMapping(torch.nn.Module):
    """Replaces the mapping network of other generators: ws is z, [N, 1, z_dim]."""

    def __init__(self, z_dim: int):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, 0, z_dim, 1
        self.num_layers, self.w_avg_beta = 0, None

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, truncation_psi: float = 1,
        truncation_cutoff: int | None = None, skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """z [N, z_dim] -> [N, 1, z_dim] float32; labels are ignored. Raises ValueError for truncation."""
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f'z must be [N, {self.z_dim}], not {list(z.shape)}')
        if truncation_psi != 1:
            raise ValueError('DCGAN has no w_avg, so truncation_psi must be 1')
        return z.to(torch.float32).unsqueeze(1)


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """Latent to image: conv1 to 4x4, then twice the side with each layer; batch norm and ReLU, tanh at the
    end.
    """

    def __init__(self, z_dim: int, img_resolution: int, img_channels: int, ngf: int = 64):
        super().__init__()
        num_layers = _num_layers(img_resolution)
        self.w_dim, self.num_ws, self.num_layers = z_dim, 1, num_layers
        self.img_resolution, self.img_channels = img_resolution, img_channels
        # Twice the feature maps for half the side: ngf before the last layer.
        widths = [z_dim, *(ngf << k for k in reversed(range(num_layers - 1))), img_channels]
        for i in range(num_layers):
            setattr(self, f'conv{i + 1}', Enlarge(widths[i], widths[i + 1], is_first=i == 0))
            if i < num_layers - 1:
                setattr(self, f'bn{i + 1}', BatchNorm(widths[i + 1]))

    def forward(
        self, ws: torch.Tensor, noise_mode: str = 'none', force_fp32: bool = False,
        fused_modconv: bool | None = None,
    ) -> torch.Tensor:
        """ws [N, 1, z_dim] -> img [N, img_channels, side, side] in (-1, 1).

        noise_mode, force_fp32, fused_modconv: ignored.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f'ws must be [N, {self.num_ws}, {self.w_dim}], not {list(ws.shape)}')
        x = ws[:, 0, :, None, None].to(torch.float32)
        for i in range(1, self.num_layers):
            x = F.relu(getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x)))
        return torch.tanh(getattr(self, f'conv{self.num_layers}')(x))


@persistence.persistent_class
class DCGANGenerator(torch.nn.Module):
    """G(z, c) -> img in (-1, 1).

    ngf: feature maps of the last hidden layer, doubled towards the first.  c_dim: 0, there are no labels.
    """

    def __init__(
        self, z_dim: int = 100, c_dim: int = 0, img_resolution: int = 64, img_channels: int = 3,
        ngf: int = 64,
    ):
        _check_unconditional(c_dim)
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, 0, z_dim, 1
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(z_dim, img_resolution, img_channels, ngf)
        self.mapping = LatentMapping(z_dim)

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, truncation_psi: float = 1,
        truncation_cutoff: int | None = None, **synthesis_kwargs: bool | str | None,
    ) -> torch.Tensor:
        """z [N, z_dim] -> img [N, img_channels, side, side]; in training, with batch statistics."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), **synthesis_kwargs)


@persistence.persistent_class
class DCGANDiscriminator(torch.nn.Module):
    """D(img, c) -> logits [N, 1], the sigmoid of which is the probability of a real image.

    ndf: feature maps of the first layer, doubled with each further one.  c_dim: 0, there are no labels.
    """

    def __init__(self, c_dim: int = 0, img_resolution: int = 64, img_channels: int = 3, ndf: int = 64):
        _check_unconditional(c_dim)
        super().__init__()
        num_layers = _num_layers(img_resolution)
        self.c_dim, self.img_resolution, self.img_channels = 0, img_resolution, img_channels
        self.num_layers = num_layers
        widths = [img_channels, *(ndf << k for k in range(num_layers - 1)), 1]
        for i in range(num_layers):
            setattr(self, f'conv{i + 1}', Reduce(widths[i], widths[i + 1], is_last=i == num_layers - 1))
            # Neither at the image nor at the logit (Radford et al. 2016, Sec. 3).
            if 0 < i < num_layers - 1:
                setattr(self, f'bn{i + 1}', BatchNorm(widths[i + 1]))

    def forward(self, img: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """img [N, img_channels, side, side] -> [N, 1]. Raises ValueError if img has another shape."""
        side = self.img_resolution
        if img.ndim != 4 or img.shape[1:] != (self.img_channels, side, side):
            raise ValueError(f'img must be [N, {self.img_channels}, {side}, {side}], not {list(img.shape)}')
        x = F.leaky_relu(self.conv1(img), NEGATIVE_SLOPE)
        for i in range(2, self.num_layers):
            x = F.leaky_relu(getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x)), NEGATIVE_SLOPE)
        return getattr(self, f'conv{self.num_layers}')(x).flatten(1)


def _num_layers(side: int) -> int:
    if not isinstance(side, int) or side < MIN_SIDE or side & (side - 1):
        raise ValueError(f'img_resolution={side} must be a power of two, at least {MIN_SIDE}')
    return side.bit_length() - 2


def _check_unconditional(c_dim: int) -> None:
    if c_dim != 0:
        raise ValueError(f'c_dim={c_dim} must be 0: DCGAN is unconditional')
