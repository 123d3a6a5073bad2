# SPDX-License-Identifier: Apache-2.0
"""Batches of homogeneous matrices for pixel positions and colours, and the wavelet filters of augmentation.

Everything here is small, so it is computed on the host in float64 NumPy: a tiny torch operation costs more.
Column vectors; parameters are [N] or scalar (for all N), results [N, d + 1, d + 1] for d coordinates.
"""
from __future__ import annotations

import functools
from typing import Sequence

import numpy as np

SYM2_LOWPASS = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
SYM6_LOWPASS = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)
LUMA_AXIS = (1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3))  # the gray diagonal of RGB


def identity(num: int, dim: int) -> np.ndarray:
    """`num` identity matrices for `dim` coordinates: [num, dim + 1, dim + 1]."""
    m = np.empty([num, dim + 1, dim + 1])
    m[:] = eye(dim + 1)
    return m


@functools.lru_cache(maxsize=None)
def eye(size: int) -> np.ndarray:
    """The identity matrix [size, size], read-only; creating it costs more than a small product."""
    return _constant(np.eye(size))


@functools.lru_cache(maxsize=None)
def along(axis: tuple[float, ...]) -> np.ndarray:
    """The matrix [d, d] that keeps only the component along a unit vector, read-only."""
    return _constant(np.outer(axis, axis))


@functools.lru_cache(maxsize=None)
def cross(axis: tuple[float, float, float]) -> np.ndarray:
    """The matrix [3, 3] of the cross product with a vector, read-only."""
    x, y, z = axis
    return _constant(np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))


def _constant(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def translate(*offsets: np.ndarray) -> np.ndarray:
    """Add an offset to each coordinate."""
    m = identity(max(map(np.size, offsets)), len(offsets))
    for i, offset in enumerate(offsets):
        m[:, i, -1] = offset
    return m


def scale(*factors: np.ndarray) -> np.ndarray:
    """Multiply each coordinate by its own factor."""
    m = identity(max(map(np.size, factors)), len(factors))
    for i, factor in enumerate(factors):
        m[:, i, i] = factor
    return m


def rotate2d(theta: np.ndarray) -> np.ndarray:
    """Rotate (x, y) by theta radians, from x towards y."""
    theta = np.atleast_1d(theta)
    m = identity(len(theta), 2)
    m[:, 0, 0] = m[:, 1, 1] = np.cos(theta)
    m[:, 1, 0] = np.sin(theta)
    m[:, 0, 1] = -m[:, 1, 0]
    return m


def rotate3d(axis: Sequence[float], theta: np.ndarray) -> np.ndarray:
    """Rotate (x, y, z) about a unit vector by theta radians, right-handed (Rodrigues' formula)."""
    theta = np.atleast_1d(theta)[:, None, None]
    axis, cos = tuple(axis), np.cos(theta)
    m = identity(len(theta), 3)
    m[:, :3, :3] = cos * eye(3) + np.sin(theta) * cross(axis) + (1 - cos) * along(axis)
    return m


def stretch_along(axis: Sequence[float], factor: np.ndarray) -> np.ndarray:
    """Multiply the component along a unit vector by `factor`; -1 reflects."""
    return _identity_plus(along(tuple(axis)), np.atleast_1d(factor) - 1)


def stretch_across(axis: Sequence[float], factor: np.ndarray) -> np.ndarray:
    """Multiply the component orthogonal to a unit vector by `factor`; for the luma axis: saturation."""
    return _identity_plus(eye(3) - along(tuple(axis)), np.atleast_1d(factor) - 1)


def _identity_plus(direction: np.ndarray, amount: np.ndarray) -> np.ndarray:
    # In this form an amount of 0 gives exactly the identity.
    m = identity(len(amount), 3)
    m[:, :3, :3] += amount[:, None, None] * direction
    return m


def wavelet_bank(lowpass: Sequence[float], num_levels: int) -> np.ndarray:
    """Zero-phase band filters [num_levels + 1, taps] of an orthogonal wavelet; the lowest band comes first.

    lowpass: its decomposition low-pass filter, of sum sqrt(2). The rows add up to a unit impulse, so that
    weighting them amplifies frequency bands of an image (ADA, App. B).
    """
    low = np.asarray(lowpass, dtype=np.float64)
    high = low * (-1.0) ** np.arange(len(low))
    low_power, high_power = (np.convolve(h, h[::-1]) / 2 for h in (low, high))
    bank = np.zeros([num_levels + 1, 1])
    bank[0] = 1
    for level in range(1, num_levels + 1):
        dilated = np.zeros([len(bank), 2 * bank.shape[1] - 1])
        dilated[:, ::2] = bank
        bank = np.stack([np.convolve(row, low_power) for row in dilated])
        margin = (bank.shape[1] - len(high_power)) // 2
        bank[level, margin:margin + len(high_power)] += high_power
    return bank
