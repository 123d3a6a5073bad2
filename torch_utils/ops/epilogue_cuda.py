# SPDX-License-Identifier: Apache-2.0
"""Launch geometry of csrc/epilogue*.cu and csrc/modulated_weight.cu. Each function computes its operator, or
returns None to leave a case to the reference.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import native, upfirdn2d_cuda
from torch_utils.ops.bias_act_cuda import ACT_NUMBERS

WARP = 32
ROWS_EACH = 32  # most rows per thread; their partial sums are a small part of the traffic
MANY_BLOCKS = 1056  # eight for every multiprocessor of the largest device there is; shorter walks below that
SUM_THREADS, SUM_LANES = 512, 64  # of a block that adds up partial sums; rows side by side at most
SUM_ROWS = 4  # that a thread adds before more lanes are used


@dataclass(frozen=True)
class Walk:
    """How blocks share the samples of x, each a matrix [rows, cols]; see csrc/walk.cuh."""

    samples: int
    channels: int
    pixels: int
    channels_last: bool
    vec: int

    @property
    def rows(self) -> int:
        """Pixels in NHWC, channels in NCHW."""
        return self.pixels if self.channels_last else self.channels

    @property
    def cols(self) -> int:
        """The others: what is contiguous."""
        return self.channels if self.channels_last else self.pixels

    @property
    def lanes(self) -> int:
        """Threads side by side along a row, a power of two within a warp."""
        return min(1 << (self.cols // self.vec - 1).bit_length(), WARP)

    @property
    def col_chunks(self) -> int:
        """Blocks side by side along a row."""
        return native.blocks_for(self.cols, self.lanes * self.vec)

    @property
    def chunk_rows(self) -> int:
        """Rows of a block."""
        at_once = native.THREADS // self.lanes
        blocks = self.samples * self.col_chunks * native.blocks_for(self.rows, at_once)  # of one row each
        return at_once * min(max(blocks // MANY_BLOCKS, 1), ROWS_EACH)

    @property
    def row_chunks(self) -> int:
        """Blocks one below the other."""
        return native.blocks_for(self.rows, self.chunk_rows)

    @property
    def blocks(self) -> int:
        """All blocks."""
        return self.samples * self.col_chunks * self.row_chunks

    def arguments(self) -> tuple[int, ...]:
        """For the kernel."""
        return self.rows, self.cols, self.lanes, self.chunk_rows, self.col_chunks, self.row_chunks

    def partial_sums(self, of_channels: bool, like: torch.Tensor) -> torch.Tensor:
        """[N, chunks, channels or pixels] for the sums of each channel or pixel."""
        along_columns = of_channels == self.channels_last
        chunks = self.row_chunks if along_columns else self.col_chunks
        length = self.channels if of_channels else self.pixels
        dtype = native.accumulator(like.dtype)
        return torch.empty([self.samples, chunks, length], dtype=dtype, device=like.device)


def epilogue_kernel(
    entry: str, dtype: torch.dtype, channels_last: bool, vec: int, act: str = 'linear', noise: bool = False,
    bias: bool = False, of: str | None = None,
) -> Kernel:
    """One specialisation; entry: epilogue or epilogue_grad. of: NEXT, the gradient of a scaled result; INPUT,
    given the activation's input.
    """
    more = {} if of is None else {of: 1}
    return native.kernel(
        f'{entry}.cu', entry, SCALAR_T=native.TYPE_NAMES[dtype], CHANNELS_LAST=int(channels_last), VEC=vec,
        ACT=ACT_NUMBERS[act], NOISE=int(noise), BIAS=int(bias), **more)


def scale(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor | None:
    """Native form of the operator scale_channels."""
    return epilogue(x, s, None, None, 'linear', 0.0, 1.0, -1.0)


def epilogue(
    x: torch.Tensor, d: torch.Tensor, noise: torch.Tensor | None, b: torch.Tensor | None, act: str,
    alpha: float, gain: float, clamp: float,
) -> torch.Tensor | None:
    """Native form of the operator modulated_epilogue."""
    noise_step = noise_step_of(noise, x)
    if not native.supports(x, d, noise, b) or not native.has_short_offsets(x) or noise_step is None:
        return None
    x, d, noise, b = native.packed(x), d.contiguous(), _contiguous(noise), _contiguous(b)
    y = torch.empty_like(x)
    walk = _walk(x, (y,), along_channels=(d, b), along_pixels=(noise,))
    kernel = epilogue_kernel(
        'epilogue', x.dtype, walk.channels_last, walk.vec, act, noise is not None, b is not None)
    native.launch(kernel, walk.blocks, (
        x, d, noise, b, y, *walk.arguments(), noise_step, float(alpha), float(gain), float(clamp)), x.device)
    return y


def scale_grad(
    dy: torch.Tensor, x: torch.Tensor, s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator scale_channels_grad."""
    if not native.supports(dy, x, s) or not native.has_short_offsets(x):
        return None
    dy = native.packed(dy, x, dy)
    dx = torch.empty_like(dy)
    _, ds, _ = _launch_grad(
        dy, native.dense(x, dy), None, s.contiguous(), dx, [None, s.shape, None], ('linear', 0.0, 1.0, -1.0))
    return dx, ds


