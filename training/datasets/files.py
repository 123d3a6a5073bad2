# SPDX-License-Identifier: Apache-2.0
"""The image files of a folder or zip, readable from any thread and any forked or spawned process."""
import collections
import lzma
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dnnlib.util import MAX_FILE_BYTES, UserError, open_regular, printable, read_regular
from training.datasets.images import MAX_MEGAPIXELS, is_image_name
from training.datasets.ledger import account

LABEL_FILE = 'dataset.json'
CHUNK_BYTES = 1 << 20
# These methods inflate whatever they are given in one go: bzip2 40 bytes to 45 MB, LZMA 7,000 times.
SMALL_CHUNK_BYTES = {zipfile.ZIP_BZIP2: 1 << 6, zipfile.ZIP_LZMA: 1 << 12}
# What a compressed file may inflate to: FREE_RATIO times its size, and this much in any case.
FREE_RATIO = 32
LABEL_RATIO = 10
FREE_IMAGE_BYTES = 256 << 20
FREE_LABEL_BYTES = 8 << 20
BYTES_PER_LABEL = 16 << 10
ENCRYPTED, UTF_8 = 0x1, 0x800  # flags of zip members (APPNOTE, 4.4.4)
# What the zip reader raises on damaged archives, besides OSError.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
              ValueError, ArithmeticError, LookupError, TypeError, MemoryError, struct.error)


class DatasetPathError(UserError, OSError):
    """A dataset path that cannot be used; also an OSError, which the published classes raise."""


