# SPDX-License-Identifier: Apache-2.0
"""Pictures between bytes and uint8 arrays: one rule for every pixel format, whichever decoder is installed.

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

# What Pillow may raise on damaged bytes; it documents only a part of it.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError,
                 EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# Registered with Pillow, but it cannot read them by itself, or runs another program to do so.
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
    """A picture that cannot be used; the text says why, without the file name."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes (lower case, with the dot) of files that count as pictures: what Pillow itself can read."""
    Image.init()
    formats = {*Image.OPEN, 'MPO'} - UNREADABLE_FORMATS  # MPO: a JPEG file that holds several pictures
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


def is_image_name(name: str) -> bool:
    """Whether a relative name with forward slashes is a picture: known suffix, nothing hidden on the way."""
    parts = name.split('/')
    if any(part.startswith('.') or part == '__MACOSX' for part in parts):
        return False
    stem, dot, suffix = parts[-1].rpartition('.')
    return bool(stem) and dot + suffix.lower() in image_suffixes()


def target_mode(image: Image.Image) -> str:
    """The pixel format in which a picture is used: L, LA, RGB or RGBA, always true colours.

    Palettes become their colours (with alpha if an entry is transparent), bilevel becomes gray, 16-bit gray
    keeps its upper byte as Pillow does for 16-bit RGB, CMYK and other colour spaces become RGB.
    Raises ImageError for 32-bit integers and floats, which have no natural range.
    """
    # The format of the palette says nothing; entries that are transparent do.
    if image.mode == 'P':
        return 'RGBA' if 'transparency' in image.info else 'RGB'
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        return 'L'
    if image.mode not in TARGET_MODES:
        raise ImageError(f'has pixels of type {image.mode!r}, which have no range; save it with '
                         '8 bits a channel')
    return TARGET_MODES[image.mode]


def _png_chunks(data: bytes) -> set[bytes]:
    """The kinds of chunks in a PNG file, up to its end. Raises ImageError for a cut or a wrong checksum.

    Neither Pillow nor pyspng compares the checksums of the pixel data, so a flipped bit would go unnoticed.
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
    """The pixels of an opened picture, uint8 [H, W, C]."""
    mode = target_mode(image)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I'):
        # I;16 comes in either byte order; the detour over int64 settles it.
        return (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)[:, :, None]
    return from_pillow(image if image.mode == mode else image.convert(mode))


def _decode_png_fast(data: bytes) -> np.ndarray | None:
    """8-bit gray, RGB or RGBA pixels that no chunk changes; None for other PNG files, which Pillow reads."""
    is_plain = _png_chunks(data) <= PLAIN_CHUNKS and data[24] == 8 and data[25] in PLAIN_COLOUR_TYPES
    if pyspng is None or not is_plain:
        return None
    try:
        return pyspng.load(data)
    except (RuntimeError, ValueError):
        return None


def decode_image(data: bytes) -> np.ndarray:
    """The pixels of an encoded picture as uint8 [H, W, C], C = 1 to 4, upright (EXIF orientation applied).

    The first frame of an animation. PNG files go through pyspng where it is installed, with the same result.
    Raises ImageError if the bytes are damaged, incomplete or no picture.
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
        return 'not a picture that Pillow knows'
    return ' '.join(str(error).split()) or type(error).__name__


def read_header(file: BinaryIO) -> tuple[int, int, int]:
    """(height, width, channels) that `decode_image` would give, from the header alone. Raises ImageError."""
    try:
        with Image.open(file) as image:
            if image.format == 'TIFF':  # whether Pillow turns it on loading depends on the release
                return _decode_with_pillow(image).shape
            mode, (width, height) = target_mode(image), image.size
            is_turned = image.getexif().get(EXIF_ORIENTATION) in TURNED_ORIENTATIONS
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(f'cannot be decoded ({_reason(error)})') from error
    return (width, height, MODE_CHANNELS[mode]) if is_turned else (height, width, MODE_CHANNELS[mode])


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """A Pillow picture of mode L, LA, RGB or RGBA from uint8 [H, W, C], C = 1 to 4."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def from_pillow(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] from a Pillow picture of mode L, LA, RGB or RGBA."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def convert_mode(pixels: np.ndarray, mode: str) -> np.ndarray:
    """uint8 [H, W, C] in another mode (L, LA, RGB, RGBA); alpha that is dropped is laid over white first."""
    image = to_pillow(pixels)
    # Pillow alone would uncover whatever colour lies beneath the transparency.
    if pixels.shape[2] in (2, 4) and mode in ('L', 'RGB'):
        rgba = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba)
    return from_pillow(image if image.mode == mode else image.convert(mode))


def encode_png(pixels: np.ndarray, *, compress_level: int = 0) -> bytes:
    """The bytes of a PNG of uint8 [H, W, C], C = 1 to 4; level 0 stores the pixels uncompressed."""
    buffer = io.BytesIO()
    to_pillow(pixels).save(buffer, format='png', compress_level=compress_level, optimize=False)
    return buffer.getvalue()
