# SPDX-License-Identifier: Apache-2.0
"""Sources of dataset_tool: folders, zips, and the archives of CIFAR-10, MNIST and LSUN."""
import dataclasses
import gzip
import io
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from dnnlib.util import UserError
from torch_utils.pickles import arrays
from torch_utils.pickles.machine import Damaged, Machine, Refused
from training.datasets.files import LABEL_FILE, DatasetPathError, ImageFiles
from training.datasets.images import ImageError, decode_image, read_header
from training.datasets.labels import Label, LabelTable, labels_from_csv, labels_from_folders, parse_label_json
from training.datasets.transforms import Shape

CIFAR_NAME = 'cifar-10-python.tar.gz'
CIFAR_BATCHES = [f'cifar-10-batches-py/data_batch_{i}' for i in range(1, 6)]
CIFAR_SIDE = 32
MNIST_SUFFIX = 'images-idx3-ubyte.gz'
MNIST_PAD = 2  # 28x28 to 32x32
# Exceptions raised by damaged archives and pickles.
ARCHIVE_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, Damaged, ArithmeticError,
                  ValueError, TypeError, LookupError, AttributeError)
Header = tuple[str, Shape | str]  # a name, and the shape or why the image cannot be read
LABEL_MODES = ('auto', 'folders', 'none')


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """An image as stored in its source: encoded bytes or pixels uint8 [H, W, C]; or why it cannot be read."""

    name: str
    label: Label | None
    data: bytes | np.ndarray | None
    is_rgb: bool = False  # always decoded to RGB, alpha dropped
    error: str | None = None

    def decode(self) -> np.ndarray:
        """The pixels uint8 [H, W, C]. Raises ImageError if it cannot be decoded."""
        if self.error is not None:
            raise ImageError(self.error)
        pixels = decode_image(self.data) if isinstance(self.data, bytes) else self.data
        if not self.is_rgb or pixels.shape[2] == 3:
            return pixels
        return np.repeat(pixels[:, :, :1], 3, axis=2) if pixels.shape[2] < 3 else pixels[:, :, :3]


class DatasetSource(Protocol):
    """A sized iterable of SourceImage, in the order in which a dataset numbers them.

    on_error: 'stop' or 'skip' at unreadable images, by default. notes: lines for the user.
    """

    on_error: str
    notes: list[str]

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[SourceImage]: ...

    def headers(self) -> Iterator[Header]:
        """Names and shapes of the images, from what is cheap to read."""
        ...


def open_source(path: str, labels: str = 'auto') -> DatasetSource:
    """The source at a path, recognised as the published tool does.

    labels: 'auto' (dataset.json, or the archive's own), 'folders' (class = first folder), 'none', or the
    path of a CSV file.
    Raises UserError for a path that is missing or of unknown kind.
    """
    if labels not in LABEL_MODES and not labels.lower().endswith('.csv'):
        raise UserError(f'--labels={labels}: expected {", ".join(LABEL_MODES)} or a .csv file')
    if not os.path.exists(path):
        raise UserError(f'--source={path}: no such file or folder')
    if os.path.isdir(path):
        # LSUN is recognized by its folder name alone.
        if path.rstrip('/\\').endswith('_lmdb'):
            return LmdbSource(path)
        return FileSource(path, labels)
    if os.path.basename(path) == CIFAR_NAME:
        return CifarSource(path, labels)
    if path.endswith(MNIST_SUFFIX):
        return MnistSource(path, labels)
    if path.lower().endswith('.zip'):
        return FileSource(path, labels)
    raise UserError(f'--source={path}: expected a folder, a .zip, {CIFAR_NAME}, train-{MNIST_SUFFIX} or a '
                    '*_lmdb folder')


