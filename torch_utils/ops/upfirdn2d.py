# SPDX-License-Identifier: Apache-2.0
"""Upsample, filter (FIR), downsample: the resampling of StyleGAN2 (App. B of StyleGAN; Zhang 2019).

y[n,c,i,j] = gain * sum_{a,b} F[a,b] * z[n,c, i*down_y + a, j*down_x + b], where z is x with up-1 zeros after
every sample, padded, and F is the filter, reversed unless flip_filter. Sizes are given x first: [x, y],
[x0, x1, y0, y1].
"""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d_cuda
from torch_utils.ops._registry import define_op, memory_format_of

SEPARABLE_TAPS = 8  # 1-D filters of this many taps stay 1-D; shorter ones are cheaper as one 2-D pass.
HALF_DTYPES = (torch.float16, torch.bfloat16)


def setup_filter(
    f: Any, device: torch.device | str = 'cpu', normalize: bool = True, flip_filter: bool = False,
    gain: float = 1, separable: bool | None = None,
) -> torch.Tensor:
    """Prepare a filter for upfirdn2d(): float32 [fh, fw], or [taps] if separable.

    f: scalar, list, array or tensor of at most two dimensions; None is the scalar 1.
    normalize: divide by the sum. flip_filter: reverse every axis. gain: total gain of the filter in 2-D.
    separable: keep a 1-D filter 1-D; by default from 8 taps on. Raises ValueError on any other shape.
    """
    f = np.array(1 if f is None else _to_numpy(f), dtype=np.float32)
    if f.ndim > 2 or f.size == 0:
        raise ValueError(f'a filter has 0, 1 or 2 dimensions and at least one tap, not shape {list(f.shape)}')
    f = np.atleast_1d(f)
    if separable is None:
        separable = f.ndim == 1 and f.size >= SEPARABLE_TAPS
    if separable and f.ndim != 1:
        raise ValueError(f'separable=True needs a 1-D filter, not shape {list(f.shape)}')
    if f.ndim == 1 and not separable:
        f = np.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = np.flip(f)
    return torch.from_numpy(f * np.float32(gain ** (f.ndim / 2))).to(device)


def upfirdn2d(
    x: torch.Tensor, f: torch.Tensor | None, up: int | Sequence[int] = 1, down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0, flip_filter: bool = False, gain: float = 1, impl: str = 'cuda',
) -> torch.Tensor:
    """Pad, up-sample, filter and down-sample a batch of images; differentiable to any order in x.

    x: [N, C, H, W], any float dtype.  f: float32 [fh, fw], [taps] (separable) or None (no filter).
    padding counts pixels of the up-sampled image; negative crops.  impl is accepted and ignored.
    Returns [N, C, (H*up + y0 + y1 - fh) // down + 1, ...], dtype of x. Raises ValueError if that is empty.
    """
    if f is not None and (f.ndim not in (1, 2) or f.requires_grad):
        raise ValueError(
            f'f must be a constant of 1 or 2 dimensions, not {list(f.shape)}, {f.requires_grad=}')
    up, down, padding = _pair(up, 'up'), _pair(down, 'down'), parse_padding(padding)
    if min(_output_size(x.shape, f, up, down, padding)) < 1:
        shape = [] if f is None else list(f.shape)
        raise ValueError(f'x {list(x.shape)}, filter {shape}, {up=}, {down=}, {padding=} gives no pixels')
    if f is None:
        if up == down == [1, 1]:
            x = pad_or_crop(x, padding)
            return x if gain == 1 else x * gain
        f = torch.ones([1, 1], dtype=torch.float32, device=x.device)
    return _upfirdn2d(x, f, up, down, padding, flip_filter, float(gain))


