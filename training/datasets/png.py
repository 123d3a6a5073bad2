# SPDX-License-Identifier: Apache-2.0
"""The chunks of PNG files: checksums, transparency, color profile; what must not reach the decoders."""
import re
import struct
import zlib
from dataclasses import dataclass

SIGNATURE = b'\x89PNG\r\n\x1a\n'
MAX_CHUNKS = 200_000  # an image of 120 megapixels in the usual pieces of 8 KiB has some 60,000
MAX_PROFILE_BYTES = 32 << 20
TEXT_CHUNKS = {b'tEXt', b'zTXt', b'iTXt'}
KEPT_TEXTS = (b'XML:com.adobe.xmp\0', b'Raw profile type exif\0')  # may hold the orientation
# The decoder pyspng knows these chunks and ignores all but the first three.
PLAIN_CHUNKS = {b'IHDR', b'IDAT', b'IEND', b'gAMA', b'cHRM', b'sRGB', b'pHYs', b'sBIT', b'bKGD', b'tIME',
                b'iCCP'}
PLAIN_COLOR_TYPES = {0, 2, 6}  # gray, RGB, RGBA


class PngError(ValueError):
    """A PNG file that is truncated or damaged; the text says how."""


@dataclass(frozen=True)
class PngFile:
    """What a PNG file declares.

    data: the file without texts and color profile, which decoders limit in size.  key: the value of tRNS in
    gray (one sample) and RGB files (three), else None.  profile: the ICC profile or None.
    """

    data: bytes
    width: int
    height: int
    bit_depth: int
    color_type: int
    kinds: frozenset[bytes]
    key: tuple[int, ...] | None = None
    profile: bytes | None = None

    @property
    def is_plain(self) -> bool:
        """Whether pixels have 8 bits and no other chunk modifies them."""
        return self.kinds <= PLAIN_CHUNKS and self.bit_depth == 8 and self.color_type in PLAIN_COLOR_TYPES


def read_png(data: bytes, *, header_only: bool = False) -> PngFile:
    """Split a PNG file into what it declares. Raises PngError if it is truncated or a checksum is wrong.

    Neither Pillow nor pyspng checks the checksums of pixel data, so a flipped bit would go unnoticed.
    header_only: stop at the pixel data; `data` then ends with an empty image, for Pillow to open only.
    """
    kept, content = [data[:len(SIGNATURE)]], {}
    is_changed = False
    for kind, start, end in _chunks(data, header_only):
        content.setdefault(kind, data[start + 8:end - 4])
        is_dropped = kind == b'iCCP' or (
            kind in TEXT_CHUNKS and not data[start + 8:end - 4].startswith(KEPT_TEXTS))
        is_changed |= is_dropped
        if header_only and kind in (b'IDAT', b'IEND'):
            kept += [_chunk(b'IDAT', b''), _chunk(b'IEND', b'')]
            is_changed = True
            break
        if not is_dropped:
            kept.append(data[start:end])
    if len(content.get(b'IHDR', b'')) != 13:
        raise PngError('no PNG header')
    # PNG specification, section 11.2.2
    width, height, bit_depth, color_type = struct.unpack_from('>IIBB', content[b'IHDR'])
    return PngFile(b''.join(kept) if is_changed else data, width, height, bit_depth, color_type,
                   frozenset(content), _color_key(color_type, content.get(b'tRNS')),
                   _inflate_profile(content.get(b'iCCP')))


def _chunks(data: bytes, header_only: bool) -> list[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk: length, kind, content, checksum over kind and content."""
    found: list[tuple[bytes, int, int]] = []
    start, kind = len(SIGNATURE), b''
    while kind != b'IEND' and not (header_only and kind == b'IDAT'):
        if start + 12 > len(data):
            raise PngError('the PNG file ends too early')
        if len(found) == MAX_CHUNKS:
            raise PngError(f'more than {MAX_CHUNKS} PNG chunks')
        length, kind = struct.unpack_from('>I4s', data, start)
        end = start + 12 + length
        is_critical = not kind[0] & 0x20
        # The header suffices for a shape; the rest may not be here yet.
        is_due = is_critical and not (header_only and kind == b'IDAT')
        if is_due and zlib.crc32(data[start + 4:end - 4]).to_bytes(4, 'big') != data[end - 4:end]:
            raise PngError(f'damaged or incomplete PNG chunk {kind.decode("latin1")}')
        found.append((kind, start, end))
        start = end
    return found


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4, 'big')


def _color_key(color_type: int, content: bytes | None) -> tuple[int, ...] | None:
    count = {0: 1, 2: 3}.get(color_type)
    if content is None or count is None or len(content) < 2 * count:
        return None
    return struct.unpack_from(f'>{count}H', content)


def _inflate_profile(content: bytes | None) -> bytes | None:
    # iCCP: a name, zero, the method (0: deflate), the compressed profile (PNG specification, 11.3.2.3).
    match = re.match(rb'[^\0]{1,79}\0\0', content or b'')
    if match is None:
        return None
    try:
        return zlib.decompressobj().decompress(content[match.end():], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
