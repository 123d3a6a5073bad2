# SPDX-License-Identifier: Apache-2.0
"""Decodes and encodes images as uint8 arrays, with the same result whichever decoder is installed.

Imports neither torch nor the dataset classes, so that the worker processes of dataset_tool start quickly.
"""
import dataclasses
import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from dnnlib.util import UserError
from training.datasets.color import changes_colors, to_srgb
from training.datasets.deep import Extent, Range, deep_values, has_own_range, is_deep, to_uint8
from training.datasets.png import SIGNATURE, PngError, PngFile, read_png

try:
    import pyspng
except ImportError:
    pyspng = None
try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

# What Pillow may raise on damaged bytes; only part of it is documented.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError,
                 EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
# Pillow's warnings do not name the file, and large images have a limit of our own.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')

# Registered with Pillow, which cannot decode them itself, or runs another program to do so.
UNREADABLE_FORMATS = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PDF', 'WMF'}
# Formats whose further frames are images of their own, not layers, sizes or thumbnails of one.
FRAME_FORMATS = {'GIF', 'WEBP', 'PNG', 'TIFF', 'HEIF', 'AVIF', 'FLI', 'DCX'}
NEW_SUBFILE_TYPE = 254  # TIFF 6.0; bit 0: a smaller version of another frame

# Pillow's pixel format -> ours. Palettes and deep images are decided in `target_mode`.
TARGET_MODES = {
    '1': 'L', 'L': 'L', 'LA': 'LA', 'La': 'LA', 'RGB': 'RGB', 'RGBA': 'RGBA', 'RGBa': 'RGBA', 'RGBX': 'RGB',
    'PA': 'RGBA', 'CMYK': 'RGB', 'YCbCr': 'RGB', 'LAB': 'RGB', 'HSV': 'RGB',
}
MODE_CHANNELS = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4}
CHANNEL_MODES = {channels: mode for mode, channels in MODE_CHANNELS.items()}
WITH_ALPHA = {'L': 'LA', 'RGB': 'RGBA'}

HEIF_START = rb'....ftyp(hei|hev|mif1|msf1)'
HEIF_REMEDY = 'not readable here; pip install pillow-heif, or convert to JPEG'

EXIF_ORIENTATION = 0x0112
TURNED_ORIENTATIONS = {5, 6, 7, 8}  # EXIF 2.3, tag 0x0112: these swap width and height.

MAX_MEGAPIXELS = 120  # decoding takes up to 8 bytes per pixel
DEEP_COST = 3
STRIP_PIXELS = 4 << 20  # copied from Pillow at a time


class ImageError(UserError):
    """An image that cannot be used; the text says why, without the file name."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How images are decoded.

    value_range: which values of images with more than 8 bits per channel become 0 to 255; 'auto': chosen for
    each image; None: the upper byte of 16 bits, others are refused.  max_megapixels: larger ones are refused;
    those of which all bits are read count DEEP_COST times.  all_frames: of animations and stacks, where a
    caller takes more than one.
    """

    value_range: Range | Literal['auto'] | None = None
    max_megapixels: int = MAX_MEGAPIXELS
    all_frames: bool = False

    def check_size(self, width: int, height: int, cost: int = 1) -> None:
        """Raise ImageError if an image has too many pixels."""
        if cost * width * height > self.max_megapixels * 1_000_000:
            raise ImageError(f'has {width}x{height} pixels, and more than {self.max_megapixels // cost} '
                             'megapixels may be meant to fill memory; if they are not, use dataset_tool.py '
                             f'--max-megapixels={-(-cost * width * height // 1_000_000)}')


DEFAULT = Reading()


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The first frame of an image file: pixels uint8 [H, W, C]; how many frames the file has; a remark."""

    pixels: np.ndarray
    num_frames: int = 1
    remark: str | None = None


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """The shape [H, W, C] that an image is decoded to, and whether it has more than 8 bits per channel."""

    shape: tuple[int, int, int]
    is_deep: bool = False


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow can decode itself."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in UNREADABLE_FORMATS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes (lower case, with the dot) of image files: those that Pillow can decode itself."""
    formats = {*_formats(), 'MPO'}  # MPO: a JPEG file that holds several images
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