def fork(
    x: torch.Tensor, f: torch.Tensor, down: int, padding: Sequence[int], flip_filter: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, upfirdn2d(x, f)), for two branches of a network: the adjoint of the filter also adds their
    gradients, without a separate pass.
    """
    is_plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    if is_plain and torch.is_grad_enabled() and x.requires_grad:
        return _Fork.apply(x, f, [down, down], parse_padding(padding), flip_filter)
    return x, upfirdn2d(x, f, down=down, padding=padding, flip_filter=flip_filter)


def filter2d(
    x: torch.Tensor, f: torch.Tensor | None, padding: int | Sequence[int] = 0, flip_filter: bool = False,
    gain: float = 1, impl: str = 'cuda',
) -> torch.Tensor:
    """Filter x; keeps the size, except for the user's padding."""
    fw, fh = filter_size(f)
    padding = _add(padding, [fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2])
    return upfirdn2d(x, f, padding=padding, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: torch.Tensor, f: torch.Tensor | None, up: int | Sequence[int] = 2, padding: int | Sequence[int] = 0,
    flip_filter: bool = False, gain: float = 1, impl: str = 'cuda',
) -> torch.Tensor:
    """Enlarge x by `up`, keeping its mean; the user's padding counts output pixels."""
    (fw, fh), (ux, uy) = filter_size(f), _pair(up, 'up')
    padding = _add(padding, [(fw + ux - 1) // 2, (fw - ux) // 2, (fh + uy - 1) // 2, (fh - uy) // 2])
    return upfirdn2d(x, f, up=[ux, uy], padding=padding, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(
    x: torch.Tensor, f: torch.Tensor | None, down: int | Sequence[int] = 2, padding: int | Sequence[int] = 0,
    flip_filter: bool = False, gain: float = 1, impl: str = 'cuda',
) -> torch.Tensor:
    """Shrink x by `down`; the user's padding counts input pixels."""
    (fw, fh), (dx, dy) = filter_size(f), _pair(down, 'down')
    padding = _add(padding, [(fw - dx + 1) // 2, (fw - dx) // 2, (fh - dy + 1) // 2, (fh - dy) // 2])
    return upfirdn2d(x, f, down=[dx, dy], padding=padding, flip_filter=flip_filter, gain=gain)


def filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter as setup_filter() makes it; None is a single tap."""
    return (1, 1) if f is None else (int(f.shape[-1]), int(f.shape[0]))


def parse_padding(padding: int | Sequence[int]) -> list[int]:
    """An int, [x, y] or [x0, x1, y0, y1] as [x0, x1, y0, y1]. Raises ValueError on anything else."""
    values = [padding] if isinstance(padding, int) else list(padding)
    if len(values) not in (1, 2, 4) or not all(isinstance(v, int) for v in values):
        raise ValueError(f'padding must be an int, [x, y] or [x0, x1, y0, y1], not {padding!r}')
    if len(values) == 1:
        return values * 4
    return values if len(values) == 4 else [values[0], values[0], values[1], values[1]]


def pad_or_crop(x: torch.Tensor, padding: list[int]) -> torch.Tensor:
    """x [N, C, H, W] with zeros around it, or without its margins: [x0, x1, y0, y1], negative crops."""
    if not any(padding):
        return x
    (h, w), (x0, x1, y0, y1) = x.shape[2:], padding
    # A side may crop more than x has when the other side pads; F.pad would crop first and fail.
    if min(x0, x1) < -w or min(y0, y1) < -h:
        x = F.pad(x, [max(p, 0) for p in padding])
        padding = [min(p, 0) for p in padding]
    return F.pad(x, padding)


def _to_numpy(f: Any) -> Any:
    return f.detach().cpu().numpy() if isinstance(f, torch.Tensor) else f


def _pair(value: int | Sequence[int], name: str) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= 1 for v in pair):
        raise ValueError(f'{name} must be an int of at least 1, or [x, y] of such, not {value!r}')
    return pair


def _add(padding: int | Sequence[int], extra: list[int]) -> list[int]:
    return [p + e for p, e in zip(parse_padding(padding), extra, strict=True)]


def _output_size(
    shape: Sequence[int], f: torch.Tensor | None, up: list[int], down: list[int], padding: list[int],
) -> tuple[int, int]:
    """(height, width) of the result."""
    (fw, fh), (x0, x1, y0, y1) = filter_size(f), padding
    return (shape[2] * up[1] + y0 + y1 - fh) // down[1] + 1, (shape[3] * up[0] + x0 + x1 - fw) // down[0] + 1


# The operator. Arguments after f: up, down [x, y]; padding [x0, x1, y0, y1]; flip_filter; gain.

def _reference(
    x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int], flip: bool,
    gain: float,
) -> torch.Tensor:
    if x.numel() == 0:
        return _fake(x, f, up, down, padding, flip, gain)
    taps, layout = (f if gain == 1 else f * gain).to(x.dtype), memory_format_of(x)
    if not flip:
        taps = taps.flip(list(range(f.ndim)))
    if f.ndim == 2:
        return _correlate(x, taps, up, down, padding, layout)
    # The first pass applies the whole gain, so the second one uses the unscaled filter.
    bare = f.to(x.dtype) if flip else f.to(x.dtype).flip(0)
    x = _correlate(x, taps[None, :], [up[0], 1], [down[0], 1], [*padding[:2], 0, 0], layout)
    return _correlate(x, bare[:, None], [1, up[1]], [1, down[1]], [0, 0, *padding[2:]], layout)


def _correlate(
    x: torch.Tensor, taps: torch.Tensor, up: list[int], down: list[int], padding: list[int],
    layout: torch.memory_format,
) -> torch.Tensor:
    """One pass with a 2-D filter, by correlation; the result is in the given memory format."""
    channels = x.shape[1]
    if up == [1, 1]:
        y = _correlate_padded(x, taps.expand(channels, 1, *taps.shape), down, padding)
        return y.contiguous(memory_format=layout)
    # A transposed convolution scatters each sample by the filter: no zero-stuffed image is ever built.
    (fw, fh), (x0, x1, y0, y1) = filter_size(taps), padding
    lo, hi = (fh - 1 - y0, fw - 1 - x0), (fh - up[1] - y1, fw - up[0] - x1)  # rows and columns to cut off
    cut = [max(min(pair), 0) for pair in zip(lo, hi, strict=True)]
    weight = taps.flip([0, 1]).expand(channels, 1, fh, fw)
    # On a CPU, depthwise transposed convolutions in 16 bits are slow; float32 is 50 times faster.
    compute = torch.float32 if x.device.type == 'cpu' and x.dtype in HALF_DTYPES else x.dtype
    y = F.conv_transpose2d(
        x.to(compute), weight.to(compute), stride=up[::-1], padding=cut, groups=channels).to(x.dtype)
    rest = [cut[1] - lo[1], cut[1] - hi[1], cut[0] - lo[0], cut[0] - hi[0]]
    y = pad_or_crop(y, rest)
    return y[:, :, ::down[1], ::down[0]].contiguous(memory_format=layout)


def _correlate_padded(
    x: torch.Tensor, weight: torch.Tensor, down: list[int], padding: list[int],
) -> torch.Tensor:
    x0, x1, y0, y1 = padding
    # Padding inside the convolution saves a copy, but in NCHW on a CPU it leaves the fast depthwise kernel.
    inside = x0 == x1 >= 0 and y0 == y1 >= 0 and not (x.device.type == 'cpu' and x.is_contiguous())
    if not inside:
        x = pad_or_crop(x, padding)
    return F.conv2d(x, weight, stride=down[::-1], padding=(y0, x0) if inside else 0, groups=x.shape[1])


def _fake(
    x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int], flip: bool,
    gain: float,
) -> torch.Tensor:
    size = _output_size(x.shape, f, up, down, padding)
    shape = [*x.shape[:2], *size]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, f, ctx.up, ctx.down, ctx.padding, ctx.flip, ctx.gain = inputs
    ctx.save_for_backward(f)
    ctx.in_size, ctx.out_size = x.shape[2:], output.shape[2:]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple:
    (f,) = ctx.saved_tensors
    padding = adjoint_padding(filter_size(f), ctx.up, ctx.down, ctx.padding, ctx.in_size, ctx.out_size)
    dx = _upfirdn2d(dy, f, ctx.down, ctx.up, padding, not ctx.flip, ctx.gain)
    return dx, None, None, None, None, None, None


# The same plus a tensor r with the shape of the result.

def _plus_reference(
    x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int], flip: bool,
    gain: float, r: torch.Tensor,
) -> torch.Tensor:
    return _upfirdn2d.run(x, f, up, down, padding, flip, gain).add_(r)


def _plus_fake(
    x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int], flip: bool,
    gain: float, r: torch.Tensor,
) -> torch.Tensor:
    return _fake(x, f, up, down, padding, flip, gain)


def _plus_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _setup_context(ctx, inputs[:-1], output)


def _plus_backward(ctx: Any, dy: torch.Tensor) -> tuple:
    filtered = _backward(ctx, dy) if ctx.needs_input_grad[0] else [None] * 7
    return *filtered, dy


class _Fork(torch.autograd.Function):
    """fork() with gradients. Not an operator, since operators may not return their inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, f: torch.Tensor, down: list[int], padding: list[int], flip: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        filtered = _upfirdn2d.run(x, f, [1, 1], down, padding, flip, 1.0)
        _setup_context(ctx, (x, f, [1, 1], down, padding, flip, 1.0), filtered)
        ctx.set_materialize_grads(False)
        return x.view_as(x), filtered

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor | None, dfiltered: torch.Tensor | None) -> tuple:
        if dfiltered is None:
            return dx, None, None, None, None
        (f,) = ctx.saved_tensors
        padding = adjoint_padding(filter_size(f), ctx.up, ctx.down, ctx.padding, ctx.in_size, ctx.out_size)
        adjoint = dfiltered, f, ctx.down, ctx.up, padding, not ctx.flip, ctx.gain
        total = _upfirdn2d(*adjoint) if dx is None else _upfirdn2d_plus(*adjoint, dx)
        return total, None, None, None, None


def adjoint_padding(
    size: tuple[int, int], up: list[int], down: list[int], padding: list[int], in_size: Sequence[int],
    out_size: Sequence[int],
) -> list[int]:
    """Padding of the gradient: upfirdn2d with up and down swapped and the filter reversed.

    size: (width, height) of the filter; in_size, out_size: [rows, columns] of the forward pass.
    """
    (fw, fh), (x0, _, y0, _), (h, w), (out_h, out_w) = size, padding, in_size, out_size
    return [fw - x0 - 1, w * up[0] - out_w * down[0] + x0 - up[0] + 1,
            fh - y0 - 1, h * up[1] - out_h * down[1] + y0 - up[1] + 1]


_upfirdn2d = define_op(
    'upfirdn2d(Tensor x, Tensor f, int[] up, int[] down, int[] padding, bool flip_filter, float gain) '
    '-> Tensor',
    reference=_reference, fake=_fake, setup_context=_setup_context, backward=_backward,
    cuda=upfirdn2d_cuda.upfirdn2d,
)

_upfirdn2d_plus = define_op(
    'upfirdn2d_plus(Tensor x, Tensor f, int[] up, int[] down, int[] padding, bool flip_filter, float gain, '
    'Tensor r) -> Tensor',
    reference=_plus_reference, fake=_plus_fake, setup_context=_plus_setup_context, backward=_plus_backward,
    cuda=upfirdn2d_cuda.upfirdn2d_plus,
)