class ImageFiles:
    """Names and bytes of the images under a folder (searched recursively) or in a `.zip`.

    `names`: relative names with forward slashes, sorted as strings. `path` as given. `others`: all further
    files. `unused`: (reason, name) of entries that have no place in either. Links to folders are followed
    unless they lead back.
    Raises DatasetPathError if the path is missing, neither folder nor zip, damaged, or contains no image.
    """

    def __init__(self, path: str | os.PathLike, max_megapixels: int = MAX_MEGAPIXELS) -> None:
        self.path = os.fspath(path)
        self.is_zip = not os.path.isdir(self.path)  # a folder may be called x.zip
        self.max_megapixels = max_megapixels
        self.unused: list[tuple[str, str]] = []
        self._handle: tuple[int, zipfile.ZipFile, threading.Lock, BinaryIO] | None = None
        self._stored_names: dict[str, str] = {}  # where they differ from the relative name
        self._check_path()
        with self._explain_errors():
            found = list(self._list_zip() if self.is_zip else self._list_folder())
        self._all_names = set(found)
        self.unused += [('names that occur twice: the last of each is used', name) for name, count
                        in collections.Counter(found).items() if count > 1 for _ in range(count - 1)]
        self.names = sorted(name for name in self._all_names if is_image_name(name))
        self.others = sorted(self._all_names.difference(self.names))
        if not self.names:
            instead = '; '.join(account(self).lines())
            raise DatasetPathError(f'{self.path}: no images in this {self.kind}; expected .png, .jpg, ...'
                                   + (f' {instead}' if instead else ''))

    @property
    def kind(self) -> str:
        """'zip' or 'folder', for messages."""
        return 'zip' if self.is_zip else 'folder'

    def _check_path(self) -> None:
        if not os.path.exists(self.path):
            raise DatasetPathError(f'{self.path}: no such folder or zip; check the path')
        # Any case of the suffix, as published.
        if self.is_zip and os.path.splitext(self.path)[1].lower() != '.zip':
            raise DatasetPathError(f'{self.path}: neither a folder nor a .zip; make one with dataset_tool.py')

    def _list_folder(self) -> Iterator[str]:
        """Relative names of all files. Folders come before links to folders, each link is followed once."""
        queue = collections.deque([('', frozenset())])  # relative name, and the identity of all folders above
        followed: set[tuple[int, int, str]] = set()
        while queue:
            folder, above = queue.popleft()
            identity = _identity(Path(self.path, folder))
            if identity in above:
                self.unused.append(('links that lead back to a folder above', folder))
                continue
            with os.scandir(Path(self.path, folder)) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                relative = f'{folder}/{entry.name}' if folder else entry.name
                # A link to itself raises in is_dir(): it is reported where it is read.
                if (entry.is_symlink() and not os.path.isdir(entry.path)) or not entry.is_dir():
                    yield relative
                elif not entry.is_symlink():
                    queue.appendleft((relative, above | {identity}))
                elif (*identity, entry.name) not in followed:
                    followed.add((*identity, entry.name))
                    queue.append((relative, above | {identity}))
                else:
                    self.unused.append(('links that were followed under another name', relative))

    def _list_zip(self) -> Iterator[str]:
        for info in self._archive()[0].infolist():
            # Some programs on Windows write their own separator.
            name = info.filename.replace('\\', '/')
            if name.endswith('/'):
                continue
            if name != info.filename:
                self._stored_names[name] = info.filename
            yield name

    def raw_names(self, codec: str) -> dict[str, str]:
        """{name: what its bytes are in this encoding} of names whose encoding is unknown or does not fit."""
        found = {}
        for name in self.names:
            try:
                raw = self._raw_name(name)
                if not raw.isascii():
                    found[name] = raw.decode(codec).replace('\\', '/')
            except ValueError:
                continue
        return found

    def _raw_name(self, name: str) -> bytes:
        if not self.is_zip:
            return os.fsencode(name)
        info = self._info(name)
        # Without this flag, the reader takes names as of this code page (APPNOTE, appendix D).
        return b'' if info.flag_bits & UTF_8 else info.orig_filename.encode('cp437')

    def _info(self, name: str) -> zipfile.ZipInfo:
        return self._archive()[0].getinfo(self._stored_names.get(name, name))

    def _archive(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        """One handle per process: after a fork, a shared file position would corrupt reads."""
        if self._handle is None or self._handle[0] != os.getpid():
            file = open_regular(self.path)
            try:
                self._handle = (os.getpid(), zipfile.ZipFile(file), threading.Lock(), file)
            except ZIP_ERRORS:
                file.close()
                raise
        return self._handle[1:3]

    @contextmanager
    def _explain_errors(self, name: str | None = None) -> Iterator[None]:
        where = self.path if name is None else f'{self.path}: {printable(name)}'
        try:
            yield
        except DatasetPathError:
            raise
        except KeyError as error:
            raise DatasetPathError(f'{where}: not in this {self.kind}') from error
        except OSError as error:
            raise DatasetPathError(f'{where}: cannot be read ({error.strerror or error})') from error
        except ZIP_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise DatasetPathError(f'{where}: damaged or incomplete zip ({reason}); make it again') from error

    def has(self, name: str) -> bool:
        """Whether a file (image or not) of this relative name exists."""
        return name in self._all_names

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DatasetPathError, which names it, if it is missing or damaged.

        The same for a compressed file that would be out of proportion.
        """
        return self._read(name, FREE_IMAGE_BYTES * self.max_megapixels // MAX_MEGAPIXELS)

    def _read(self, name: str, free_bytes: int, only: int | None = None, ratio: int = FREE_RATIO) -> bytes:
        with self._explain_errors(name):
            if not self.is_zip:
                if only is None:
                    return read_regular(Path(self.path, name))
                with open_regular(Path(self.path, name)) as file:
                    return file.read(only)
            archive, lock = self._archive()
            # Threads share the handle; ZipFile counts its open members without a lock.
            with lock:
                info = self._info(name)
                return _inflate(archive, info, max(free_bytes, ratio * info.compress_size), only)

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """At least the first bytes of one file, all if it is shorter. Raises DatasetPathError as `read`."""
        return self._read(name, MAX_FILE_BYTES, num_bytes)

    def size_and_checksum(self, name: str) -> tuple[int, int]:
        """Bytes and CRC-32 of one file; for a zip as its directory says, without reading the file."""
        with self._explain_errors(name):
            if self.is_zip:
                info = self._info(name)
                return info.file_size, info.CRC
        data = self.read(name)
        return len(data), zlib.crc32(data)

    def label_tables(self) -> list[str]:
        """Names of files like `dataset.json`: that in the root alone, else any spelling in any folder."""
        if self.has(LABEL_FILE):
            return [LABEL_FILE]
        parts = [(name, name.split('/')) for name in self.others]
        return [name for name, (*folders, file) in parts if file.lower() == LABEL_FILE
                and not any(folder.startswith('.') or folder == '__MACOSX' for folder in folders)]

    def read_label_table(self, name: str) -> bytes:
        """The bytes of a label file. Raises DatasetPathError as `read`."""
        return self._read(name, FREE_LABEL_BYTES + BYTES_PER_LABEL * len(self.names), ratio=LABEL_RATIO)

    def close(self) -> None:
        """Close this process's handle; the next read opens it again."""
        # A handle inherited by a fork belongs to the parent and must not be closed here.
        if self._handle is not None and self._handle[0] == os.getpid():
            self._handle[1].close()
            self._handle[3].close()
        self._handle = None

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _handle=None)  # neither files nor locks can be pickled


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int, only: int | None) -> bytes:
    """A member of a zip, or at least `only` bytes of it.  limit: bytes that a compressed one may have."""
    if info.flag_bits & ENCRYPTED:
        raise OSError('encrypted; unpack the zip')
    if info.file_size > (MAX_FILE_BYTES if info.compress_type == zipfile.ZIP_STORED else limit):
        raise OSError(f'it would inflate from {info.compress_size} to {info.file_size} bytes, which may be '
                      'meant to fill memory; if it is not, unpack the zip')
    chunk_bytes = SMALL_CHUNK_BYTES.get(info.compress_type, CHUNK_BYTES)
    parts, num_bytes = [], 0
    with archive.open(info) as file:
        file.MIN_READ_SIZE = min(file.MIN_READ_SIZE, chunk_bytes)
        while (only is None or num_bytes < only) and (part := file.read(chunk_bytes)):
            parts.append(part)
            num_bytes += len(part)
    return b''.join(parts)