def is_image_name(name: str) -> bool:
    """Whether a relative name with forward slashes is an image: known suffix, no hidden part."""
    parts = name.split('/')
    if any(part.startswith('.') or part == '__MACOSX' for part in parts):
        return False
    stem, dot, suffix = parts[-1].rpartition('.')
    return bool(stem) and dot + suffix.lower() in image_suffixes()


def target_mode(image: Image.Image, reading: Reading = DEFAULT) -> str:
    """The pixel format to which an image is decoded: L, LA, RGB or RGBA.

    Palettes become RGB, bilevel, 16-bit and float gray become gray, CMYK and other color spaces become RGB; a
    transparent color adds alpha. Raises ImageError for 32-bit integers and floats without a range.
    """
    # Decided by transparent entries, not by the format of the palette.
    if image.mode == 'P':
        return 'RGBA' if 'transparency' in image.info else 'RGB'
    if reading.value_range is None and not has_own_range(image):
        raise ImageError(f'has pixels of type {image.mode!r}, which have no defined range; convert it with '
                         'dataset_tool.py --range=auto')
    mode = 'L' if image.mode[0] in 'IF' else TARGET_MODES.get(image.mode)
    if mode is None:
        raise ImageError(f'has pixels of type {image.mode!r}, which are not supported; save it as RGB')
    return WITH_ALPHA.get(mode, mode) if 'transparency' in image.info else mode


class _Source:
    """An encoded image that can be opened any number of times.

    Raises ImageError if it is too large, or the PNG file is truncated or damaged.
    """

    def __init__(self, data: bytes, reading: Reading, *, header_only: bool = False) -> None:
        self.data, self.reading = data, reading
        self.png: PngFile | None = None
        if data.startswith(SIGNATURE):
            try:
                self.png = read_png(data, header_only=header_only)
            except PngError as error:
                raise ImageError(f'cannot be decoded ({error})') from error
            self.data = self.png.data
            reading.check_size(self.png.width, self.png.height)
        # Pillow has a limit of its own, twice this number, which must not be lower than the user's.
        if reading.max_megapixels > MAX_MEGAPIXELS and Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, reading.max_megapixels * 1_000_000)

    def open(self, frame: int = 0) -> Image.Image:
        """The image, with its pixels still undecoded."""
        # Only these formats: others would be passed to a program such as Ghostscript.
        try:
            image = Image.open(io.BytesIO(self.data), formats=_formats())
        except Image.UnidentifiedImageError as error:
            # Phones and messengers rename HEIC files to .jpg.
            reason = f'HEIC, {HEIF_REMEDY}' if re.match(HEIF_START, self.data, re.DOTALL) else (
                'not an image format that Pillow supports')
            raise ImageError(f'cannot be decoded ({reason})') from error
        if frame:
            image.seek(frame)
        is_full = is_deep(image) and self.reading.value_range is not None
        self.reading.check_size(*image.size, DEEP_COST if is_full else 1)
        return image

    def profile(self, image: Image.Image) -> bytes | None:
        """The ICC profile."""
        return image.info.get('icc_profile') if self.png is None else self.png.profile


def _translated(error: BaseException) -> ImageError:
    if isinstance(error, ImageError):
        return error
    reason = ' '.join(str(error).split()) or type(error).__name__
    return ImageError(f'cannot be decoded ({reason})')


def decode_image(data: bytes, reading: Reading = DEFAULT) -> np.ndarray:
    """The pixels of an encoded image as uint8 [H, W, C], C = 1 to 4, upright (EXIF orientation) and in sRGB.

    The first frame of an animation. PNG files go through pyspng where it is installed, with the same result.
    Raises ImageError if the data is damaged, incomplete, too large or not an image.
    """
    return read_image(data, reading).pixels


