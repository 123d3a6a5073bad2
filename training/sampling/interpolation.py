# SPDX-License-Identifier: Apache-2.0
"""Interpolation in latent spaces: the position of each frame, and values between two keys.

A walk has K keys, numbered from 0. Position 1.25 is a quarter of the way from key 1 to key 2.
"""
import math

import numpy as np
import torch


def positions(
    num_keys: int, step_frames: int, *, is_loop: bool = False, is_eased: bool = False,
) -> np.ndarray:
    """Positions [T] of the frames, `step_frames` from one key to the next.

    Without loop T = (K - 1) * step_frames + 1: the last frame shows the last key. A loop continues
    to key 0 and ends one frame before it, T = K * step_frames. Eased: slow at the keys, by 3 t^2 - 2 t^3.
    """
    count = num_keys * step_frames if is_loop else (num_keys - 1) * step_frames + 1
    key, t = np.divmod(np.arange(count) / step_frames, 1)
    return key + (t * t * (3 - 2 * t) if is_eased else t)


def interpolate(
    keys: torch.Tensor, position: float, kind: str = 'linear', is_loop: bool = False,
) -> torch.Tensor:
    """The value at a position between keys [K, ...]: [...]. kind: 'linear', 'cubic' or 'slerp'.

    cubic: Catmull-Rom, a smooth curve through all keys. slerp: an arc for vectors along the last dimension.
    In a loop, key K is key 0.
    """
    index, t = int(position // 1), position % 1
    here = _key(keys, index, is_loop)
    if t == 0:
        return here
    following = _key(keys, index + 1, is_loop)
    if kind == 'linear':
        return here.lerp(following, t)
    if kind == 'slerp':
        return slerp(here, following, t)
    return _catmull_rom((_key(keys, index - 1, is_loop), here, following, _key(keys, index + 2, is_loop)), t)


def _key(keys: torch.Tensor, index: int, is_loop: bool) -> torch.Tensor:
    """A key; also one before the first or after the last."""
    if is_loop:
        return keys[index % len(keys)]
    # Beyond an end, extrapolate linearly, so that the curve starts and ends straight.
    if index < 0:
        return 2 * keys[0] - keys[1] if len(keys) > 1 else keys[0]
    if index >= len(keys):
        return 2 * keys[-1] - keys[-2] if len(keys) > 1 else keys[0]
    return keys[index]


def _catmull_rom(points: tuple[torch.Tensor, ...], t: float) -> torch.Tensor:
    """Cubic from points[1] to points[2]; the slope at each is half the difference of its neighbours."""
    before, start, end, after = points
    slope_start, slope_end = (end - before) / 2, (after - start) / 2
    rise = 3 * t ** 2 - 2 * t ** 3
    return ((1 - rise) * start + rise * end
            + t * (1 - t) ** 2 * slope_start - t ** 2 * (1 - t) * slope_end)


def slerp(start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation of vectors along the last dimension; lengths are interpolated linearly.

    Opposite or nearly equal directions define no arc: there it is linear.
    """
    lengths = [v.norm(dim=-1, keepdim=True) for v in (start, end)]
    a, b = (v / length.clamp(min=1e-12) for v, length in zip((start, end), lengths, strict=True))
    angle = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine.clamp(min=1e-12)
    is_arc = (angle > 1e-4) & (angle < math.pi - 1e-4)
    return torch.where(is_arc, arc * lengths[0].lerp(lengths[1], t), start.lerp(end, t))
