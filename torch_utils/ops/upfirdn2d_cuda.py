# SPDX-License-Identifier: Apache-2.0
"""Launch geometry of csrc/upfirdn2d*.cu: selection of kernels, and their compile-time constants.

Small filters with factors of 1 and 2 get a specialised kernel: NCHW through shared memory, NHWC by vectors of
channels. All others use the general kernel, separable filters in two passes.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import native

LANES, ROWS = 32, 8  # threads of a block across and down (upfirdn2d_tile.cu)
MAX_TAPS_2D, MAX_TAPS_1D = 36, 16  # the taps stay in registers
MAX_FACTOR = 2
PIXEL_THREADS, PIXEL_LANES = 128, 8  # of a block (upfirdn2d_pixel.cu); vectors side by side: 128 bytes
PIXEL_STRIPS = (16, 8, 4)  # units down a thread: the most that leave PIXEL_BLOCKS blocks
PIXEL_BLOCKS = 512  # four on every multiprocessor of the largest device there is
PIXEL_SUMS = 64  # registers for unfinished outputs
SMALL = 16  # images of at most this side fill too little of a tile
SHARED_BYTES = 48 * 1024  # available to a block on every device by default


@dataclass(frozen=True)
class Geometry:
    """Compile-time constants of a specialised kernel; pairs are [x, y] and phases (-padding) mod up."""

    up: tuple[int, int]
    down: tuple[int, int]
    filter_size: tuple[int, int]
    phase: tuple[int, int]
    separable: bool = False

    @property
    def unit(self) -> tuple[int, int]:
        """Outputs after which the pattern of taps repeats."""
        return tuple(up // math.gcd(up, down) for up, down in zip(self.up, self.down, strict=True))

    def macros(self) -> dict[str, int]:
        """For the compiler."""
        values = {'UP': self.up, 'DOWN': self.down, 'PHASE': self.phase}
        sizes = {f'{name}{axis}': pair[i] for name, pair in values.items() for i, axis in enumerate('XY')}
        return {**sizes, 'FW': self.filter_size[0], 'FH': self.filter_size[1]}

    @property
    def step(self) -> tuple[int, int]:
        """Inputs from one unit to the next."""
        return tuple(down // math.gcd(up, down) for up, down in zip(self.up, self.down, strict=True))

    def span(self, outputs: int, axis: int) -> int:
        """Inputs that `outputs` neighbours see."""
        first_tap = (outputs - 1) * self.down[axis] + self.phase[axis]
        return (first_tap + self.filter_size[axis] - 1) // self.up[axis] + 1


@dataclass(frozen=True)
class Tile:
    """Outputs of a block: `cols` units across a thread, 32 apart, and `units` units down."""

    cols: int
    units: int

    def size(self, geometry: Geometry) -> tuple[int, int]:
        """(width, height) in outputs."""
        return LANES * self.cols * geometry.unit[0], ROWS * self.units * geometry.unit[1]

    def shared_bytes(self, geometry: Geometry, element: int) -> int:
        """Shared memory of a block at `element` bytes an accumulator."""
        width, height = self.size(geometry)
        rows, columns = geometry.span(height, 1), geometry.span(width, 0)
        columns += -columns % geometry.down[0]
        return rows * (columns + (width if geometry.separable else 0)) * element


@dataclass(frozen=True)
class Plain:
    """No epilogue; optionally adds a tensor with the shape of the result."""

    addend: torch.Tensor | None = None

    def macros(self) -> dict[str, int]:
        """For the compiler."""
        return {} if self.addend is None else {'ADDEND': 1}

    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        """What all kernels take after x, f and y."""
        return None, None, None

    def numbers(self) -> tuple[int, float, float, float]:
        """(noise_step, alpha, gain, clamp) as the kernels take them."""
        return 0, 0.0, 1.0, -1.0

    def last_pointers(self) -> tuple[torch.Tensor | None, ...]:
        """What kernels made with ADDEND take after all else."""
        return () if self.addend is None else (self.addend,)

    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """What the NHWC kernel reads and writes by vectors, besides x and y."""
        return self.last_pointers()


@dataclass(frozen=True)
class Fused:
    """The epilogue of a modulated convolution, run on the filtered image; noise, b may be None."""

    d: torch.Tensor
    noise: torch.Tensor | None
    b: torch.Tensor
    noise_step: int
    act_number: int
    alpha: float
    gain: float
    clamp: float
    next_scale: torch.Tensor | None = None  # [N, C], by which the result is multiplied
    keeps_unscaled: bool = False  # whether the result without it is wanted, too
    unscaled: torch.Tensor | None = None  # the memory for that

    def macros(self) -> dict[str, int]:
        """For the compiler."""
        macros = {'EPILOGUE': 1, 'NOISE': int(self.noise is not None), 'BIAS': 1, 'ACT': self.act_number}
        return macros if self.next_scale is None else {**macros, 'NEXT': 1}

    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        """As Plain.pointers()."""
        return self.d, self.noise, self.b

    def numbers(self) -> tuple[int, float, float, float]:
        """As Plain.numbers()."""
        return self.noise_step, self.alpha, self.gain, self.clamp

    def last_pointers(self) -> tuple[torch.Tensor | None, ...]:
        """What kernels made with NEXT take after all else."""
        return () if self.next_scale is None else (self.next_scale, self.unscaled)

    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """As Plain.vectors()."""
        return self.d, self.b, *self.last_pointers()


@dataclass(frozen=True)
class Prelude:
    """What precedes the filter, in NHWC only: act(x + b) within +-clamp, for 0 <= alpha <= 1."""

    b: torch.Tensor
    act_number: int
    alpha: float
    clamp: float

    def macros(self) -> dict[str, int]:
        """For the compiler."""
        return {'PRELUDE': 1, 'ACT': self.act_number}

    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        """As Plain.pointers()."""
        return None, None, self.b

    def numbers(self) -> tuple[int, float, float, float]:
        """As Plain.numbers()."""
        return 0, self.alpha, 1.0, self.clamp

    def last_pointers(self) -> tuple[torch.Tensor | None, ...]:
        """Nothing."""
        return ()

    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """As Plain.vectors()."""
        return (self.b,)


@dataclass
class Gradient:
    """The gradient of an operation on x, [N, C, H, W], of which the filtered image is that of the result; in
    NHWC only. act(x + b) * gain within +-clamp, or x * d; the other one of b and d is None.
    """

    x: torch.Tensor
    act_number: int
    alpha: float
    gain: float
    clamp: float
    d: torch.Tensor | None = None
    b: torch.Tensor | None = None
    wants_sums: bool = True  # for the gradient of d or b
    sums: torch.Tensor | None = None  # [N, parts, C], made with the launch

    def macros(self) -> dict[str, int]:
        """For the compiler."""
        if self.b is None:
            return {'GRADIENT': 2}
        return {'GRADIENT': 1, 'BIAS': 1, 'ACT': self.act_number}

    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        """As Plain.pointers()."""
        return self.d, None, self.b

    def numbers(self) -> tuple[int, float, float, float]:
        """As Plain.numbers()."""
        return 0, self.alpha, self.gain, self.clamp

    def last_pointers(self) -> tuple[torch.Tensor | None, ...]:
        """What kernels made with GRADIENT take after all else."""
        return self.x, self.sums

    def vectors(self) -> tuple[torch.Tensor | None, ...]:
        """As Plain.vectors()."""
        return self.x, self.d, self.b


def upfirdn2d(
    x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int], flip: bool,
    gain: float,
) -> torch.Tensor | None:
    """Native form of the operator upfirdn2d; None for a case that is left to the reference."""
    if not native.supports(x) or not _fits(f, x):
        return None
    x, f, geometry = native.packed(x), f.contiguous(), geometry_of(f, up, down, padding)
    y = _empty_output(x, geometry, padding)
    if y.numel() == 0:
        return y
    if _launch_specialised(x, f, y, geometry, padding, flip, gain, Plain()):
        return y
    if not geometry.separable:
        _launch_general(x, f, y, geometry, padding, flip, gain)
        return y
    along = geometry_of(f[None, :], [up[0], 1], [down[0], 1], [*padding[:2], 0, 0])
    middle = _empty_output(x, along, [*padding[:2], 0, 0])
    _launch_general(x, f[None, :], middle, along, [*padding[:2], 0, 0], flip, gain)
    across = geometry_of(f[:, None], [1, up[1]], [1, down[1]], [0, 0, *padding[2:]])
    _launch_general(middle, f[:, None], y, across, [0, 0, *padding[2:]], flip, 1.0)
    return y


def upfirdn2d_plus(
    x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int], flip: bool,
    gain: float, r: torch.Tensor,
) -> torch.Tensor | None:
    """Native form of the operator upfirdn2d_plus; None where only the general kernel would do."""
    if not native.supports(x, r) or not _fits(f, x):
        return None
    x, geometry = native.packed(x), geometry_of(f, up, down, padding)
    y = _empty_output(x, geometry, padding)
    done = y.numel() > 0 and _launch_specialised(
        x, f.contiguous(), y, geometry, padding, flip, gain, Plain(native.dense(r, y)))
    return y if done else None


def filtered_epilogue(
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, fused: Fused,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """(result, unscaled result): filter x and finish it in the same pass. None where only the general kernel
    would do.
    """
    if not native.supports(x, fused.d, fused.noise, fused.b, fused.next_scale) or not _fits(f, x):
        return None
    x, geometry = native.packed(x), geometry_of(f, [1, 1], [1, 1], padding)
    y = _empty_output(x, geometry, padding)
    if fused.keeps_unscaled:
        fused = dataclasses.replace(fused, unscaled=torch.empty_like(y))
    done = y.numel() > 0 and _launch_specialised(
        x, f.contiguous(), y, geometry, padding, flip, filter_gain, fused)
    return (y, fused.unscaled) if done else None


def activated_filter(
    x: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, prelude: Prelude,
) -> torch.Tensor | None:
    """Filter what the prelude makes of x in the same pass. None where that is left to separate operators."""
    if not native.supports(x, prelude.b) or not _fits(f, x):
        return None
    x, geometry = native.packed(x), geometry_of(f, [1, 1], [1, 1], padding)
    y = _empty_output(x, geometry, padding)
    done = y.numel() > 0 and native.is_channels_last(x) and _launch_specialised(
        x, f.contiguous(), y, geometry, padding, flip, filter_gain, prelude)
    return y if done else None


def filtered_gradient(
    dy: torch.Tensor, f: torch.Tensor, padding: list[int], flip: bool, filter_gain: float, gradient: Gradient,
) -> torch.Tensor | None:
    """Filter dy and continue with the gradient in the same pass; makes gradient.sums if they are wanted. None
    where that is left to separate operators.
    """
    if not native.supports(dy, gradient.x, gradient.b, gradient.d) or not _fits(f, dy):
        return None
    dy, geometry = native.packed(dy, gradient.x), geometry_of(f, [1, 1], [1, 1], padding)
    dx = _empty_output(dy, geometry, padding)
    gradient.x = native.dense(gradient.x, dx)
    done = dx.numel() > 0 and native.is_channels_last(dy) and _launch_specialised(
        dy, f.contiguous(), dx, geometry, padding, flip, filter_gain, gradient)
    return dx if done else None


def geometry_of(f: torch.Tensor, up: list[int], down: list[int], padding: list[int]) -> Geometry:
    """Compile-time constants of a call."""
    phase = (-padding[0] % up[0], -padding[2] % up[1])
    return Geometry(tuple(up), tuple(down), (f.shape[-1], f.shape[0]), phase, f.ndim == 1)


def is_specialised(geometry: Geometry) -> bool:
    """Whether a specialised kernel is worth compiling."""
    (fw, fh), separable = geometry.filter_size, geometry.separable
    return max(*geometry.up, *geometry.down) <= MAX_FACTOR and (
        fw <= MAX_TAPS_1D if separable else fw * fh <= MAX_TAPS_2D)


@functools.cache
def tile_for(geometry: Geometry, is_wide: bool) -> Tile:
    """The shape of a tile: tall enough to share its rows of inputs, small enough for many blocks."""
    wanted = {1: 4, 2: 2}[geometry.unit[1] * geometry.down[1]]
    return Tile(2 if is_wide and geometry.down[0] == 1 else 1, wanted)


def tile_kernel(dtype: torch.dtype, geometry: Geometry, tile: Tile, epilogue: tuple = ()) -> Kernel:
    """A specialisation for NCHW; epilogue: items of Fused.macros()."""
    return native.kernel(
        'upfirdn2d_tile.cu', 'upfirdn2d_tile', SCALAR_T=native.TYPE_NAMES[dtype],
        SEPARABLE=int(geometry.separable), COLS=tile.cols, UNITS=tile.units, **geometry.macros(),
        **dict(epilogue))


def pixel_kernel(dtype: torch.dtype, geometry: Geometry, vec: int, epilogue: tuple = ()) -> Kernel:
    """A specialisation for NHWC with `vec` channels a thread."""
    return native.kernel(
        'upfirdn2d_pixel.cu', 'upfirdn2d_pixel', SCALAR_T=native.TYPE_NAMES[dtype], VEC=vec,
        ACROSS=pixel_across(dtype, geometry, vec, 'NEXT' in dict(epilogue)), **geometry.macros(),
        **dict(epilogue))


def pixel_across(dtype: torch.dtype, geometry: Geometry, vec: int, is_scaled: bool = False) -> int:
    """Units across a thread of the NHWC kernel: two outputs share most of their inputs. One where the result
    is also scaled: there is no register left for that.
    """
    is_possible = geometry.unit[0] == 1 and 2 * _pixel_sums(dtype, geometry, vec) <= PIXEL_SUMS
    return 2 if is_possible and not is_scaled else 1


def _pixel_sums(dtype: torch.dtype, geometry: Geometry, vec: int) -> int:
    """Registers in which the NHWC kernel keeps outputs that still lack inputs, at one unit across."""
    pending = _ceil(geometry.span(geometry.unit[1], 1), geometry.step[1])
    registers = vec * native.accumulator(dtype).itemsize // 4
    return (pending - 1) * geometry.unit[0] * geometry.unit[1] * registers


def general_kernel(dtype: torch.dtype, channels_last: bool) -> Kernel:
    """The kernel for any filter."""
    return native.kernel(
        'upfirdn2d.cu', 'upfirdn2d', SCALAR_T=native.TYPE_NAMES[dtype], CHANNELS_LAST=int(channels_last))


def _fits(f: torch.Tensor, x: torch.Tensor) -> bool:
    return f.dtype == torch.float32 and f.device == x.device


def _empty_output(x: torch.Tensor, geometry: Geometry, padding: list[int]) -> torch.Tensor:
    (ux, uy), (dx, dy), (fw, fh) = geometry.up, geometry.down, geometry.filter_size
    fh = fw if geometry.separable else fh
    h = (x.shape[2] * uy + padding[2] + padding[3] - fh) // dy + 1
    w = (x.shape[3] * ux + padding[0] + padding[1] - fw) // dx + 1
    layout = torch.channels_last if native.is_channels_last(x) else torch.contiguous_format
    return torch.empty([*x.shape[:2], h, w], dtype=x.dtype, device=x.device, memory_format=layout)


def _launch_specialised(
    x: torch.Tensor, f: torch.Tensor, y: torch.Tensor, geometry: Geometry, padding: list[int], flip: bool,
    filter_gain: float, fused: Fused | Plain | Prelude | Gradient,
) -> bool:
    """Fill y by a kernel made for this geometry, if there is one."""
    if not is_specialised(geometry):
        return False
    noise_step, *rest = fused.numbers()
    sizes = (*x.shape[1:], *y.shape[2:], padding[0], padding[2], int(flip), noise_step)
    pointers = (x, f, y, *fused.pointers())
    fill = _fill_by_pixels if native.is_channels_last(x) else _fill_by_tiles
    return fill(pointers, (*sizes, float(filter_gain), *rest), geometry, fused)


def _fill_by_pixels(
    pointers: tuple, numbers: tuple, geometry: Geometry, fused: Fused | Plain | Prelude | Gradient,
) -> bool:
    x, _, y, *_ = pointers
    (n, c, h, w), (unit_x, unit_y) = y.shape, geometry.unit
    vec = native.vector_width(c, x, y, *fused.vectors())
    if (vec == 1 and c > 1) or geometry.separable or not native.has_short_offsets(x, y):
        return False
    while vec > 1 and _pixel_sums(x.dtype, geometry, vec) > PIXEL_SUMS:
        vec //= 2
    is_scaled = 'NEXT' in fused.macros()
    units = _ceil(w, unit_x * pixel_across(x.dtype, geometry, vec, is_scaled))
    # Narrow images have more channels side by side instead.
    lanes = min(_power_of_two(c // vec), max(PIXEL_LANES, PIXEL_THREADS // _power_of_two(units)))
    block = (lanes, PIXEL_THREADS // lanes, 1)
    chunks, across = _ceil(c // vec, lanes), _ceil(units, block[1])
    for strip in PIXEL_STRIPS:
        strips = _ceil(h, strip * unit_y)
        blocks = n * strips * across * chunks
        if blocks >= PIXEL_BLOCKS:
            break
    if isinstance(fused, Gradient) and fused.wants_sums:
        fused.sums = torch.empty(
            [n, strips * across, c], dtype=native.accumulator(x.dtype), device=x.device)
    *sizes, gain, alpha, act_gain, clamp = numbers
    kernel = pixel_kernel(x.dtype, geometry, vec, tuple(fused.macros().items()))
    arguments = (*pointers, *sizes, chunks, across, strips, strip, gain, alpha, act_gain, clamp)
    arguments = (*arguments, *fused.last_pointers())
    native.launch(kernel, blocks, arguments, x.device, block)
    return True


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def _fill_by_tiles(pointers: tuple, numbers: tuple, geometry: Geometry, fused: Fused | Plain) -> bool:
    x, _, y, *_ = pointers
    n, c, h, w = y.shape
    tile = tile_for(geometry, w > LANES * geometry.unit[0])
    element = native.accumulator(x.dtype).itemsize
    is_small = max(h, w) <= SMALL and isinstance(fused, Plain)
    if is_small or tile.shared_bytes(geometry, element) > SHARED_BYTES:
        return False
    width, height = tile.size(geometry)
    kernel = tile_kernel(x.dtype, geometry, tile, tuple(fused.macros().items()))
    blocks = n * c * _ceil(h, height) * _ceil(w, width)
    native.launch(kernel, blocks, (*pointers, *numbers, *fused.last_pointers()), x.device, (LANES, ROWS, 1))
    return True


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _launch_general(
    x: torch.Tensor, f: torch.Tensor, y: torch.Tensor, geometry: Geometry, padding: list[int], flip: bool,
    gain: float,
) -> None:
    native.launch(
        general_kernel(x.dtype, native.is_channels_last(x)), native.blocks_for(y.numel()),
        (x, f, y, y.numel(), *x.shape[1:], *y.shape[2:], *geometry.up, *geometry.down, padding[0], padding[2],
         *geometry.filter_size, int(flip), float(gain)), x.device)
