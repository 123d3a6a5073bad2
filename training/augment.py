# SPDX-License-Identifier: Apache-2.0
"""Augmentation of all images that D sees: geometry, colour, frequency, noise, cutout (ADA, App. B).

TRANSFORMS below is the pipeline, one row per transform. The parameters of all images are drawn and combined
on the host, in NumPy: faster than many tiny kernels, no synchronization, and the same draws on every device.
"""
from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import torch

from torch_utils import persistence
from torch_utils.ops import upfirdn2d
from training.augmentation import matrices
from training.augmentation.matrices import LUMA_AXIS
from training.augmentation.numbers import (
    HALF_NORMAL,
    NORMAL,
    UNIFORM,
    Numbers,
    QuantileNumbers,
    RandomNumbers,
    UserError,
)
from training.augmentation.plain import PlainDraws
from training.augmentation.resample import Margins, filter_each, plan_warp, warp

try:
    from torch_utils import host_draws
except ImportError:  # a copy of the published torch_utils
    host_draws = PlainDraws

BAND_POWER = np.array([10, 1, 1, 1]) / 13  # of natural images in the four bands of imgfilter (ADA, App. B)

@dataclass(frozen=True, eq=False)
class Transform:
    """One row of the pipeline.

    name: the attribute with its multiplier; 0 disables the row, else it is applied to an image with
    probability chance(multiplier * p).  source: distribution of its `count` random numbers r [count, N].
    value(pipe, r): its parameter t.  neutral: t of images to which it is not applied, which stay bitwise
    equal.
    matrix: t [count, N] -> [N, d + 1, d + 1]; geometric ones also take width and height, and map output to
    input.  parts(pipe): factors of the multiplier for parts that are applied independently.
    rgb_only: skipped for gray images.  has_quantile: whether debug_percentile applies it.
    """

    name: str
    source: str
    value: Callable[[Any, np.ndarray], np.ndarray]
    neutral: float
    matrix: Callable[..., np.ndarray] | None = None
    count: int = 1
    chance: Callable[[np.ndarray], np.ndarray] = lambda c: c
    parts: Callable[[Any], Sequence[float]] = lambda pipe: (1.0,)
    rgb_only: bool = False
    has_quantile: bool = True


def _one_of_two_rotations(chance: np.ndarray) -> np.ndarray:
    """Probability of each of two independent rotations such that at least one happens with this chance."""
    return 1 - np.sqrt(np.clip(1 - chance, 0, 1))


_rotation = functools.partial(
    Transform, 'rotate', UNIFORM, lambda pipe, u: (2 * u - 1) * math.pi * pipe.rotate_max, 0,
    lambda t, w, h: matrices.rotate2d(t[0]), chance=_one_of_two_rotations)

# In the order in which they are applied; the matrices are the inverse, output position -> input position.
GEOMETRY = (
    Transform('xflip', UNIFORM, lambda pipe, u: np.floor(2 * u), 0,
              lambda i, w, h: matrices.scale(1 - 2 * i[0], 1.0)),
    Transform('rotate90', UNIFORM, lambda pipe, u: np.floor(4 * u), 0,
              lambda i, w, h: matrices.rotate2d(i[0] * math.pi / 2)),
    Transform('xint', UNIFORM, lambda pipe, u: (2 * u - 1) * pipe.xint_max, 0,
              lambda t, w, h: matrices.translate(-np.rint(t[0] * w), -np.rint(t[1] * h)), count=2),
    Transform('scale', NORMAL, lambda pipe, n: np.exp2(n * pipe.scale_std), 1,
              lambda s, w, h: matrices.scale(1 / s[0], 1 / s[0])),
    _rotation(),
    Transform('aniso', NORMAL, lambda pipe, n: np.exp2(n * pipe.aniso_std), 1,
              lambda s, w, h: matrices.scale(1 / s[0], s[0])),
    _rotation(has_quantile=False),
    Transform('xfrac', NORMAL, lambda pipe, n: n * pipe.xfrac_std, 0,
              lambda t, w, h: matrices.translate(-t[0] * w, -t[1] * h), count=2),
)
COLOR = (
    Transform('brightness', NORMAL, lambda pipe, n: n * pipe.brightness_std, 0,
              lambda b: matrices.translate(b[0], b[0], b[0])),
    Transform('contrast', NORMAL, lambda pipe, n: np.exp2(n * pipe.contrast_std), 1,
              lambda c: matrices.scale(c[0], c[0], c[0])),
    Transform('lumaflip', UNIFORM, lambda pipe, u: np.floor(2 * u), 0,
              lambda i: matrices.stretch_along(LUMA_AXIS, 1 - 2 * i[0])),
    Transform('hue', UNIFORM, lambda pipe, u: (2 * u - 1) * math.pi * pipe.hue_max, 0,
              lambda t: matrices.rotate3d(LUMA_AXIS, t[0]), rgb_only=True),
    Transform('saturation', NORMAL, lambda pipe, n: np.exp2(n * pipe.saturation_std), 1,
              lambda s: matrices.stretch_across(LUMA_AXIS, s[0]), rgb_only=True),
)
IMGFILTER = Transform('imgfilter', NORMAL, lambda pipe, n: np.exp2(n * pipe.imgfilter_std), 1, count=4,
                      parts=lambda pipe: pipe.imgfilter_bands)  # t: gain of each band
