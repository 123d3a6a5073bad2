# SPDX-License-Identifier: Apache-2.0
"""Pictures of any shape: how height and width become a start size and a number of doublings."""
from collections.abc import Sequence

Size = int | Sequence[int]  # a side of a square, or (height, width)
MIN_START, MAX_START = 3, 16  # sides of the learned constant input


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as an int or a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def split_resolution(img_resolution: Size) -> tuple[int, int, int]:
    """(a, b, n) with height a * 2^n and width b * 2^n, n as large as leaves both a and b at least 3.

    Raises ValueError if no network fits: n must be at least 1 and neither a nor b above 16.
    """
    height, width = height_width(img_resolution)
    n = 0
    while height % 2 == width % 2 == 0 and min(height, width) // 2 >= MIN_START:
        height, width, n = height // 2, width // 2, n + 1
    if n < 1 or max(height, width) > MAX_START or min(height, width) < MIN_START:
        raise ValueError(
            f'no network fits pictures of {img_resolution}: height and width must be a * 2^n and b * 2^n '
            f'with n >= 1 and a, b from {MIN_START} to {MAX_START}, such as 256 or 512x768')
    return height, width, n


def levels_of(img_resolution: Size) -> tuple[tuple[int, int], list[int]]:
    """((a, b), levels 4, 8, ..., 4 * 2^n); level r has a*r/4 x b*r/4 pixels. A lone 4x4 level is allowed."""
    a, b, n = split_resolution(img_resolution) if img_resolution != 4 else (4, 4, 0)
    return (a, b), [4 * 2 ** i for i in range(n + 1)]


def size_at(level: int, start: tuple[int, int]) -> Size:
    """The level itself for square powers of two, else its (height, width)."""
    return level if start == (4, 4) else (start[0] * level // 4, start[1] * level // 4)