def read_image(data: bytes, reading: Reading = DEFAULT) -> Decoded:
    """As `decode_image`, with what there is to say about the file."""
    source = _Source(data, reading)
    try:
        fast = _decode_png_fast(source)
        if fast is not None:
            return fast
        with source.open() as image:
            mode, num_frames = target_mode(image, reading), _count_frames(image)
            pixels, remark = _decode_frame(source, image, mode)
            return Decoded(pixels, num_frames, remark)
    except DECODE_ERRORS as error:
        raise _translated(error) from error


def _decode_png_fast(source: _Source) -> Decoded | None:
    """The pixels of an 8-bit gray, RGB or RGBA file that no chunk modifies; None: decode with Pillow."""
    if pyspng is None or source.png is None or not source.png.is_plain:
        return None
    profile = source.png.profile
    try:
        pixels = pyspng.load(source.data)
    except (RuntimeError, ValueError):
        return None
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if profile is None or not changes_colors(profile, CHANNEL_MODES[pixels.shape[2]]):
        return Decoded(pixels)
    image, remark = to_srgb(to_pillow(pixels), profile)
    return Decoded(from_pillow(image), remark=remark)


def _decode_frame(source: _Source, image: Image.Image, mode: str) -> tuple[np.ndarray, str | None]:
    """The pixels of one frame of an opened image, uint8 [H, W, C], and a remark."""
    key = None if source.png is None else source.png.key
    # A key of 16 bits can only be compared with all of them.
    is_exact = source.reading.value_range is not None or (key is not None and source.png.bit_depth == 16)
    if is_deep(image) and is_exact:
        values = deep_values(image, functools.partial(source.open, image.tell()))
        alpha = _key_alpha(values, key)
        pixels = _scaled(values, source.reading.value_range)
        image, remark = to_srgb(to_pillow(pixels), source.profile(image))
    else:
        ImageOps.exif_transpose(image, in_place=True)
        alpha = None
        if key is not None:
            highest = 2 ** source.png.bit_depth - 1
            alpha = _key_alpha(_as_array(image), [value * 255 // highest for value in key])
        if image.mode.startswith('I'):
            image = to_pillow(to_uint8(np.asarray(image), None)[:, :, None])
        image, remark = to_srgb(image, source.profile(image))
    if alpha is not None:
        image = image.convert('L' if mode == 'LA' else 'RGB')
        image.putalpha(Image.fromarray(alpha))
    return from_pillow(image if image.mode == mode else image.convert(mode)), remark


def _as_array(image: Image.Image) -> np.ndarray:
    """The values [H, W, C] of an image; bilevel as 0 and 255."""
    values = np.asarray(image.convert('L') if image.mode == '1' else image)
    return values[:, :, None] if values.ndim == 2 else values


def _key_alpha(values: np.ndarray, key: tuple[int, ...] | list[int] | None) -> np.ndarray | None:
    """Alpha, uint8 [H, W]: 0 where all channels equal the transparent color, 255 elsewhere."""
    if key is None:
        return None
    return np.where((values == np.array(key, dtype=values.dtype)).all(axis=2), 0, 255).astype(np.uint8)


def _scaled(values: np.ndarray, value_range: Range | str | None) -> np.ndarray:
    """Deep values as uint8; alpha, which is a share of full opacity, keeps its range."""
    colors = values[:, :, :3]
    if value_range == 'auto':
        value_range = Extent.of(colors).automatic_range()
    pixels = to_uint8(colors, value_range)
    if values.shape[2] < 4:
        return pixels
    return np.concatenate([pixels, to_uint8(values[:, :, 3:], None)], axis=2)


def _count_frames(image: Image.Image) -> int:
    """The frames of an opened image that are images of their own."""
    if image.format not in FRAME_FORMATS:
        return 1
    try:
        return getattr(image, 'n_frames', 1)
    except DECODE_ERRORS:  # the first frame may be usable
        return 1


def count_frames(data: bytes, reading: Reading = DEFAULT) -> int:
    """The number of frames of an encoded image, 1 for what is no animation or stack. Raises ImageError."""
    try:
        with _Source(data, reading).open() as image:
            return _count_frames(image)
    except DECODE_ERRORS as error:
        raise _translated(error) from error


def iterate_frames(data: bytes, reading: Reading = DEFAULT) -> Iterator[np.ndarray]:
    """The pixels of each frame in turn, as `decode_image` gives those of the first. Raises ImageError."""
    try:
        source = _Source(data, reading)
        with source.open() as image:
            mode = target_mode(image, reading)
            for frame in range(_count_frames(image)):
                image.seek(frame)
                is_page = image.format == 'TIFF'
                if is_page and image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1:
                    continue
                # Frames of an animation may be stored in several modes, and build on one another.
                yield _decode_frame(source, image if is_page else image.copy(),
                                    target_mode(image, reading) if is_page else mode)[0]
    except DECODE_ERRORS as error:
        raise _translated(error) from error


def _measure_frame(source: _Source, frame: int) -> Extent | None:
    with source.open(frame) as image:
        if not is_deep(image):
            return None
        return Extent.of(deep_values(image, functools.partial(source.open, frame))[:, :, :3])


def measure(data: bytes, reading: Reading = DEFAULT) -> Extent | None:
    """The extent of the values of an image with more than 8 bits per channel; None for others.

    Raises ImageError as `decode_image`.
    """
    try:
        source = _Source(data, reading)
        with source.open() as image:
            if not is_deep(image):
                return None
            frames = range(_count_frames(image) if reading.all_frames else 1)
        extents = [_measure_frame(source, frame) for frame in frames]
        return Extent.union(extent for extent in extents if extent is not None)
    except DECODE_ERRORS as error:
        raise _translated(error) from error


def read_header(data: bytes, reading: Reading = DEFAULT) -> ImageHeader:
    """The shape that `decode_image` would give, from the first bytes of a file. Raises ImageError."""
    try:
        source = _Source(data, reading, header_only=True)
        with source.open() as image:
            mode, is_many_bits = target_mode(image, reading), is_deep(image)
            if image.format == 'TIFF':  # whether Pillow rotates it on loading depends on the release
                ImageOps.exif_transpose(image, in_place=True)
                is_turned = False
            else:
                # Not the method of PNG files, which decodes the pixels.
                is_turned = Image.Image.getexif(image).get(EXIF_ORIENTATION) in TURNED_ORIENTATIONS
            width, height = image.size[::-1] if is_turned else image.size
    except DECODE_ERRORS as error:
        raise _translated(error) from error
    return ImageHeader((height, width, MODE_CHANNELS[mode]), is_many_bits)


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """A Pillow image of mode L, LA, RGB or RGBA from uint8 [H, W, C], C = 1 to 4."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def from_pillow(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] from a Pillow image of mode L, LA, RGB or RGBA."""
    width, height = image.size
    rows = max(STRIP_PIXELS // max(width, 1), 1)
    if height <= rows:
        return _as_array(image)
    # In strips: Pillow's own copy holds large images in memory three times.
    pixels = np.empty([height, width, MODE_CHANNELS[image.mode]], dtype=np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top:top + rows] = _as_array(strip)
    return pixels


def convert_mode(pixels: np.ndarray, mode: str) -> np.ndarray:
    """uint8 [H, W, C] in another mode (L, LA, RGB, RGBA); dropped alpha is composited over white first."""
    image = to_pillow(pixels)
    # Pillow's own conversion would show the colors of transparent pixels.
    if pixels.shape[2] in (2, 4) and mode in ('L', 'RGB'):
        rgba = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    return from_pillow(image if image.mode == mode else image.convert(mode))


def encode_png(pixels: np.ndarray, *, compress_level: int = 0) -> bytes:
    """The bytes of a PNG of uint8 [H, W, C], C = 1 to 4; level 0 stores the pixels uncompressed."""
    buffer = io.BytesIO()
    to_pillow(pixels).save(buffer, format='png', compress_level=compress_level, optimize=False)
    return buffer.getvalue()
