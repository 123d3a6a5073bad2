# SPDX-License-Identifier: Apache-2.0
"""The layers of torch_utils.ops.layers by the operators that every program of the lineage has.

A snapshot carries this text (see torch_utils.bundle), for programs that have copies of the published
torch_utils and dnnlib instead of ours: it must run on Python 3.7 and PyTorch 1.7.
"""
from __future__ import annotations

import torch

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample


class PlainLayers:
    """Functions with the signatures and numbers of torch_utils.ops.layers; see there."""

    @staticmethod
    def convolution(  # noqa: PLR0913 (as there)
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, resample_filter: torch.Tensor,
        weight_gain: float, act: str, gain: float, clamp: float | None, up: int = 1, down: int = 1,
        padding: int = 0, small: None = None, addend: torch.Tensor | None = None, before: None = None,
        is_deferred: bool = False,
    ) -> torch.Tensor:
        """Convolution, bias, activation, gain, clamp, addend: [N, I, H, W] -> [N, O, H * up // down, ...]."""
        x = conv2d_resample(
            x=x, w=(weight * weight_gain).to(x.dtype), f=resample_filter, up=up, down=down, padding=padding,
            flip_weight=up == 1)
        x = bias_act(x, None if bias is None else bias.to(x.dtype), act=act, gain=gain, clamp=clamp)
        return x if addend is None else addend + x

    @staticmethod
    def defer(
        x: torch.Tensor, bias: torch.Tensor | None, act: str, gain: float, clamp: float | None,
    ) -> None:
        """Every layer has its own activation."""

    @staticmethod
    def fork_down(
        x: torch.Tensor, resample_filter: torch.Tensor, down: int,
    ) -> tuple[torch.Tensor, None]:
        """x for both branches of a block."""
        return x, None

    @staticmethod
    def modulate(weight: torch.Tensor, styles: torch.Tensor, dtype: torch.dtype) -> None:
        """Nothing is computed ahead of a layer."""

    @staticmethod
    def synthesis(  # noqa: PLR0913 (as there)
        x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, noise: torch.Tensor | None,
        bias: torch.Tensor, resample_filter: torch.Tensor, act: str, gain: float, clamp: float | None,
        up: int = 1, padding: int = 0, fused: bool = False, modulation: None = None, next_scale: None = None,
    ) -> torch.Tensor:
        """Demodulated convolution, noise, bias, activation: [N, I, H, W] -> [N, O, H * up, W * up]."""
        if x.dtype == torch.float16:
            # Demodulation cancels both factors; without them sums could exceed the range of float16.
            size = weight.shape[1] * weight.shape[2] * weight.shape[3]
            weight = weight / (size ** 0.5 * weight.abs().amax(dim=[1, 2, 3], keepdim=True))
            styles = styles / styles.abs().amax(dim=1, keepdim=True)
        # StyleGAN2, Eq. 3: norm of each sample's scaled weights for each output channel.
        energy = styles.square() @ weight.square().sum(dim=[2, 3]).t()  # [N, O]
        d = (energy + 1e-8).rsqrt()
        x = conv2d_resample(
            x=x * styles.to(x.dtype)[:, :, None, None], w=weight.to(x.dtype), f=resample_filter, up=up,
            padding=padding, flip_weight=up == 1)
        x = x * d.to(x.dtype)[:, :, None, None]
        if noise is not None:
            x = x + noise.to(x.dtype)
        return bias_act(x, bias.to(x.dtype), act=act, gain=gain, clamp=clamp)

    @staticmethod
    def to_image(
        x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, bias: torch.Tensor, clamp: float | None,
        fused: bool = False,
    ) -> torch.Tensor:
        """Modulated convolution without demodulation, bias, clamp: [N, I, H, W] -> [N, O, H, W]."""
        x = conv2d_resample(x=x * styles.to(x.dtype)[:, :, None, None], w=weight.to(x.dtype))
        return bias_act(x, bias.to(x.dtype), clamp=clamp)
