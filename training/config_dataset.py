# SPDX-License-Identifier: Apache-2.0
"""What a run must know of its dataset, and which sizes of pictures the networks can have."""
from dataclasses import dataclass

from dnnlib.util import UserError

MIN_START, MAX_START = 3, 16  # sides of the pictures at which the networks start


@dataclass(frozen=True)
class DatasetInfo:
    """What opening a dataset tells.

    path: folder or zip.  num_images: without mirror images.  height, width: pixels.  channels: 1 gray, 2 gray
    and alpha, 3 RGB, 4 RGBA, or any other number.  label_dim: length of a label vector, 0 without labels.
    """

    path: str
    num_images: int
    height: int
    width: int
    channels: int = 3
    has_labels: bool = False
    label_dim: int = 0


def split_resolution(height: int, width: int) -> tuple[int, int, int]:
    """(a, b, n) with height = a * 2^n and width = b * 2^n, n as large as leaves both a and b at least 3.

    (4, 4, n) for squares of powers of two. Raises UserError, with the nearest size that fits, unless n >= 1
    and neither a nor b is above 16.
    """
    a, b, n = height, width, 0
    # Start as small as possible: every doubling is a pair of learned layers.
    while a % 2 == b % 2 == 0 and min(a, b) // 2 >= MIN_START:
        a, b, n = a // 2, b // 2, n + 1
    if n < 1 or min(a, b) < MIN_START or max(a, b) > MAX_START:
        h, w = _nearest_resolution(height, width)
        raise UserError(
            f'--data: no network fits pictures of {width}x{height} (width x height): both sides must be '
            f'{MIN_START}..{MAX_START} times one power of two, at least 2; resize with dataset_tool.py '
            f'--width={w} --height={h}')
    return a, b, n


def _nearest_resolution(height: int, width: int) -> tuple[int, int]:
    # A few thousand sizes: quick enough for an error message, and plain.
    starts = range(MIN_START, MAX_START + 1)
    sizes = [(a << n, b << n) for n in range(1, 12) for a in starts for b in starts
             if height != width or a == b]
    return min(sizes, key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
