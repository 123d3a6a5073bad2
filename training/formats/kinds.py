# SPDX-License-Identifier: Apache-2.0
"""What a file is that somebody took for a network: judged by its first bytes, or the members of a zip."""
import codecs
import io
import re
import zipfile
from collections.abc import Sequence

from torch_utils.pickles import torch_file
from training.formats import safetensors_file

HEAD_BYTES = 1024
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')
NETWORK_SUFFIXES = ('.pkl', '.safetensors', '.pt', '.pth', '.ckpt')
UNPACK = 'unpack it and give the file inside'
# First bytes -> what the file is and what to do.
HEADS: dict[bytes, str] = {
    b'version https://git-lfs': 'a Git LFS pointer, three lines in place of the file; fetch the file itself '
                                'with git lfs pull, or by its download link',
    b'\x1f\x8b': f'compressed with gzip; {UNPACK}', b'BZh': f'compressed with bzip2; {UNPACK}',
    b'\xfd7zXZ\0': f'compressed with xz; {UNPACK}', b'\x28\xb5\x2f\xfd': f'compressed with zstd; {UNPACK}',
    b'7z\xbc\xaf\x27\x1c': f'a 7z archive; {UNPACK}', b'Rar!\x1a\x07': f'a RAR archive; {UNPACK}',
    b'\x89PNG\r\n': 'a PNG image, not a network', b'\xff\xd8\xff': 'a JPEG image, not a network',
    b'GIF8': 'a GIF image, not a network', b'%PDF': 'a PDF document, not a network',
    b'\x89HDF\r\n': 'an HDF5 file, as Keras writes; networks of other programs cannot be read',
    b'\x93NUMPY': 'a NumPy array, not a network; projected ws are for --projected-w',
    b'TDF$': 'a TensorFlow file of another kind; give the network-snapshot-*.pkl of that program',
    b'\x7fELF': 'a program, not a network', b'MZ': 'a program, not a network'}
PAGE = re.compile(rb'<(!doctype html|html|head|body|!--|title|script)', re.IGNORECASE)
MARKUP = re.compile(rb'<(\?xml|[a-z!])', re.IGNORECASE)
TAR_MARK = slice(257, 262)


def kind_of(data: bytes) -> str:
    """The kind of a file in a word or two; 'pickle' for whatever nothing else fits."""
    if safetensors_file.is_safetensors(data):
        return 'safetensors'
    if data[:4] == torch_file.ZIP_HEAD:
        names = member_names(data)
        is_program = any('/models/' in n or n.endswith('serialized_exported_program.json') for n in names)
        if is_program or any(n.endswith('/data.pkl') for n in names):
            return 'torch.export' if is_program else 'torch checkpoint'
        return 'zip archive' if names else 'damaged zip archive'
    if torch_file.is_torch_file(data):
        return 'torch checkpoint'
    # The first field of an ONNX model is the version of its format, a small number.
    if data[:1] == b'\x08' and b'\x12' in data[2:4]:
        return 'ONNX'
    described = foreign(data)
    return 'pickle' if described is None else described.partition(';')[0].partition(',')[0]


def foreign(data: bytes) -> str | None:
    """What a file is that is surely no network file, and what to do instead; None for any other."""
    if not data:
        return 'an empty file; download or copy it again'
    head = data[:HEAD_BYTES].lstrip(b'\xef\xbb\xbf \t\r\n')
    known = next((text for mark, text in HEADS.items() if data.startswith(mark)), None)
    if known is not None:
        return known
    if PAGE.match(head):
        return ('an HTML page, not a network; the address leads to a page about the file, or to an error '
                'message: open it in a browser and give the address of the file itself')
    if MARKUP.match(head):
        return 'an XML file, not a network; such an answer of a server often tells of an error'
    if data[TAR_MARK] == b'ustar':
        return f'a tar archive; {UNPACK}'
    if data[:4] == torch_file.ZIP_HEAD:
        return _foreign_archive(member_names(data))
    return _foreign_text(head)


def member_names(data: bytes) -> list[str]:
    """Names of the members of a zip archive; none if it is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.namelist()
    except torch_file.BAD_ZIP:
        return []


def _foreign_archive(names: Sequence[str]) -> str | None:
    if not names or any(name.endswith('/data.pkl') for name in names):
        return None
    if any(name.endswith('serialized_exported_program.json') or '/models/' in name for name in names):
        return 'a program of torch.export, which cannot be turned back into a network; give its source'
    if all(name.endswith('.npy') for name in names):
        return 'NumPy arrays, not a network; projected ws are for --projected-w'
    networks = [name for name in names if name.lower().endswith(NETWORK_SUFFIXES)]
    if networks:
        return f'a zip archive with {_shown(networks[0])} in it; unpack it and give that file'
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return 'a zip archive of images, not a network; a dataset is for --data'
    return 'a zip archive, not a network; give a network-snapshot-*.pkl'


def _foreign_text(head: bytes) -> str | None:
    """JSON and prose. A pickle never begins with a bracket, nor that of a network with words."""
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(head)  # which may end within a character
    except UnicodeDecodeError:
        return None
    if text[:1] in ('{', '['):
        return 'a JSON text, not a network'
    is_prose = re.match(r'[A-Za-z][\w,;:.!?\'"()-]* +\w[^\0]*$', text)
    return 'a text, not a network' if is_prose else None


def _shown(name: str) -> str:
    return ''.join(c if c.isascii() and c.isprintable() else '?' for c in name)[:80]
