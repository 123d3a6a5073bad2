# SPDX-License-Identifier: Apache-2.0
"""Decodes and encodes images as uint8 arrays, with the same result whichever decoder is installed.

Imports neither torch nor the dataset classes, so that the worker processes of dataset_tool start quickly.
"""
import functools
import io
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dnnlib.util import UserError

try:
    import pyspng
except ImportError:
    pyspng = None

# What Pillow may raise on damaged bytes; only part of it is documented.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError,
                 EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# Registered with Pillow, which cannot decode them itself, or runs another program to do so.
UNREADABLE_FORMATS = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PDF', 'WMF'}

# Pillow's pixel format -> ours. Palettes and 16-bit gray are decided in `target_mode`.
TARGET_MODES = {
    '1': 'L', 'L': 'L', 'LA': 'LA', 'La': 'LA', 'RGB': 'RGB', 'RGBA': 'RGBA', 'RGBa': 'RGBA', 'RGBX': 'RGB',
    'PA': 'RGBA', 'CMYK': 'RGB', 'YCbCr': 'RGB', 'LAB': 'RGB', 'HSV': 'RGB',
}
MODE_CHANNELS = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4}
CHANNEL_MODES = {channels: mode for mode, channels in MODE_CHANNELS.items()}

EXIF_ORIENTATION = 0x0112
TURNED_ORIENTATIONS = {5, 6, 7, 8}  # EXIF 2.3, tag 0x0112: these swap width and height.

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
PLAIN_CHUNKS = {b'IHDR', b'IDAT', b'IEND', b'gAMA', b'cHRM', b'sRGB', b'pHYs', b'sBIT', b'bKGD', b'tIME',
                b'iCCP'}
PLAIN_COLOUR_TYPES = {0, 2, 6}  # gray, RGB, RGBA


class ImageError(UserError):
    """An image that cannot be used; the text says why, without the file name."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes (lower case, with the dot) of image files: those that Pillow can decode itself."""
    Image.init()
    formats = {*Image.OPEN, 'MPO'} - UNREADABLE_FORMATS  # MPO: a JPEG file that holds several images
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


def is_image_name(name: str) -> bool:
    """Whether a relative name with forward slashes is an image: known suffix, no hidden part."""
    parts = name.split('/')
    if any(part.startswith('.') or part == '__MACOSX' for part in parts):
        return False
    stem, dot, suffix = parts[-1].rpartition('.')
    return bool(stem) and dot + suffix.lower() in image_suffixes()


def target_mode(image: Image.Image) -> str:
    """The pixel format to which an image is decoded: L, LA, RGB or RGBA.

    Palettes become RGB (RGBA if an entry is transparent), bilevel becomes gray, 16-bit gray keeps its upper
    byte as Pillow does for 16-bit RGB, CMYK and other color spaces become RGB.
    Raises ImageError for 32-bit integers and floats, which have no defined range.
    """
    # Decided by transparent entries, not by the format of the palette.
    if image.mode == 'P':
        return 'RGBA' if 'transparency' in image.info else 'RGB'
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        return 'L'
    if image.mode not in TARGET_MODES:
        raise ImageError(f'has pixels of type {image.mode!r}, which have no defined range; save it with '
                         '8 bits per channel')
    return TARGET_MODES[image.mode]


def _png_chunks(data: bytes) -> set[bytes]:
    """The chunk types of a PNG file. Raises ImageError if it is truncated or a checksum is wrong.

    Neither Pillow nor pyspng checks the checksums of pixel data, so a flipped bit would go unnoticed.
    """
    kinds: set[bytes] = set()
    offset = len(PNG_SIGNATURE)
    while b'IEND' not in kinds:
        if offset + 12 > len(data):
            raise ImageError('cannot be decoded (the PNG file ends too early)')
        # A chunk: length, kind, content, checksum over kind and content (PNG specification, section 5.3).
        length, kind = struct.unpack_from('>I4s', data, offset)
        end = offset + 8 + length
        is_critical = not kind[0] & 0x20
        if is_critical and zlib.crc32(data[offset + 4:end]).to_bytes(4, 'big') != data[end:end + 4]:
            raise ImageError(f'cannot be decoded (damaged or incomplete PNG chunk {kind.decode("latin1")})')
        kinds.add(kind)
        offset = end + 4
    return kinds


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image, uint8 [H, W, C]."""
    mode = target_mode(image)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I'):
        # I;16 has either byte order; the conversion to int64 handles both.
        return (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)[:, :, None]
    return from_pillow(image if image.mode == mode else image.convert(mode))


def _decode_png_fast(data: bytes) -> np.ndarray | None:
    """Pixels of an 8-bit gray, RGB or RGBA file without chunks that modify them; None: decode with Pillow."""
    is_plain = _png_chunks(data) <= PLAIN_CHUNKS and data[24] == 8 and data[25] in PLAIN_COLOUR_TYPES
    if pyspng is None or not is_plain:
        return None
    try:
        return pyspng.load(data)
    except (RuntimeError, ValueError):
        return None


def decode_image(data: bytes) -> np.ndarray:
    """The pixels of an encoded image as uint8 [H, W, C], C = 1 to 4, upright (EXIF orientation applied).

    The first frame of an animation. PNG files go through pyspng where it is installed, with the same result.
    Raises ImageError if the data is damaged, incomplete or not an image.
    """
    pixels = _decode_png_fast(data) if data.startswith(PNG_SIGNATURE) else None
    if pixels is None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = _decode_with_pillow(image)
        except ImageError:
            raise
        except DECODE_ERRORS as error:
            raise ImageError(f'cannot be decoded ({_reason(error)})') from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return 'not an image format that Pillow supports'
    return ' '.join(str(error).split()) or type(error).__name__


def read_header(file: BinaryIO) -> tuple[int, int, int]:
    """(height, width, channels) that `decode_image` would give, from the header alone. Raises ImageError."""
    try:
        with Image.open(file) as image:
            if image.format == 'TIFF':  # whether Pillow rotates it on loading depends on the release
                return _decode_with_pillow(image).shape
            mode, (width, height) = target_mode(image), image.size
            is_turned = image.getexif().get(EXIF_ORIENTATION) in TURNED_ORIENTATIONS
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(f'cannot be decoded ({_reason(error)})') from error
    return (width, height, MODE_CHANNELS[mode]) if is_turned else (height, width, MODE_CHANNELS[mode])


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """A Pillow image of mode L, LA, RGB or RGBA from uint8 [H, W, C], C = 1 to 4."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def from_pillow(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] from a Pillow image of mode L, LA, RGB or RGBA."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


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
