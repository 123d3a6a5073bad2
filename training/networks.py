# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2 networks (Karras et al. 2020), name for name and number for number those of StyleGAN2-ADA.

Shapes: N batch, I/O channels in and out, H/W rows and columns.  z [N, z_dim]  c [N, c_dim]
ws [N, num_ws, w_dim]  img [N, img_channels, H, W], nominally in [-1, 1].  All parameters and buffers are
float32.
An image is (a * 2^n) x (b * 2^n). Blocks are named by level: b4, b8, ...; level r has a*r/4 x b*r/4 pixels,
so for square powers of two (a = b = 4) a level is its resolution.

Snapshots carry this text (see torch_utils.bundle), so it runs on Python 3.7 and PyTorch 1.7, with other
programs' copies of the published torch_utils.
"""
from __future__ import annotations

import math
from typing import Any

import torch

from dnnlib.resolution import Size, height_width, levels_of, size_at
from torch_utils import persistence
from torch_utils.ops import upfirdn2d
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.plain_layers import PlainLayers

try:
    from torch_utils.ops import layers
except ImportError:  # a copy of the published torch_utils
    layers = PlainLayers  # type: ignore[assignment]

NORM_EPS = 1e-8  # inside the square root


def normalize_2nd_moment(x: torch.Tensor, dim: int = 1, eps: float = NORM_EPS) -> torch.Tensor:
    """Scale x to unit mean square along `dim`."""
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


@persistence.persistent_class
class FullyConnectedLayer(torch.nn.Module):
    """act(x W^T + b) with equalised learning rate (Karras et al. 2018, Sec. 4.1): x [N, in] -> [N, out]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str = 'linear',
        lr_multiplier: float = 1, bias_init: float = 0,
    ):
        super().__init__()
        # What training changes slowly is stored large: run time multiplies by lr_multiplier again.
        self.weight = _normal([out_features, in_features], 1 / lr_multiplier)
        self.bias = _constant([out_features], bias_init) if bias else None
        self.weight_gain, self.bias_gain = lr_multiplier * in_features ** -0.5, lr_multiplier
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out], in the dtype of x."""
        weight = self.weight.to(x.dtype).t()
        if self.bias is None:
            return bias_act(x @ (weight * self.weight_gain), act=self.activation)
        x = torch.addmm(self.bias.to(x.dtype), x, weight, beta=self.bias_gain, alpha=self.weight_gain)
        return bias_act(x, act=self.activation)


@persistence.persistent_class
class Conv2dLayer(torch.nn.Module):
    """Convolution with optional resampling, bias, activation and clamp; frozen if not `trainable`."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True,
        activation: str = 'linear', up: int = 1, down: int = 1, resample_filter: Any = (1, 3, 3, 1),
        conv_clamp: float | None = None, channels_last: bool = False, trainable: bool = True,
    ):
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.register_buffer('resample_filter', upfirdn2d.setup_filter(resample_filter))
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size ** 2)
        self.act_gain = activation_funcs[activation].def_gain
        weight = _conv_weight(in_channels, out_channels, kernel_size, channels_last)
        values = torch.zeros([out_channels]) if bias else None
        if trainable:
            self.weight = torch.nn.Parameter(weight)
            self.bias = None if values is None else torch.nn.Parameter(values)
        else:
            self.register_buffer('weight', weight)
            if values is None:
                self.bias = None
            else:
                self.register_buffer('bias', values)

    def forward(
        self, x: torch.Tensor, gain: float = 1, small: torch.Tensor | None = None, **fusion: Any,
    ) -> torch.Tensor:
        """[N, I, H, W] -> [N, O, H * up // down, W * up // down]; gain multiplies the result and clamp.

        small: what fork_down() made of x, if the caller has it; only for kernel_size=1.
        fusion: addend, before, is_deferred of layers.convolution().
        """
        return layers.convolution(
            x, self.weight, self.bias, self.resample_filter, self.weight_gain, self.activation,
            self.act_gain * gain, _scaled(self.conv_clamp, gain), self.up, self.down, self.padding, small,
            **fusion)