def epilogue_grad(  # noqa: PLR0913 (the operator's arguments)
    dy: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor, d: torch.Tensor | None,
    noise_shape: Sequence[int], wants: Sequence[bool], act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...] | None:
    """Native form of the operator modulated_epilogue_grad."""
    x = x if wants[1] else None
    if not native.supports(dy, x, y, d) or not native.has_short_offsets(y) or not _is_map(noise_shape, y):
        return None
    dy = native.packed(dy, y, dy)
    y, x, d = native.dense(y, dy), None if x is None else native.dense(x, dy), _contiguous(d)
    dx = torch.empty_like(dy) if wants[0] else None
    db, dd, dnoise = _launch_grad(
        dy, x, y, d, dx, _shapes(y, noise_shape, [wants[3], wants[1], wants[2]]), (act, alpha, gain, clamp))
    return y.new_empty(0) if dx is None else dx, dd, dnoise, db


def act_grad_both(
    dy: torch.Tensor, y: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator bias_act_grad_both: an epilogue's gradient without scales and noise."""
    grads = epilogue_grad(
        dy, None, y, None, [], [True, False, False, True], act, alpha, gain, clamp)
    return None if grads is None else (grads[0], grads[3])


def input_grad(
    dy: torch.Tensor, x: torch.Tensor, b: torch.Tensor, wants_db: bool, act: str, alpha: float, gain: float,
    clamp: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator bias_act_input_grad."""
    if not native.supports(dy, x, b) or not native.has_short_offsets(x):
        return None
    dy = native.packed(dy, x)
    dx = torch.empty_like(dy)
    db, _, _ = _launch_grad(
        dy, None, native.dense(x, dy), b.contiguous(), dx, [b.shape if wants_db else None, None, None],
        (act, alpha, gain, clamp), of='INPUT')
    return dx, db


def filtered_input_grad(  # noqa: PLR0913 (the operator's arguments)
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, x: torch.Tensor, b: torch.Tensor,
    wants_db: bool, act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator filtered_input_grad."""
    gradient = upfirdn2d_cuda.Gradient(x, ACT_NUMBERS[act], float(alpha), float(gain), float(clamp), b=b)
    return _filtered_gradient(dy, f, padding, flip, 1.0, gradient, b.shape if wants_db else None)


def filtered_scale_grad(
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, x: torch.Tensor,
    s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator filtered_scale_grad."""
    gradient = upfirdn2d_cuda.Gradient(x, ACT_NUMBERS['linear'], 0.0, 1.0, -1.0, d=s)
    return _filtered_gradient(dy, f, padding, flip, filter_gain, gradient, s.shape)


def _filtered_gradient(
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float,
    gradient: upfirdn2d_cuda.Gradient, shape: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    gradient.wants_sums = shape is not None
    dx = upfirdn2d_cuda.filtered_gradient(dy, f, padding, flip, filter_gain, gradient)
    return None if dx is None else (dx, _sums([gradient.sums, None, None], [shape, None, None], dx)[0])


def scaled_epilogue_grad(  # noqa: PLR0913 (the operator's arguments)
    dscaled: torch.Tensor, dy: torch.Tensor | None, y: torch.Tensor, s: torch.Tensor,
    noise_shape: Sequence[int], wants: Sequence[bool], act: str, alpha: float, gain: float, clamp: float,
) -> tuple[torch.Tensor, ...] | None:
    """Native form of the operator scaled_epilogue_grad."""
    if not native.supports(dscaled, dy, y, s) or not _is_map(noise_shape, y):
        return None
    dscaled = native.packed(dscaled, y, dscaled)
    y, dy = native.dense(y, dscaled), None if dy is None else native.dense(dy, dscaled)
    g = torch.empty_like(dscaled) if wants[0] else None
    shapes = _shapes(y, noise_shape, [wants[2], wants[3], wants[1]])
    db, ds, dnoise = _launch_grad(
        dscaled, dy, y, s.contiguous(), g, shapes, (act, alpha, gain, clamp), of='NEXT')
    return y.new_empty(0) if g is None else g, dnoise, db, ds


def filtered_epilogue(  # noqa: PLR0913 (the operator's arguments)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, d: torch.Tensor,
    noise: torch.Tensor | None, b: torch.Tensor, act: str, alpha: float, gain: float, clamp: float,
) -> torch.Tensor | None:
    """Native form of the operator filtered_epilogue."""
    results = _filtered(x, f, padding, flip, filter_gain, (d, noise, b, act, alpha, gain, clamp))
    return None if results is None else results[0]


def scaled_filtered_epilogue(  # noqa: PLR0913 (the operator's arguments)
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, d: torch.Tensor,
    noise: torch.Tensor | None, b: torch.Tensor, s: torch.Tensor, keeps_y: bool, act: str, alpha: float,
    gain: float, clamp: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator scaled_filtered_epilogue."""
    finish = (d, noise, b, act, alpha, gain, clamp)
    results = _filtered(
        x, f, padding, flip, filter_gain, finish, next_scale=s.contiguous(), keeps_unscaled=keeps_y)
    if results is None:
        return None
    scaled, y = results
    return scaled, x.new_empty(0) if y is None else y


def _filtered(
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, finish: tuple,
    **scaling: Any,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    d, noise, b, act, *numbers = finish
    out_h = x.shape[2] + padding[2] + padding[3] - f.shape[0] + 1
    out_w = x.shape[3] + padding[0] + padding[1] - f.shape[-1] + 1
    noise_step = noise_step_of(noise, x[:, :, :1, :1].expand(-1, -1, out_h, out_w))
    if noise_step is None:
        return None
    fused = upfirdn2d_cuda.Fused(
        d.contiguous(), _contiguous(noise), b.contiguous(), noise_step, ACT_NUMBERS[act],
        *map(float, numbers), **scaling)
    return upfirdn2d_cuda.filtered_epilogue(x, f, padding, flip, filter_gain, fused)


def demodulation(
    weight: torch.Tensor, styles: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator demodulation."""
    if not native.supports(weight, styles):
        return None
    weight, styles = weight.contiguous(), styles.contiguous()
    (n, i), o = styles.shape, weight.shape[0]
    energy = torch.empty([o, i], dtype=native.accumulator(weight.dtype), device=weight.device)
    d = styles.new_empty([n, o])
    native.launch(
        weight_kernel('demodulation', weight.dtype, weight.dtype, weight[0, 0].numel()), o,
        (weight, styles, energy, d, n, o, i, eps), weight.device)
    return d, energy.to(weight.dtype)


def modulated_weight(
    weight: torch.Tensor, styles: torch.Tensor, d: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor | None:
    """Native form of the operator modulated_weight."""
    if not native.supports(weight, styles, d) or dtype not in native.TYPE_NAMES or styles.numel() == 0:
        return None
    result = weight.new_empty([styles.shape[0], *weight.shape], dtype=dtype)
    kernel = weight_kernel('modulated_weight', weight.dtype, dtype, weight[0, 0].numel())
    native.launch(
        kernel, styles.shape[0] * weight.shape[0],
        (weight.contiguous(), styles.contiguous(), _contiguous(d), result, *weight.shape[:2]), weight.device)
    return result


def modulation(
    weight: torch.Tensor, styles: torch.Tensor, eps: float, normalise: bool, dtype: torch.dtype,
) -> tuple[torch.Tensor, ...] | None:
    """Native form of the operator modulation."""
    exact = (torch.float32, torch.float64)  # types that sums can be stored in
    if not native.supports(weight, styles) or weight.dtype not in exact or dtype not in native.TYPE_NAMES:
        return None
    weight, styles = native.packed(weight), styles.contiguous()
    (n, i), o = styles.shape, weight.shape[0]
    narrow = [torch.empty_like(weight, dtype=dtype), torch.empty_like(styles, dtype=dtype),
              styles.new_empty([n, o], dtype=dtype)]
    factors = [weight.new_empty(length if normalise else 0) for length in (o, n)]
    results = (*narrow, styles.new_empty([n, o]), weight.new_empty([o, i]), *factors)
    kernel = weight_kernel(
        'modulation', weight.dtype, dtype, weight[0, 0].numel(), native.is_channels_last(weight))
    pointers = (weight, styles, *results[:5], *(factors if normalise else (None, None)))
    native.launch(kernel, o, (*pointers, n, o, i, eps), weight.device)
    return results


def modulation_grad(  # noqa: PLR0913 (the operator's arguments)
    weight: torch.Tensor, styles: torch.Tensor, d: torch.Tensor, energy: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, to_scaled: torch.Tensor | None, to_styles: torch.Tensor | None,
    to_d: torch.Tensor | None, to_energy: torch.Tensor | None, wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Native form of the operator modulation_grad."""
    exact = (torch.float32, torch.float64)
    if not native.supports(weight, styles, d, energy, to_energy) or weight.dtype not in exact:
        return None
    scaled_types = {t.dtype for t in (to_scaled, to_styles) if t is not None} or {weight.dtype}
    d_type = weight.dtype if to_d is None else to_d.dtype
    if len(scaled_types) > 1 or not {*scaled_types, d_type} <= native.TYPE_NAMES.keys():
        return None
    weight = native.packed(weight)
    to_scaled = None if to_scaled is None else native.dense(to_scaled, weight)
    rest = [_contiguous(t) for t in (styles, d, energy)]
    factors = [t.to(weight.dtype).contiguous() if t.numel() else None for t in (a, b)]
    to_weight = torch.empty_like(weight) if wants[0] else None
    of_styles = styles.new_empty(styles.shape) if wants[1] else None
    (n, i), o = styles.shape, weight.shape[0]
    weight_blocks = o if wants[0] else 0
    tiles = native.blocks_for(i, WARP) * native.blocks_for(n, native.THREADS // WARP) if wants[1] else 0
    kernel = modulation_grad_kernel(
        weight.dtype, scaled_types.pop(), d_type, weight[0, 0].numel(), native.is_channels_last(weight))
    native.launch(kernel, weight_blocks + tiles, (
        weight, *rest, *factors, to_scaled, _contiguous(to_styles), _contiguous(to_d), _contiguous(to_energy),
        to_weight, of_styles, n, o, i, weight_blocks), weight.device)
    return (weight.new_empty(0) if to_weight is None else to_weight,
            styles.new_empty(0) if of_styles is None else of_styles)


def modulation_grad_kernel(
    dtype: torch.dtype, scaled: torch.dtype, d: torch.dtype, taps: int, channels_last: bool,
) -> Kernel:
    """One specialisation; scaled, d: element types of the gradients of scaled weight and styles, and of d."""
    return native.kernel('modulation_grad.cu', 'modulation_grad', SCALAR_T=native.TYPE_NAMES[dtype],
                         OUT_T=native.TYPE_NAMES[scaled], D_T=native.TYPE_NAMES[d], TAPS=taps,
                         CHANNELS_LAST=int(channels_last))


def weight_kernel(
    entry: str, dtype: torch.dtype, out_dtype: torch.dtype, taps: int, channels_last: bool = False,
) -> Kernel:
    """One specialisation; entry: demodulation, modulation or modulated_weight."""
    return native.kernel('modulated_weight.cu', entry, SCALAR_T=native.TYPE_NAMES[dtype],
                         OUT_T=native.TYPE_NAMES[out_dtype], TAPS=taps, CHANNELS_LAST=int(channels_last))


def noise_step_of(noise: torch.Tensor | None, x: torch.Tensor) -> int | None:
    """Elements from one sample's noise to the next; None unless it is one map for x, or one per sample."""
    if noise is None:
        return 0
    if noise.ndim < 2 or not _is_map(noise.shape, x):
        return None
    return x.shape[2] * x.shape[3] if noise.ndim == 4 and noise.shape[0] > 1 else 0


def _is_map(shape: Sequence[int], x: torch.Tensor) -> bool:
    """Whether noise of this shape has every pixel of x and one channel; an empty shape means no noise."""
    if len(shape) == 0:
        return True
    leading = tuple(shape[:-2])
    return tuple(shape[-2:]) == tuple(x.shape[2:]) and leading in ((), (1,), (1, 1), (x.shape[0], 1))


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _walk(
    x: torch.Tensor, same: Sequence[torch.Tensor | None], along_channels: Sequence[torch.Tensor | None],
    along_pixels: Sequence[torch.Tensor | None] = (),
) -> Walk:
    """For x and tensors of its layout; the others are read by vectors only along the columns."""
    n, c, h, w = x.shape
    last = native.is_channels_last(x)
    vec = native.vector_width(c if last else h * w, x, *same, *(along_channels if last else along_pixels))
    return Walk(n, c, h * w, last, vec)


def _shapes(
    y: torch.Tensor, noise_shape: Sequence[int], wants: Sequence[bool],
) -> list[Sequence[int] | None]:
    """Of the sums for bias, channel scales and noise; None for unneeded ones."""
    shapes = [y.shape[1:2], y.shape[:2], noise_shape]
    return [shape if wanted else None for shape, wanted in zip(shapes, wants, strict=True)]


def _launch_grad(
    dy: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None, d: torch.Tensor | None,
    dx: torch.Tensor | None, shapes: Sequence[Sequence[int] | None], spec: tuple[str, float, float, float],
    of: str | None = None,
) -> list[torch.Tensor]:
    """Fill dx and return the sums that have a shape, else an empty tensor: of g and of g * x a channel, of g
    a pixel.
    """
    walk = _walk(dy, (x, y, dx), along_channels=(d,))
    parts = [None if shape is None else walk.partial_sums(i < 2, dy) for i, shape in enumerate(shapes)]
    act, *rest = spec
    kernel = epilogue_kernel('epilogue_grad', dy.dtype, walk.channels_last, walk.vec, act, of=of)
    arguments = (dy, x, y, d, dx, *parts, *walk.arguments(), *map(float, rest))
    native.launch(kernel, walk.blocks, arguments, dy.device)
    return _sums(parts, shapes, dy)


def _sums(
    parts: Sequence[torch.Tensor | None], shapes: Sequence[Sequence[int] | None], like: torch.Tensor,
) -> list[torch.Tensor]:
    """Partial sums [N, chunks, length], added up to these shapes in one launch."""
    results, arguments, total = [], [], 0
    for part, shape in zip(parts, shapes, strict=True):
        results.append(like.new_empty(0 if shape is None else shape))
        if part is None:
            arguments += [None, None, 0, 1, 1, 0]
            continue
        samples, chunks, length = part.shape
        rows = samples * chunks * length // results[-1].numel()
        lanes = min(SUM_LANES, 1 << (native.blocks_for(rows, SUM_ROWS) - 1).bit_length())
        blocks = results[-1].numel() // length * native.blocks_for(length, SUM_THREADS // lanes)
        arguments += [part, results[-1], rows, length, lanes, blocks]
        total += blocks
    if total:
        native.launch(sums_kernel(like.dtype), total, arguments[:-1], like.device, (SUM_THREADS, 1, 1))
    return results


def sums_kernel(dtype: torch.dtype) -> Kernel:
    """The kernel that adds up partial sums to results of a type."""
    return native.kernel('partial_sums.cu', 'partial_sums', SCALAR_T=native.TYPE_NAMES[dtype])
