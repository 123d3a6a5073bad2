# SPDX-License-Identifier: Apache-2.0
"""The archives of CIFAR-10 and MNIST as sources of dataset_tool."""
import gzip
import io
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np

from dnnlib.util import UserError, open_regular
from torch_utils.pickles import arrays
from torch_utils.pickles.machine import Damaged, Machine, Refused
from training.datasets.files import FREE_RATIO
from training.datasets.source_image import Header, SourceImage

CIFAR_NAME = 'cifar-10-python.tar.gz'
CIFAR_BATCHES = [f'cifar-10-batches-py/data_batch_{i}' for i in range(1, 6)]
CIFAR_SIDE = 32
MAX_BATCH_BYTES = 64 << 20  # twice that of CIFAR-10
MAX_MEMBERS = 64
MNIST_SUFFIX = 'images-idx3-ubyte.gz'
MNIST_PAD = 2  # 28x28 to 32x32
MAX_SIDE = 16384
FREE_BYTES, MAX_BYTES = 256 << 20, 1 << 30  # what an archive may inflate to at least, and at most
# Exceptions raised by damaged archives and pickles.
ARCHIVE_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, Damaged, ArithmeticError,
                  ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError)


def _gunzip(path: str) -> bytes:
    """The content of a .gz file. Raises ValueError if it is out of proportion, OSError or EOFError."""
    with open_regular(path) as file:
        limit = min(FREE_BYTES + FREE_RATIO * os.fstat(file.fileno()).st_size, MAX_BYTES)
        with gzip.GzipFile(fileobj=file) as content:
            data = content.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f'it inflates to more than {limit >> 20} MiB')
    return data


class ArraySource:
    """Images of an archive that stores them as one array."""

    on_error = 'stop'

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, label_mode: str, origin: str) -> None:
        if label_mode not in ('auto', 'none'):
            raise UserError(f'--labels={label_mode}: {origin} has its own labels; use --labels=auto '
                            'or none')
        self.class_names: tuple[str, ...] | None = None
        if len(pixels) != len(labels):
            raise UserError(f'{origin}: {len(pixels)} images but {len(labels)} labels; download it again')
        self.notes: list[str] = []
        self.pixels = pixels  # [N, H, W, C]
        self.labels = [int(label) for label in labels] if label_mode == 'auto' else [None] * len(labels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __iter__(self) -> Iterator[SourceImage]:
        for i, (pixels, label) in enumerate(zip(self.pixels, self.labels, strict=True)):
            yield SourceImage(f'image {i}', label, pixels)

    def headers(self) -> Iterator[Header]:
        """Only of the first image: all have the same shape."""
        yield 'image 0', self.pixels.shape[1:]


class CifarSource(ArraySource):
    """The training images of CIFAR-10, read from the published archive without executing its pickles."""

    def __init__(self, path: str, label_mode: str = 'auto') -> None:
        try:
            members = _read_tar(_gunzip(path))
            batches = [_read_cifar_batch(members[name], name) for name in CIFAR_BATCHES]
        except ARCHIVE_ERRORS as error:
            raise UserError(f'{path}: not the CIFAR-10 archive for Python, or damaged ({error})') from error
        # [N, 3 * 32 * 32]: red, green and blue planes, one after the other.
        planes = np.concatenate([pixels for pixels, _ in batches])
        pixels = planes.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
        super().__init__(pixels, np.concatenate([labels for _, labels in batches]), label_mode, path)


def _read_tar(data: bytes) -> dict[str, bytes]:
    """The batches in an archive, which may hold other plain files."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode='r:') as archive:
        for count, member in enumerate(archive):
            # Links may form circles, and sparse files are as large as they claim to be.
            is_plain = member.isreg() and not member.issparse() and member.size <= MAX_BATCH_BYTES
            if count == MAX_MEMBERS or (member.name in CIFAR_BATCHES and not is_plain):
                raise ValueError(f'{member.name!r} has no place in it')
            if member.name in CIFAR_BATCHES:
                found[member.name] = archive.extractfile(member).read()
    return found


def _read_cifar_batch(data: bytes, member: str) -> tuple[np.ndarray, np.ndarray]:
    # NumPy's own functions are not allowed: a pickle could make numpy.ndarray point to any memory.
    machine = Machine(io.BytesIO(data), arrays.TABLE)
    try:
        batch = machine.load()
    except Refused as error:
        raise ValueError(f'it asks for {error}, which is not allowed') from error
    pixels, labels = (_as_array(batch[key]) for key in ('data', 'labels'))
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * CIFAR_SIDE**2:
        raise KeyError(f'{member}: data is {pixels.dtype} {list(pixels.shape)}')
    if labels.ndim != 1 or labels.dtype.kind not in 'iu':
        raise KeyError(f'{member}: labels are {labels.dtype} {list(labels.shape)}')
    return pixels, labels


def _as_array(value: object) -> np.ndarray:
    if isinstance(value, arrays.StoredArray):
        return value.array()
    if type(value) is not list or not all(type(item) is int for item in value):
        raise TypeError(f'a {type(value).__name__} in place of numbers')
    return np.array(value, dtype=np.int64)


class MnistSource(ArraySource):
    """MNIST and its variants: `*images-idx3-ubyte.gz` and `*labels-idx1-ubyte.gz`; 28x28 padded to 32x32."""

    def __init__(self, path: str, label_mode: str = 'auto') -> None:
        label_path = re.sub(f'{re.escape(MNIST_SUFFIX)}$', 'labels-idx1-ubyte.gz', path)
        pixels, labels = _read_idx(path, 3), _read_idx(label_path, 1)
        if pixels.shape[1:] == (28, 28):
            pixels = np.pad(pixels, [(0, 0), (MNIST_PAD, MNIST_PAD), (MNIST_PAD, MNIST_PAD)])
        super().__init__(pixels[:, :, :, None], labels, label_mode, path)


def _read_idx(path: str, rank: int) -> np.ndarray:
    """A uint8 array of a rank from an IDX file: bytes 0 0 8 rank, big-endian sizes, values."""
    try:
        data = _gunzip(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f'{path}: cannot be read ({error}); download both MNIST files again') from error
    shape = [int(size) for size in np.frombuffer(data[4:4 + 4 * rank], dtype='>u4')]
    body = data[4 + 4 * rank:]
    is_complete = len(shape) == rank and len(body) == math.prod(shape) > 0
    if data[:4] != bytes([0, 0, 8, rank]) or not is_complete or max(shape[1:], default=1) > MAX_SIDE:
        raise UserError(f'{path}: not an IDX file of {rank} dimensions of bytes, or incomplete')
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