@persistence.persistent_class
class MappingNetwork(torch.nn.Module):
    """z and label to w (StyleGAN, Sec. 2), with its running average and truncation towards it."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, num_layers: int = 8,
        embed_features: int | None = None, layer_features: int | None = None, activation: str = 'lrelu',
        lr_multiplier: float = 0.01, w_avg_beta: float | None = 0.995,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.num_ws, self.num_layers, self.w_avg_beta = num_ws, num_layers, w_avg_beta
        embed = 0 if c_dim == 0 else w_dim if embed_features is None else embed_features
        hidden = w_dim if layer_features is None else layer_features
        widths = [z_dim + embed, *[hidden] * (num_layers - 1), w_dim]
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed)
        for i in range(num_layers):
            layer = FullyConnectedLayer(
                widths[i], widths[i + 1], activation=activation, lr_multiplier=lr_multiplier)
            setattr(self, f'fc{i}', layer)
        if self._has_average():
            self.register_buffer('w_avg', torch.zeros([w_dim]))

    def forward(
        self, z: torch.Tensor | None, c: torch.Tensor | None, truncation_psi: float = 1,
        truncation_cutoff: int | None = None, skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """z [N, z_dim] (None if z_dim is 0), c [N, c_dim] (ignored if c_dim is 0) -> ws [N, num_ws, w_dim].

        [N, w_dim] if num_ws is None. psi pulls the first `truncation_cutoff` ws (None: all) towards w_avg.
        In training mode w_avg follows the batch mean, unless skip_w_avg_update. Raises ValueError on wrong
        shapes.
        """
        w = self._inputs(z, c)
        for i in range(self.num_layers):
            w = getattr(self, f'fc{i}')(w)
        if self._has_average() and self.training and not skip_w_avg_update:
            self.w_avg.copy_(w.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is not None:
            w = w.unsqueeze(1).repeat([1, self.num_ws, 1])
        if truncation_psi != 1:
            w = self._truncate(w, truncation_psi, truncation_cutoff)
        return w

    def _inputs(self, z: torch.Tensor | None, c: torch.Tensor | None) -> torch.Tensor:
        """Normalised latent and normalised label embedding, side by side."""
        parts = []
        if self.z_dim > 0:
            _check_width('z', z, self.z_dim)
            parts.append(normalize_2nd_moment(z.to(torch.float32)))
        if self.c_dim > 0:
            _check_width('c', c, self.c_dim)
            parts.append(normalize_2nd_moment(self.embed(c.to(torch.float32))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _has_average(self) -> bool:
        return self.num_ws is not None and self.w_avg_beta is not None

    def _truncate(self, w: torch.Tensor, psi: float, cutoff: int | None) -> torch.Tensor:
        if not self._has_average():
            raise ValueError('this mapping network has no w_avg, so truncation_psi must be 1')
        if cutoff is None:
            return self.w_avg.lerp(w, psi)
        return torch.cat([self.w_avg.lerp(w[:, :cutoff], psi), w[:, cutoff:]], dim=1)


@persistence.persistent_class
class SynthesisLayer(torch.nn.Module):
    """Modulated convolution, noise, bias and activation; `resolution` is that of the output."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, in_channels: int, out_channels: int, w_dim: int, resolution: Size, kernel_size: int = 3,
        up: int = 1, use_noise: bool = True, activation: str = 'lrelu', resample_filter: Any = (1, 3, 3, 1),
        conv_clamp: float | None = None, channels_last: bool = False,
    ):
        super().__init__()
        self.resolution, self.up, self.use_noise = resolution, up, use_noise
        self.activation, self.conv_clamp = activation, conv_clamp
        self.register_buffer('resample_filter', upfirdn2d.setup_filter(resample_filter))
        self.padding = kernel_size // 2
        self.act_gain = activation_funcs[activation].def_gain
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(_conv_weight(in_channels, out_channels, kernel_size, channels_last))
        if use_noise:
            self.register_buffer('noise_const', torch.randn(height_width(resolution)))
            self.noise_strength = _constant([], 0)
        self.bias = _constant([out_channels], 0)

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, noise_mode: str = 'random', fused_modconv: bool = True,
        gain: float = 1, next_scale: torch.Tensor | None = None,
        modulation: Any = None,
    ) -> torch.Tensor:
        """x [N, I, H, W], w [N, w_dim] -> [N, O, H * up, W * up].  noise_mode: random, const or none.

        Without fused_modconv: next_scale [N, O] multiplies the result; modulation is what w makes of weight.
        """
        styles = self.affine(w) if modulation is None else None
        return layers.synthesis(
            x, self.weight, styles, self._noise(x, noise_mode), self.bias, self.resample_filter,
            self.activation, self.act_gain * gain, _scaled(self.conv_clamp, gain), self.up, self.padding,
            fused_modconv, modulation, next_scale)

    def _noise(self, x: torch.Tensor, noise_mode: str) -> torch.Tensor | None:
        if noise_mode not in ('random', 'const', 'none'):
            raise ValueError(f"noise_mode={noise_mode!r} must be 'random', 'const' or 'none'")
        if not self.use_noise or noise_mode == 'none':
            return None
        if noise_mode == 'const':
            return self.noise_const * self.noise_strength
        shape = [x.shape[0], 1, *height_width(self.resolution)]
        return torch.randn(shape, device=x.device) * self.noise_strength


