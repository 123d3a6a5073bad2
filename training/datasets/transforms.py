# SPDX-License-Identifier: Apache-2.0
"""Image transforms of dataset_tool (crop, resize, convert), and the shapes that a dataset may have."""
import dataclasses

import numpy as np
from PIL import Image

from dnnlib.resolution import nearest_resolution, untrainable_reason
from dnnlib.util import UserError
from training.datasets.images import CHANNEL_MODES, MODE_CHANNELS, convert_mode, from_pillow, to_pillow

RESIZE_FILTERS = {'box': Image.Resampling.BOX, 'lanczos': Image.Resampling.LANCZOS}
TRANSFORMS = ('center-crop', 'center-crop-wide')
Shape = tuple[int, int, int]  # height, width, channels


@dataclasses.dataclass(frozen=True)
class TransformSettings:
    """Settings of the transform: a crop (one of TRANSFORMS or None), size, filter and mode.

    width, height: None keeps that side. mode: L, LA, RGB, RGBA, or None to keep the mode of each image.
    Raises UserError for a crop without size, or a wide band higher than its canvas.
    """

    transform: str | None = None
    width: int | None = None
    height: int | None = None
    resize_filter: str = 'lanczos'
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.transform is None:
            return
        if self.width is None or self.height is None:
            raise UserError(f'--transform={self.transform} needs both --width and --height')
        if self.transform == 'center-crop-wide' and self.height > self.width:
            raise UserError(f'--transform=center-crop-wide: --height={self.height} is the height of the '
                            f'visible band, so it must not exceed --width={self.width}')

    def output_shape(self, shape: Shape) -> Shape | None:
        """The output shape of an image [H, W, C], or None if it is too small and dropped."""
        height, width, channels = shape
        channels = MODE_CHANNELS.get(self.mode, channels)
        if self.transform != 'center-crop-wide':
            return self.height or height, self.width or width, channels
        if width < self.width or self._band_height(shape) < self.height:
            return None
        return self.width, self.width, channels

    def _band_height(self, shape: Shape) -> int:
        """Rows that center-crop-wide keeps: as published, the height after scaling to the output width,
        although it is applied before scaling. This stretches images; the published LSUN Car results need it.
        """
        return round(self.width * shape[0] / shape[1])

    def apply(self, pixels: np.ndarray) -> np.ndarray | None:
        """The transformed image, uint8 [H, W, C] to uint8 [H', W', C'], or None if it is dropped."""
        if self.output_shape(pixels.shape) is None:
            return None
        # Before resizing, so that resampling averages the visible colors.
        if self.mode is not None and pixels.shape[2] != MODE_CHANNELS[self.mode]:
            pixels = convert_mode(pixels, self.mode)
        if self.transform == 'center-crop':
            side = min(pixels.shape[:2])  # [H, W, C] to [side, side, C]
            return self._resize(_crop_center(pixels, side, side), self.height, self.width)
        if self.transform == 'center-crop-wide':
            band = _crop_center(pixels, self._band_height(pixels.shape), pixels.shape[1])
            return _paste_band(self._resize(band, self.height, self.width))
        return self._resize(pixels, self.height or pixels.shape[0], self.width or pixels.shape[1])

    def _resize(self, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        if pixels.shape[:2] == (height, width):
            return pixels
        return from_pillow(to_pillow(pixels).resize((width, height), RESIZE_FILTERS[self.resize_filter]))

    def is_enlarging(self, shape: Shape) -> bool:
        """Whether resizing enlarges what the transform keeps of an image [H, W, C]."""
        # center-crop-wide drops smaller images.
        if self.transform == 'center-crop-wide':
            return False
        height, width = shape[:2] if self.transform is None else [min(shape[:2])] * 2
        return (self.height or height) > height or (self.width or width) > width

    def is_stretching(self, shape: Shape) -> bool:
        """Whether plain resizing changes the aspect ratio of an image [H, W, C] by more than rounding."""
        if self.transform is not None:
            return False
        # Compares aspect ratios without a division; rounding a side to whole pixels is not stretching.
        height, width = self.height or shape[0], self.width or shape[1]
        return abs(width * shape[0] - height * shape[1]) > max(shape[:2])


def _crop_center(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top:top + height, left:left + width]


def _paste_band(band: np.ndarray) -> np.ndarray:
    """The band, centred vertically in a black square of its width."""
    height, width, channels = band.shape
    canvas = np.zeros([width, width, channels], dtype=np.uint8)  # [W, W, C]
    top = (width - height) // 2
    canvas[top:top + height] = band
    return canvas


class ShapeRule:
    """The shapes of one dataset: the first image must be trainable, the others must match it.

    any_shape=False: square, side a power of two, 1 or 3 channels (as published).
    any_shape=True: even sides of at least 4 pixels, 1 to 4 channels.
    """

    def __init__(self, *, any_shape: bool = False) -> None:
        self.any_shape = any_shape
        self.first: tuple[str, Shape] | None = None

    def check(self, name: str, shape: Shape) -> None:
        """Raise UserError, naming the image and the remedy, if [H, W, C] does not fit."""
        if self.first is not None:
            self._check_like_first(name, shape)
            return
        (self._check_any if self.any_shape else self._check_published)(name, shape)
        self.first = name, shape

    def _check_like_first(self, name: str, shape: Shape) -> None:
        first_name, first = self.first
        if shape == first:
            return
        # Sizes and modes need different remedies.
        remedy = '--transform=center-crop --width --height' if shape[:2] != first[:2] else '--mode=RGB'
        raise UserError(f'{name} is {shape_text(shape)}, but {first_name} is {shape_text(first)}: all images '
                        f'must have the same shape; convert them with {remedy}')

    def _check_published(self, name: str, shape: Shape) -> None:
        height, width, channels = shape
        if height != width:
            raise UserError(f'{name} is {width}x{height}, not square; crop with --transform=center-crop '
                            '--width --height, or keep its shape with --any-shape')
        if channels not in (1, 3):
            raise UserError(f'{name} has {channels} channels ({CHANNEL_MODES[channels]}), expected 1 or 3; '
                            'convert with --mode=RGB, or keep them with --any-shape')
        # A power of two has a single bit set.
        if width & (width - 1):
            raise UserError(f'{name} is {width}x{height}, and {width} is not a power of two; resize with '
                            f'--width={nearest_power(width)} --height={nearest_power(width)}, or keep it '
                            'with --any-shape')

    def _check_any(self, name: str, shape: Shape) -> None:
        reason = untrainable_reason(*shape[:2])
        if reason is not None:
            height, width = nearest_resolution(*shape[:2])
            raise UserError(
                f'{name} is {shape_text(shape)}: {reason}; resize with --width={width} --height={height}')


def nearest_power(size: int) -> int:
    """The power of two nearest to a positive size in pixels; of two equally near, the smaller."""
    lower = 1 << (size.bit_length() - 1)
    return lower if size - lower <= 2 * lower - size else 2 * lower


def shape_text(shape: Shape) -> str:
    """A shape [H, W, C] in messages: '32x16 RGB' (width first)."""
    return f'{shape[1]}x{shape[0]} {CHANNEL_MODES[shape[2]]}'