NOISE = Transform('noise', HALF_NORMAL, lambda pipe, n: n * pipe.noise_std, 0)  # t: standard deviation
CUTOUT = Transform('cutout', UNIFORM, lambda pipe, u: u, math.inf, count=2)  # t: centre; inf: no cutout

TRANSFORMS = (*GEOMETRY, *COLOR, IMGFILTER, NOISE, CUTOUT)
Parameters = List[Tuple[Transform, np.ndarray]]  # rows in use and their t [count, N]


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    """The pipeline as a module: pipe(images) augments each image independently; gradients of any order.

    Multipliers (xflip, rotate90, ... cutout): a transform is applied with probability multiplier * p.
    xint_max, xfrac_std: fraction of the side.  scale_std, aniso_std, contrast_std, saturation_std and
    imgfilter_std: octaves.  rotate_max, hue_max: fraction of 180 degrees.  brightness_std, noise_std: for
    images in [-1, 1].
    imgfilter_bands: extra multipliers of the four bands, lowest first.  cutout_size: fraction of the sides.
    Buffers: p (float32 scalar, initially 1), Hz_geom [12], Hz_fbank [4, 43].
    Raises UserError if a setting is not a finite number, or a multiplier negative.
    """

    def __init__(  # noqa: PLR0913 (the published arguments)
        self, xflip: float = 0, rotate90: float = 0, xint: float = 0, xint_max: float = 0.125,
        scale: float = 0, rotate: float = 0, aniso: float = 0, xfrac: float = 0, scale_std: float = 0.2,
        rotate_max: float = 1, aniso_std: float = 0.2, xfrac_std: float = 0.125, brightness: float = 0,
        contrast: float = 0, lumaflip: float = 0, hue: float = 0, saturation: float = 0,
        brightness_std: float = 0.2, contrast_std: float = 0.5, hue_max: float = 1, saturation_std: float = 1,
        imgfilter: float = 0, imgfilter_bands: Sequence[float] = (1, 1, 1, 1), imgfilter_std: float = 1,
        noise: float = 0, cutout: float = 0, noise_std: float = 0.1, cutout_size: float = 0.5,
    ):
        settings = dict(locals())
        super().__init__()
        del settings['self'], settings['__class__']
        multipliers = {row.name for row in TRANSFORMS} | {'imgfilter_bands'}
        for name, value in settings.items():
            setattr(self, name, _checked_setting(name, value, name in multipliers))
        self.register_buffer('p', torch.ones([]))
        self.register_buffer('Hz_geom', upfirdn2d.setup_filter(matrices.SYM6_LOWPASS))
        bank = matrices.wavelet_bank(matrices.SYM2_LOWPASS, num_levels=3)
        self.register_buffer('Hz_fbank', torch.as_tensor(bank, dtype=torch.float32))

    def forward(self, images: torch.Tensor, debug_percentile: float | None = None) -> torch.Tensor:
        """Augmented `images` [N, C, H, W], any floating dtype; computed in at least float32.

        Images without any transform are returned bitwise equal. debug_percentile in [0, 1): apply every
        transform with a nonzero multiplier, regardless of p, with this quantile as its parameter (noise
        pixels stay random). Raises UserError for colour transforms of images that are not gray, RGB or RGBA.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f'images must be [N, C, H, W] of a floating dtype, not {list(images.shape)} {images.dtype}')
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        draw = functools.partial(
            self._draw, tuple(x.shape), x.dtype, host_draws.is_static(x.device), debug_percentile)
        steps, values = host_draws.take(draw, x.device)
        values = iter(values)
        with _without_autocast(x.device):
            for step in steps:
                x = step.run(self, x, [next(values) for _ in range(step.num_values)])
        return x.to(images.dtype)

    def _draw(
        self, shape: tuple[int, ...], dtype: torch.dtype, is_static: bool, debug_percentile: float | None,
    ) -> host_draws.Draw:
        """Draw the parameters of a batch. The form is the list of steps."""
        rows = [row for row in TRANSFORMS
                if getattr(self, row.name) > 0 and not (row.rgb_only and shape[1] == 1)]
        numbers = self._numbers(rows, shape[0], debug_percentile)
        if is_static and numbers.changes_nothing:
            return host_draws.Draw()
        parameters = list(zip(rows, numbers.parameters(self, rows)))
        steps, values = [], []
        for number, stage in enumerate(STAGES):
            used = [(row, t) for row, t in parameters if row in stage.rows]
            if used:
                step, arrays = _arranged(number, stage, self, shape, used, is_static)
                steps += [step] if step else []
                values += [_as_tensor(array, dtype) for array in arrays]
        return host_draws.Draw(tuple(steps), tuple(values))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_p_read'}

    def _numbers(self, rows: Sequence[Transform], num: int, debug_percentile: float | None) -> Numbers:
        if debug_percentile is None:
            return RandomNumbers(rows, num, self._p_on_host())
        return QuantileNumbers(float(debug_percentile), num)

    def _p_on_host(self) -> float:
        """The value of p. Synchronizes with a GPU only if p has been modified since the last call."""
        if self.p.device.type == 'cpu' or _is_inference(self.p):  # the latter have no version
            return float(self.p)
        tensor, version, value = self.__dict__.get('_p_read', (None, 0, 0.0))
        if tensor is not self.p or version != self.p._version:
            value = float(self.p)
            self.__dict__['_p_read'] = (self.p, self.p._version, value)
        return value


def _without_autocast(device: torch.device) -> Any:
    # PyTorch before 1.10 has no autocast for CPUs.
    has_autocast = hasattr(torch, 'autocast')
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


def _is_inference(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, 'is_inference') and tensor.is_inference()


def _checked_setting(name: str, value: Any, is_multiplier: bool) -> Any:
    values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    wanted = 4 if name == 'imgfilter_bands' else 1
    if values.shape != (wanted,) or not np.isfinite(values).all() or (is_multiplier and (values < 0).any()):
        kind = 'number' if wanted == 1 else 'list of four numbers'
        rule = f'a finite {kind}{" of at least 0" if is_multiplier else ""}'
        raise UserError(f'augmentation setting {name}={value!r} must be {rule}; correct or omit it')
    return value if wanted == 1 else list(value)


# Stages. decide: pipe, shape of x, parameters -> changed (bool [N]), arrays with one row per image.
# apply: pipe, x [N, C, H, W], margins, arrays as tensors -> x.

Decision = Tuple[np.ndarray, List[np.ndarray]]


def _decide_geometry(pipe: AugmentPipe, shape: tuple[int, ...], parameters: Parameters) -> Decision:
    height, width = shape[2:]
    to_input = matrices.identity(shape[0], 2)
    for row, t in _without_neutral(parameters):
        to_input = to_input @ row.matrix(t, width, height)
    return _is_other(to_input, matrices.eye(3)), [to_input]


def _warp(pipe: AugmentPipe, x: torch.Tensor, margins: Margins, matrix: torch.Tensor) -> torch.Tensor:
    return warp(x, margins, matrix, pipe.Hz_geom)


def _decide_color(pipe: AugmentPipe, shape: tuple[int, ...], parameters: Parameters) -> Decision:
    num, channels = shape[:2]
    if channels not in (1, 3, 4):
        name = parameters[0][0].name
        raise UserError(f'{name}={getattr(pipe, name)}: colours can be augmented in images of 1, 3 or 4 '
                        f'channels, not {channels}; use --augpipe=bg')
    matrix = matrices.identity(num, 3)
    for row, t in _without_neutral(parameters):
        matrix = row.matrix(t) @ matrix
    if channels == 1:  # the mean of the transformed r, g, b, for equal r, g, b
        linear = matrix[:, :3, :3].sum(axis=(1, 2), keepdims=True) / 3
        offset = matrix[:, :3, 3:].mean(axis=1, keepdims=True)
    else:
        linear, offset = matrix[:, :3, :3], matrix[:, :3, 3:]
    return _is_other(linear, matrices.eye(linear.shape[1])) | _is_other(offset, 0), [linear, offset]


def _is_other(matrices: np.ndarray, neutral: np.ndarray | float) -> np.ndarray:
    """Which of the matrices [N, d, e] differ from the neutral one: bool [N]."""
    return (matrices != neutral).reshape(len(matrices), -1).any(axis=1)


def _recolor(
    pipe: AugmentPipe, x: torch.Tensor, margins: None, linear: torch.Tensor, offset: torch.Tensor,
) -> torch.Tensor:
    num_colors = linear.shape[1]
    if x.shape[1] == num_colors:
        return torch.baddbmm(offset, linear, x.flatten(2)).view(x.shape)
    color = x[:, :num_colors]
    mixed = torch.baddbmm(offset, linear, color.flatten(2)).view(color.shape)
    return torch.cat([mixed, x[:, num_colors:]], dim=1)  # alpha stays


def _decide_imgfilter(pipe: AugmentPipe, shape: tuple[int, ...], parameters: Parameters) -> Decision:
    ((_, t),) = parameters  # [4, N]
    # For each band: amplify it by t, then normalise the expected power of the image (ADA, App. B).
    power = 1 + BAND_POWER[:, None] * (np.square(t) - 1)
    return (t != 1).any(axis=0), [(t / np.sqrt(power.prod(axis=0))).T]  # gains [N, 4]


def _filter(pipe: AugmentPipe, x: torch.Tensor, margins: None, gains: torch.Tensor) -> torch.Tensor:
    return filter_each(x, gains @ pipe.Hz_fbank.to(x.dtype))


def _decide_noise(pipe: AugmentPipe, shape: tuple[int, ...], parameters: Parameters) -> Decision:
    ((_, sigma),) = parameters  # [1, N]
    return sigma[0] > 0, [sigma[0, :, None, None, None]]


def _add_noise(pipe: AugmentPipe, x: torch.Tensor, margins: None, sigma: torch.Tensor) -> torch.Tensor:
    pixels = torch.randn(x.shape, dtype=x.dtype, device=x.device)
    return x + pixels * sigma


def _decide_cutout(pipe: AugmentPipe, shape: tuple[int, ...], parameters: Parameters) -> Decision:
    ((_, centre),) = parameters  # [x or y, N]
    in_column, in_row = (np.abs((np.arange(size) + 0.5) / size - c[:, None]) < pipe.cutout_size / 2
                         for size, c in zip((shape[3], shape[2]), centre))
    changed = in_column.any(axis=1) & in_row.any(axis=1)
    return changed, [in_row[:, None, :, None], in_column[:, None, None, :]]


def _cut(
    pipe: AugmentPipe, x: torch.Tensor, margins: None, in_row: torch.Tensor, in_column: torch.Tensor,
) -> torch.Tensor:
    return x.masked_fill((in_row * in_column) > 0, 0)


@dataclass(frozen=True, eq=False)
class _Stage:
    """Rows that are applied together."""

    rows: tuple[Transform, ...]
    decide: Callable[[AugmentPipe, tuple[int, ...], Parameters], Decision]
    apply: Callable[..., torch.Tensor]


STAGES = (
    _Stage(GEOMETRY, _decide_geometry, _warp), _Stage(COLOR, _decide_color, _recolor),
    _Stage((IMGFILTER,), _decide_imgfilter, _filter), _Stage((NOISE,), _decide_noise, _add_noise),
    _Stage((CUTOUT,), _decide_cutout, _cut))
ALL, PART, SELECTED = 'all', 'part', 'selected'


@dataclass(frozen=True)
class _Step:
    """One stage on one batch.

    number: of the stage.  extent: ALL images; PART of them, whose indices are the first value; or SELECTED:
    compute all, and use the results selected by a mask, the first value.
    """

    number: int
    extent: str
    margins: Margins | None
    num_values: int

    def run(self, pipe: AugmentPipe, x: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        apply = functools.partial(STAGES[self.number].apply, pipe)
        if self.extent == ALL:
            return apply(x, self.margins, *values)
        where, *values = values
        if self.extent == PART:
            return x.index_copy(0, where, apply(x.index_select(0, where), self.margins, *values))
        return torch.where(where, apply(x, self.margins, *values), x)


def _arranged(
    number: int, stage: _Stage, pipe: AugmentPipe, shape: tuple[int, ...], used: Parameters, is_static: bool,
) -> tuple[_Step | None, list[np.ndarray]]:
    """The step of a stage, None if it changes nothing, and its arrays."""
    changed, arrays = stage.decide(pipe, shape, used)
    first, extent = [], ALL
    if is_static:
        first, extent = [changed[:, None, None, None]], SELECTED
    elif not changed.any():
        return None, []
    elif not changed.all():  # compute only what is needed
        index = np.flatnonzero(changed)
        first, extent, arrays = [index], PART, [array[index] for array in arrays]
    margins = None
    if stage.rows is GEOMETRY:
        margins, *arrays = plan_warp(arrays[0], shape[2:], len(pipe.Hz_geom), is_static)
    arrays = first + arrays
    return _Step(number, extent, margins, len(arrays)), arrays


def _as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in the given type; masks and indices keep theirs."""
    return torch.as_tensor(array, dtype=dtype if array.dtype == np.float64 else None)


def _without_neutral(parameters: Parameters) -> Parameters:
    """The rows that are applied to at least one image; few while p is small."""
    return [(row, t) for row, t in parameters if (t != row.neutral).any()]