@persistence.persistent_class
class ToRGBLayer(torch.nn.Module):
    """Modulated 1x1 convolution to image channels, without demodulation or noise."""

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, kernel_size: int = 1,
        conv_clamp: float | None = None, channels_last: bool = False,
    ):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(_conv_weight(in_channels, out_channels, kernel_size, channels_last))
        self.bias = _constant([out_channels], 0)
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size ** 2)

    def forward(self, x: torch.Tensor, w: torch.Tensor, fused_modconv: bool = True) -> torch.Tensor:
        """x [N, I, H, W], w [N, w_dim] -> [N, O, H, W] in the dtype of x."""
        styles = self.affine(w) * self.weight_gain
        return layers.to_image(x, self.weight, styles, self.bias, self.conv_clamp, fused_modconv)


@persistence.persistent_class
class SynthesisBlock(torch.nn.Module):
    """The layers of one resolution: conv0 (up-sampling) and conv1, and what becomes of the RGB image."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, in_channels: int, out_channels: int, w_dim: int, resolution: Size, img_channels: int,
        is_last: bool, architecture: str = 'skip', resample_filter: Any = (1, 3, 3, 1),
        conv_clamp: float | None = None, use_fp16: bool = False, fp16_channels_last: bool | None = None,
        half_dtype: str = 'float16', **layer_kwargs: Any,
    ):
        _check_architecture(architecture)
        super().__init__()
        self.in_channels, self.w_dim, self.resolution = in_channels, w_dim, resolution
        self.img_channels, self.is_last, self.architecture = img_channels, is_last, architecture
        self.use_fp16, self.half_dtype = use_fp16, half_dtype
        self.channels_last, self.wants_nhwc = use_fp16 and bool(fp16_channels_last), fp16_channels_last
        self.register_buffer('resample_filter', upfirdn2d.setup_filter(resample_filter))
        self.num_conv = 1 if in_channels == 0 else 2
        enlarge = {'up': 2, 'resample_filter': resample_filter}
        common = {'conv_clamp': conv_clamp, 'channels_last': self.channels_last}
        layer_kwargs = {'w_dim': w_dim, 'resolution': resolution, **common, **layer_kwargs}
        if in_channels == 0:
            self.const = _normal([out_channels, *height_width(resolution)])
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, **enlarge, **layer_kwargs)
        self.conv1 = SynthesisLayer(out_channels, out_channels, **layer_kwargs)
        self.num_torgb = int(architecture == 'skip' or is_last)
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, **common)
        if architecture == 'resnet' and in_channels > 0:
            self.skip = Conv2dLayer(
                in_channels, out_channels, 1, bias=False, channels_last=self.channels_last, **enlarge)

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor | None, ws: torch.Tensor, force_fp32: bool = False,
        fused_modconv: bool | None = None, **layer_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [N, I, H/2, W/2] (ignored by the first block), img [N, C, H/2, W/2] or None -> x, img.

        ws: [N, num_conv + num_torgb, w_dim].  Returns x [N, O, H, W] in the block's dtype, and
        img [N, C, H, W] float32, or None where there is none yet.
        """
        dtype, layout = _compute_format(self, ws.device, force_fp32)
        if fused_modconv is None:
            fused_modconv = self._prefers_fused(ws)
        layer_kwargs = {'fused_modconv': fused_modconv, **layer_kwargs}
        styles = iter(ws.unbind(dim=1))
        x = self._features(x, styles, dtype, layout, layer_kwargs)
        if img is not None:
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.num_torgb:
            y = self.torgb(x, next(styles), fused_modconv=fused_modconv).to(torch.float32)
            img = y if img is None else img + y
        if self.is_last and img is not None:
            img = img.contiguous()
        return x, img

    def _features(
        self, x: torch.Tensor | None, styles: Any, dtype: torch.dtype, layout: torch.memory_format,
        layer_kwargs: dict,
    ) -> torch.Tensor:
        if self.in_channels == 0:
            w = next(styles)
            x = self.const.to(dtype).expand(w.shape[0], -1, -1, -1).contiguous(memory_format=layout)
            return self.conv1(x, w, **layer_kwargs)
        x = x.to(dtype=dtype, memory_format=layout)
        w0, w1, before, after = next(styles), next(styles), {}, {}
        is_free = self.training or not _is_watched(self.conv0, self.conv1, self.conv1.affine)
        if not layer_kwargs['fused_modconv'] and is_free:
            # Nobody else reads what conv0 makes, so it multiplies by conv1's styles before it writes.
            # Not conv1.affine(w1): hooks would see it outside of its layer.
            modulation = layers.modulate(self.conv1.weight, self.conv1.affine.forward(w1), dtype)
            if modulation is not None:
                before, after = {'next_scale': modulation.styles}, {'modulation': modulation.applied()}
        if self.architecture != 'resnet':
            return self.conv1(self.conv0(x, w0, **before, **layer_kwargs), w1, **after, **layer_kwargs)
        y = self.skip(x, gain=math.sqrt(0.5))
        x = self.conv0(x, w0, **before, **layer_kwargs)
        return y + self.conv1(x, w1, gain=math.sqrt(0.5), **after, **layer_kwargs)

    def _prefers_fused(self, ws: torch.Tensor) -> bool:
        # A single image needs no scaling of activations if its weights are scaled; more would need a grouped
        # convolution, which is slower. On a CPU, scaling weights costs more.
        return not self.training and ws.device.type != 'cpu' and ws.shape[0] == 1


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """ws to image: a learned constant, then one block per level."""

    def __init__(
        self, w_dim: int, img_resolution: Size, img_channels: int, channel_base: int = 32768,
        channel_max: int = 512, num_fp16_res: int = 0, **block_kwargs: Any,
    ):
        super().__init__()
        start, self.block_resolutions = levels_of(img_resolution)
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.img_resolution_log2 = len(self.block_resolutions) + 1
        self.num_ws = 0
        in_channels = 0
        for level in self.block_resolutions:
            out_channels = min(channel_base // level, channel_max)
            block = SynthesisBlock(
                in_channels, out_channels, w_dim=w_dim, resolution=size_at(level, start),
                img_channels=img_channels,
                is_last=level == self.block_resolutions[-1],
                use_fp16=_is_half(level, self.img_resolution_log2, num_fp16_res), **block_kwargs)
            self.num_ws += block.num_conv
            setattr(self, f'b{level}', block)
            in_channels = out_channels
        self.num_ws += block.num_torgb

    def forward(self, ws: torch.Tensor, **block_kwargs: Any) -> torch.Tensor:
        """ws [N, num_ws, w_dim] -> img [N, img_channels, H, W] float32, not clamped.

        block_kwargs: noise_mode ('random', 'const', 'none'), force_fp32, fused_modconv.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f'ws must be [N, {self.num_ws}, {self.w_dim}], not {list(ws.shape)}')
        ws = ws.to(torch.float32)
        x = img = None
        first = 0
        for level in self.block_resolutions:
            block = getattr(self, f'b{level}')
            # The torgb of a block shares its w with the first convolution of the next one.
            x, img = block(x, img, ws[:, first:first + block.num_conv + block.num_torgb], **block_kwargs)
            first += block.num_conv
        return img


@persistence.persistent_class
class Generator(torch.nn.Module):
    """Mapping and synthesis: G(z, c) -> img."""

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, img_resolution: Size, img_channels: int,
        mapping_kwargs: dict | None = None, synthesis_kwargs: dict | None = None,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(
            w_dim=w_dim, img_resolution=img_resolution, img_channels=img_channels, **(synthesis_kwargs or {}))
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=self.num_ws, **(mapping_kwargs or {}))

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None, truncation_psi: float = 1,
        truncation_cutoff: int | None = None, **synthesis_kwargs: Any,
    ) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] or None -> img [N, img_channels, H, W] float32; training moves w_avg."""
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)


