# SPDX-License-Identifier: Apache-2.0
"""Images of more than 8 bits per channel: their full values, and how a range of them becomes 0 to 255."""
import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageOps

NOMINAL_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0))  # usual ones of float images
FEW = 0.25  # of a range: data that use less are too dark or flat to train on
STRIP_ROWS = 256  # converted at a time, to save memory
OTHER_BYTE = {';16B': ';16L', ';16L': ';16B', ';16N': ';16B'}
Range = tuple[float, float]


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image has more than 8 bits per channel."""
    return image.mode in ('I', 'F') or image.mode.startswith('I;16') or _is_split(image)


def has_own_range(image: Image.Image) -> bool:
    """Whether an opened image has unsigned 16-bit values, whose range is 0 to 65535, or 8-bit ones."""
    is_16_bit = image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM'))
    return image.mode not in ('I', 'F') or is_16_bit


def _is_split(image: Image.Image) -> bool:
    """Whether Pillow decodes 16-bit color by its upper byte only."""
    tiles = getattr(image, 'tile', None)
    return bool(tiles) and _raw_mode(tiles[0])[:3] == 'RGB' and _raw_mode(tiles[0])[-4:] in OTHER_BYTE


def _raw_mode(tile: tuple) -> str:
    arguments = tile[3]
    raw_mode = arguments if isinstance(arguments, str) else (arguments or ('',))[0]
    return raw_mode if isinstance(raw_mode, str) else ''


def deep_values(image: Image.Image, reopen: Callable[[], Image.Image]) -> np.ndarray:
    """The upright values of an opened image for which `is_deep`: uint16, int32 or float32 [H, W, C].

    reopen: opens the same file once more.
    """
    if not _is_split(image):
        ImageOps.exif_transpose(image, in_place=True)
        values = np.asarray(image)
        # Pillow's names of 16-bit formats tell the byte order, which a later copy would lose.
        return (values.astype(np.uint16) if image.mode.startswith('I;16') else values)[:, :, None]
    # Read as if it had the other byte order, Pillow's upper byte is the lower one.
    with reopen() as other:
        other.tile = [_with_other_byte(tile) for tile in other.tile]
        ImageOps.exif_transpose(other, in_place=True)
        low = np.asarray(other)
    ImageOps.exif_transpose(image, in_place=True)
    values = np.asarray(image).astype(np.uint16)
    values <<= 8
    values |= low
    return values


def _with_other_byte(tile: tuple) -> tuple:
    raw_mode, arguments = _raw_mode(tile), tile[3]
    swapped = raw_mode[:-4] + OTHER_BYTE[raw_mode[-4:]]
    return (*tile[:3], swapped if isinstance(arguments, str) else (swapped, *arguments[1:]))


def to_uint8(values: np.ndarray, value_range: Range | None) -> np.ndarray:
    """Values as uint8: value_range becomes 0 to 255, values outside are clipped; None: the upper byte.

    Integers fill 256 bins of equal width, so that 0 to 65535 gives the upper byte and 0 to 4095 the upper 8
    of 12 bits.
    """
    if value_range is None:
        return (values >> 8).astype(np.uint8)
    low, high = value_range
    is_integer = values.dtype.kind in 'iu'
    width = (high - low + 1) / 256 if is_integer else (high - low) / 255
    result = np.empty(values.shape, dtype=np.uint8)
    for top in range(0, len(values), STRIP_ROWS):
        scaled = np.subtract(values[top:top + STRIP_ROWS], low, dtype=np.float32)
        scaled /= np.float32(width or 1)
        result[top:top + STRIP_ROWS] = (scaled if is_integer else scaled.round()).clip(0, 255)
    return result


@dataclasses.dataclass(frozen=True)
class Extent:
    """The smallest and largest value of some images, and whether they are integers."""

    low: float
    high: float
    is_integer: bool

    @classmethod
    def of(cls, values: np.ndarray) -> 'Extent':
        """The extent of an array. Raises ValueError if it holds NaN or Inf."""
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError('contains non-finite values (NaN, Inf)')
        return cls(low, high, values.dtype.kind in 'iu')

    @classmethod
    def union(cls, extents: Iterable['Extent']) -> 'Extent':
        """The extent of all images together."""
        found = list(extents)
        return cls(min(e.low for e in found), max(e.high for e in found), all(e.is_integer for e in found))

    def automatic_range(self) -> Range:
        """The range that is mapped to 0 to 255 by --range=auto.

        Integers: as many bits as the largest value has, at least 8. Floats: the first of NOMINAL_RANGES that
        holds them. Either way the data's own extent, if they use less than a quarter of that.
        """
        own = self.low, max(self.high, self.low + 1) if self.is_integer else self.high
        nominal = next((pair for pair in NOMINAL_RANGES if pair[0] <= self.low and self.high <= pair[1]), own)
        if self.is_integer:
            bits = max(int(self.high).bit_length(), 8)
            nominal = (0.0, float(2 ** bits - 1)) if self.low >= 0 else own
        is_few = self.high - self.low < FEW * (nominal[1] - nominal[0])
        return own if is_few and self.high > self.low else nominal