class FileSource:
    """A folder, in the order of its paths compared part by part, or a zip, in the order of its names."""

    on_error = 'stop'

    def __init__(self, path: str, labels: str = 'auto') -> None:
        self.files = ImageFiles(path)
        self.notes: list[str] = []
        names = self.files.names
        # Two orders, as published: 'a/x' comes before 'a-b/x' in a folder and after it in a zip.
        self.names = names if self.files.is_zip else sorted(names, key=lambda name: PurePosixPath(name).parts)
        self.labels = self._read_labels(labels)

    def _read_labels(self, labels: str) -> LabelTable:
        if labels == 'none':
            return {}
        if labels == 'folders':
            table, classes = labels_from_folders(self.names, self.files.path)
            self.notes += [f'Class {i} = {folder}' for i, folder in enumerate(classes)]
            return table
        if labels != 'auto':
            return self._read_csv(labels)
        data = self.files.read_labels()
        return {} if data is None else parse_label_json(data, f'{self.files.path}: {LABEL_FILE}') or {}

    def _read_csv(self, path: str) -> LabelTable:
        table = labels_from_csv(path)
        missing = [name for name in self.names if name not in table]
        if missing:
            raise UserError(f'--labels={path}: no row for {missing[0]} ({len(missing)} of {len(self.names)} '
                            'images have none); names are relative to --source')
        return table

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[SourceImage]:
        for name in self.names:
            try:
                yield SourceImage(name, self.labels.get(name), self.files.read(name))
            except DatasetPathError as error:
                # Reported, not raised: the caller decides between stop and skip.
                yield SourceImage(name, None, None, error=f'cannot be read ({error})')

    def headers(self) -> Iterator[Header]:
        """Of every image: reading headers is fast."""
        for name in self.names:
            try:
                with self.files.open(name) as file:
                    header = name, read_header(file)
            except (DatasetPathError, ImageError) as error:
                header = name, str(error)
            yield header


class ArraySource:
    """Images of an archive that stores them as one array."""

    on_error = 'stop'

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, label_mode: str, origin: str) -> None:
        if label_mode not in ('auto', 'none'):
            raise UserError(f'--labels={label_mode}: {origin} has its own labels; use --labels=auto '
                            'or none')
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
            with tarfile.open(path, 'r:gz') as archive:
                batches = [_read_cifar_batch(archive, member) for member in CIFAR_BATCHES]
        except ARCHIVE_ERRORS as error:
            raise UserError(f'{path}: not the CIFAR-10 archive for Python, or damaged ({error})') from error
        # [N, 3 * 32 * 32]: red, green and blue planes, one after the other.
        planes = np.concatenate([pixels for pixels, _ in batches])
        pixels = planes.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
        super().__init__(pixels, np.concatenate([labels for _, labels in batches]), label_mode, path)


def _read_cifar_batch(archive: tarfile.TarFile, member: str) -> tuple[np.ndarray, np.ndarray]:
    # NumPy's own functions are not allowed: a pickle could make numpy.ndarray point to any memory.
    machine = Machine(io.BytesIO(archive.extractfile(member).read()), arrays.TABLE)
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
        data = gzip.decompress(Path(path).read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path}: cannot be read ({error}); download both MNIST files again') from error
    shape = [int(size) for size in np.frombuffer(data[4:4 + 4 * rank], dtype='>u4')]
    body = data[4 + 4 * rank:]
    is_complete = len(shape) == rank and len(body) == math.prod(shape)
    if data[:4] != bytes([0, 0, 8, rank]) or not is_complete:
        raise UserError(f'{path}: not an IDX file of {rank} dimensions of bytes, or incomplete')
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


class LmdbSource:
    """An LSUN database: values in key order, each an encoded image, read as RGB; without labels."""

    on_error = 'skip'  # as published: LSUN contains damaged entries

    def __init__(self, path: str) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise UserError(f'--source={path}: LSUN needs one more package: pip install lmdb') from error
        self.notes: list[str] = []
        self._path, self._lmdb = path, lmdb
        with self._open() as database:
            self._length = database.stat()['entries']

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """The database, open only while it is read: a process cannot open it twice."""
        try:
            # No lock file: the database may be on a read-only disk.
            with self._lmdb.open(self._path, readonly=True, lock=False, max_readers=1) as database:
                yield database
        except self._lmdb.Error as error:
            raise UserError(f'--source={self._path}: not an LMDB database, or damaged ({error})') from error

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SourceImage]:
        with self._open() as database, database.begin(write=False) as transaction:
            for key, value in transaction.cursor():
                yield SourceImage(_key_text(key), None, bytes(value), is_rgb=True)

    def headers(self) -> Iterator[Header]:
        """Only of the first readable image: reading all headers would read the whole database."""
        return iter(self._first_header())

    def _first_header(self) -> list[Header]:
        with self._open() as database, database.begin(write=False) as transaction:
            for key, value in transaction.cursor():
                try:
                    shape = read_header(io.BytesIO(value))
                except ImageError:
                    continue
                return [(_key_text(key), (*shape[:2], 3))]
        return []


def _key_text(key: bytes) -> str:
    return f'key {key.decode("ascii", "backslashreplace")}'