@persistence.persistent_class
class DiscriminatorBlock(torch.nn.Module):
    """The layers of one resolution: fromrgb where there is one, conv0, conv1 (down-sampling), skip."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, in_channels: int, tmp_channels: int, out_channels: int, resolution: Size, img_channels: int,
        first_layer_idx: int, architecture: str = 'resnet', activation: str = 'lrelu',
        resample_filter: Any = (1, 3, 3, 1), conv_clamp: float | None = None, use_fp16: bool = False,
        fp16_channels_last: bool | None = None, freeze_layers: int = 0, half_dtype: str = 'float16',
    ):
        _check_architecture(architecture)
        assert in_channels in (0, tmp_channels), f'in_channels is {in_channels}, not 0 or {tmp_channels}'
        super().__init__()
        self.in_channels, self.resolution, self.img_channels = in_channels, resolution, img_channels
        self.first_layer_idx, self.architecture = first_layer_idx, architecture
        self.use_fp16, self.half_dtype = use_fp16, half_dtype
        self.channels_last, self.wants_nhwc = use_fp16 and bool(fp16_channels_last), fp16_channels_last
        self.register_buffer('resample_filter', upfirdn2d.setup_filter(resample_filter))
        self.num_layers = 0

        def layer(in_channels: int, out_channels: int, **kwargs: Any) -> Conv2dLayer:
            trainable = first_layer_idx + self.num_layers >= freeze_layers  # Freeze-D (Mo et al. 2020)
            self.num_layers += 1
            return Conv2dLayer(
                in_channels, out_channels, trainable=trainable, channels_last=self.channels_last, **kwargs)

        active = {'activation': activation, 'conv_clamp': conv_clamp}
        if in_channels == 0 or architecture == 'skip':
            self.fromrgb = layer(img_channels, tmp_channels, kernel_size=1, **active)
        self.conv0 = layer(tmp_channels, tmp_channels, kernel_size=3, **active)
        self.conv1 = layer(
            tmp_channels, out_channels, kernel_size=3, down=2, resample_filter=resample_filter, **active)
        if architecture == 'resnet':
            self.skip = layer(
                tmp_channels, out_channels, kernel_size=1, bias=False, down=2,
                resample_filter=resample_filter)

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor | None, force_fp32: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [N, I, H, W] (None for the first block), img [N, C, H, W] or None -> x [N, O, H/2, W/2], img."""
        dtype, layout = _compute_format(self, (img if x is None else x).device, force_fp32)
        x = None if x is None else x.to(dtype=dtype, memory_format=layout)
        if self.in_channels == 0 or self.architecture == 'skip':
            img = img.to(dtype=dtype, memory_format=layout)
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = upfirdn2d.downsample2d(img, self.resample_filter) if self.architecture == 'skip' else None
        if self.architecture != 'resnet':
            return self._convolve(x), img
        x, small = layers.fork_down(x, self.skip.resample_filter, self.skip.down)
        y = self.skip(x, gain=math.sqrt(0.5), small=small)
        return self._convolve(x, gain=math.sqrt(0.5), addend=y), img

    def _convolve(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """conv1(conv0(x)); nobody else reads what conv0 makes, so conv1's filter may activate it."""
        before = None
        if self.training or not _is_watched(self.conv0, self.conv1):
            before = layers.defer(
                x, self.conv0.bias, self.conv0.activation, self.conv0.act_gain, self.conv0.conv_clamp)
        if before is None:
            return self.conv1(self.conv0(x), **kwargs)
        return self.conv1(self.conv0(x, is_deferred=True), before=before, **kwargs)


@persistence.persistent_class
class MinibatchStdLayer(torch.nn.Module):
    """Append the standard deviation over groups of samples as channels (Karras et al. 2018, Sec. 3)."""

    def __init__(self, group_size: int | None, num_channels: int = 1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C + num_channels, H, W]. Sample n is in group n mod M, of M groups.

        Raises ValueError unless N is a multiple of the group size and C of num_channels.
        """
        n, c, h, w = x.shape
        group = n if self.group_size is None else min(self.group_size, n)
        if n % group or c % self.num_channels:
            raise ValueError(
                f'minibatch std: a batch of {n} with {c} channels does not divide into groups of {group} '
                             f'samples and {self.num_channels} channels')
        y = x.reshape(group, n // group, self.num_channels, c // self.num_channels, h, w)
        # Not var(): its second derivative loses digits in R1 where the samples of a group are nearly alike.
        y = (y - y.mean(dim=0)).square().mean(dim=0).add(NORM_EPS).sqrt()  # [M, F, C / F, H, W]
        y = y.mean(dim=[2, 3, 4])  # [M, F]
        y = y[:, :, None, None].repeat(group, 1, h, w)  # [N, F, H, W]
        return torch.cat([x, y], dim=1)


@persistence.persistent_class
class DiscriminatorEpilogue(torch.nn.Module):
    """The 4x4 level: minibatch std, convolution, two fully connected layers, projection on the label."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, in_channels: int, cmap_dim: int, resolution: Size, img_channels: int,
        architecture: str = 'resnet', mbstd_group_size: int | None = 4, mbstd_num_channels: int = 1,
        activation: str = 'lrelu', conv_clamp: float | None = None,
    ):
        _check_architecture(architecture)
        super().__init__()
        self.in_channels, self.cmap_dim, self.resolution = in_channels, cmap_dim, resolution
        self.img_channels, self.architecture = img_channels, architecture
        if architecture == 'skip':
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = (
            MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None)
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels, in_channels, kernel_size=3, activation=activation,
            conv_clamp=conv_clamp)
        height, width = height_width(resolution)
        self.fc = FullyConnectedLayer(in_channels * height * width, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(
        self, x: torch.Tensor, img: torch.Tensor | None, cmap: torch.Tensor | None, force_fp32: bool = False,
    ) -> torch.Tensor:
        """x [N, I, 4, 4], img [N, C, 4, 4] ('skip' only), cmap [N, cmap_dim] -> logits [N, 1] float32."""
        x = x.to(dtype=torch.float32, memory_format=torch.contiguous_format)
        if self.architecture == 'skip':
            x = x + self.fromrgb(img.to(dtype=torch.float32, memory_format=torch.contiguous_format))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim > 0:  # projection discriminator (Miyato and Koyama 2018, Eq. 4)
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    """Image and label to logit: D(img, c) -> [N, 1]."""

    def __init__(  # noqa: PLR0913 (published signature)
        self, c_dim: int, img_resolution: Size, img_channels: int, architecture: str = 'resnet',
        channel_base: int = 32768, channel_max: int = 512, num_fp16_res: int = 0,
        conv_clamp: float | None = None, cmap_dim: int | None = None, block_kwargs: dict | None = None,
        mapping_kwargs: dict | None = None, epilogue_kwargs: dict | None = None,
    ):
        super().__init__()
        start, levels = levels_of(img_resolution)
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        self.img_resolution_log2 = len(levels) + 1
        self.block_resolutions = levels[:0:-1]
        channels = {level: min(channel_base // level, channel_max) for level in levels}
        cmap_dim = 0 if c_dim == 0 else channels[4] if cmap_dim is None else cmap_dim
        common = {'img_channels': img_channels, 'architecture': architecture, 'conv_clamp': conv_clamp}
        first_layer_idx = 0
        for level in self.block_resolutions:
            in_channels = 0 if level == levels[-1] else channels[level]
            block = DiscriminatorBlock(
                in_channels, channels[level], channels[level // 2], resolution=size_at(level, start),
                first_layer_idx=first_layer_idx,
                use_fp16=_is_half(level, self.img_resolution_log2, num_fp16_res),
                **(block_kwargs or {}), **common)
            setattr(self, f'b{level}', block)
            first_layer_idx += block.num_layers
        if c_dim > 0:
            self.mapping = MappingNetwork(
                z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **(mapping_kwargs or {}))
        self.b4 = DiscriminatorEpilogue(
            channels[4], cmap_dim=cmap_dim, resolution=size_at(4, start), **(epilogue_kwargs or {}),
            **common)

    @property
    def samples_seen_together(self) -> int | None:
        """Size of the groups within which samples affect each other's logits; None: all form one."""
        return 1 if self.b4.mbstd is None else self.b4.mbstd.group_size

    def forward(self, img: torch.Tensor, c: torch.Tensor | None, **block_kwargs: Any) -> torch.Tensor:
        """img [N, img_channels, H, W], c [N, c_dim] (ignored if c_dim is 0) -> logits [N, 1] float32.

        block_kwargs: force_fp32. Raises ValueError if img has another shape.
        """
        expected = (self.img_channels, *height_width(self.img_resolution))
        if img.ndim != 4 or img.shape[1:] != expected:
            raise ValueError(f'img must be [N, {", ".join(map(str, expected))}], not {list(img.shape)}')
        x = None
        for level in self.block_resolutions:
            x, img = getattr(self, f'b{level}')(x, img, **block_kwargs)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)


def _is_watched(*layers: torch.nn.Module) -> bool:
    """Whether hooks read what the layers exchange, as programs do that edit features."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def _normal(shape: list[int], deviation: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape) * deviation)


def _constant(shape: list[int], value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, float(value)))


def _scaled(clamp: float | None, gain: float) -> float | None:
    return None if clamp is None else clamp * gain


def _conv_weight(in_channels: int, out_channels: int, kernel_size: int, channels_last: bool) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn([out_channels, in_channels, kernel_size, kernel_size]).to(memory_format=layout)


def _check_width(name: str, x: torch.Tensor | None, width: int) -> None:
    if x is None or x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f'{name} must be [N, {width}], not {None if x is None else list(x.shape)}')


def _check_architecture(architecture: str) -> None:
    if architecture not in ('orig', 'skip', 'resnet'):
        raise ValueError(f"architecture={architecture!r} must be 'orig', 'skip' or 'resnet'")


def _is_half(level: int, img_resolution_log2: int, num_fp16_res: int) -> bool:
    """Whether a level is one of the num_fp16_res highest; level 4 never is."""
    return level >= max(2 ** (img_resolution_log2 + 1 - num_fp16_res), 8)


def _compute_format(
    block: torch.nn.Module, device: torch.device, force_fp32: bool,
) -> tuple[torch.dtype, torch.memory_format]:
    """(dtype, memory format) of a block's activations.

    On a CPU, depthwise filters are far faster in NHWC; on a GPU, tensor cores work on NHWC, in 16 bits as in
    TF32, and cuDNN transposes anything else. There, fp16_channels_last=False keeps NCHW.
    """
    half = block.use_fp16 and not force_fp32
    if layers is PlainLayers:
        # The published kernels have no bfloat16, and old PyTorch has no 16-bit convolutions on a CPU.
        half = half and device.type != 'cpu' and block.half_dtype == 'float16'
    by_tensor_cores = half or torch.backends.cudnn.allow_tf32
    channels_last = device.type == 'cpu' or (by_tensor_cores and block.wants_nhwc is not False)
    dtype = getattr(torch, block.half_dtype) if half else torch.float32
    return dtype, torch.channels_last if channels_last else torch.contiguous_format
