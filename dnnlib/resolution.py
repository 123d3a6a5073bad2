# SPDX-License-Identifier: Apache-2.0
"""Valid image sizes: decomposition of height and width into a start size and a number of doublings.

Snapshots carry this text (see torch_utils.bundle).
"""
from __future__ import annotations

from typing import Sequence, Union

Size = Union[int, Sequence[int]]  # a side of a square, or (height, width)
MIN_START, MAX_START = 3, 16  # sides of the learned constant input


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as an int or a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def split_resolution(img_resolution: Size) -> tuple[int, int, int]:
    """(a, b, n) with height a * 2^n and width b * 2^n, n as large as leaves both a and b at least 3.

    (4, 4, n) for squares of powers of two. Raises ValueError if no network fits: n must be at least 1 and
    neither a nor b above 16.
    """
    height, width = height_width(img_resolution)
    a, b, n = height, width, 0
    # Start as small as possible: every doubling is a pair of learned layers.
    while a % 2 == b % 2 == 0 and min(a, b) // 2 >= MIN_START:
        a, b, n = a // 2, b // 2, n + 1
    if n < 1 or max(a, b) > MAX_START or min(a, b) < MIN_START:
        raise ValueError(
            f'no network fits images of {width}x{height} (width x height): both sides must be '
            f'{MIN_START}..{MAX_START} times one power of two, at least 2')
    return a, b, n


def untrainable_reason(height: int, width: int) -> str | None:
    """Why no network has images of this size, None if one has."""
    try:
        split_resolution((height, width))
    except ValueError as error:
        return str(error)
    return None


def nearest_resolution(height: int, width: int) -> tuple[int, int]:
    """(height, width) closest to these that split_resolution() accepts; square for squares."""
    # Searches a few thousand sizes, which is fast enough for an error message.
    starts = range(MIN_START, MAX_START + 1)
    sizes = [(a << n, b << n) for n in range(1, 12) for a in starts for b in starts
             if height != width or a == b]
    return min(sizes, key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))


def levels_of(img_resolution: Size) -> tuple[tuple[int, int], list[int]]:
    """((a, b), levels 4, 8, ..., 4 * 2^n); level r has a*r/4 x b*r/4 pixels. A lone 4x4 level is allowed."""
    a, b, n = split_resolution(img_resolution) if img_resolution != 4 else (4, 4, 0)
    return (a, b), [4 * 2 ** i for i in range(n + 1)]


def size_at(level: int, start: tuple[int, int]) -> Size:
    """The level itself for square powers of two, else its (height, width)."""
    return level if start == (4, 4) else (start[0] * level // 4, start[1] * level // 4)
