# SPDX-License-Identifier: Apache-2.0
"""The image files of a folder or zip, readable from any thread and any forked or spawned process."""
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dnnlib.util import UserError
from training.datasets.images import is_image_name

LABEL_FILE = 'dataset.json'


class DatasetPathError(UserError, OSError):
    """A dataset path that cannot be used; also an OSError, which the published classes raise."""


class ImageFiles:
    """Names and bytes of the images under a folder (searched recursively) or in a `.zip`.

    `names`: relative names with forward slashes, sorted as strings. `path` as given.
    Raises DatasetPathError if the path is missing, neither folder nor zip, damaged, or contains no image.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self.is_zip = not os.path.isdir(self.path)  # a folder may be called x.zip
        self._handle: tuple[int, zipfile.ZipFile, threading.Lock] | None = None
        self._check_path()
        with self._explain_errors():
            self._all_names = set(self._list_zip() if self.is_zip else self._list_folder())
        self.names = sorted(name for name in self._all_names if is_image_name(name))
        if not self.names:
            raise DatasetPathError(f'{self.path}: no images in this {self.kind}; expected .png, .jpg, ...')

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
        # Links to folders are not followed: they may form cycles.
        for root, _, files in os.walk(self.path):
            for file in files:
                yield Path(root, file).relative_to(self.path).as_posix()

    def _list_zip(self) -> list[str]:
        return [name for name in self._archive()[0].namelist() if not name.endswith('/')]

    def _archive(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        """One handle per process: after a fork, a shared file position would corrupt reads."""
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.path), threading.Lock())
        return self._handle[1:]

    @contextmanager
    def _explain_errors(self, name: str | None = None) -> Iterator[None]:
        where = self.path if name is None else f'{self.path}: {name}'
        try:
            yield
        except KeyError as error:
            raise DatasetPathError(f'{where}: not in this {self.kind}') from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise DatasetPathError(f'{where}: damaged or incomplete zip ({error}); make it again') from error
        except OSError as error:
            raise DatasetPathError(f'{where}: cannot be read ({error.strerror or error})') from error

    def has(self, name: str) -> bool:
        """Whether a file (image or not) of this relative name exists."""
        return name in self._all_names

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DatasetPathError, which names it, if it is missing or damaged."""
        with self._explain_errors(name):
            if not self.is_zip:
                return Path(self.path, name).read_bytes()
            archive, lock = self._archive()
            # Threads share the handle; ZipFile counts its open members without a lock.
            with lock:
                return archive.read(name)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """One file as a stream, to read only its header. Raises DatasetPathError as `read`."""
        with self._explain_errors(name):
            opened = self._archive()[0].open(name) if self.is_zip else open(Path(self.path, name), 'rb')
        with opened as file:
            yield file

    def read_labels(self) -> bytes | None:
        """The bytes of `dataset.json` in the root, or None."""
        return self.read(LABEL_FILE) if self.has(LABEL_FILE) else None

    def close(self) -> None:
        """Close this process's handle; the next read opens it again."""
        # A handle inherited by a fork belongs to the parent and must not be closed here.
        if self._handle is not None and self._handle[0] == os.getpid():
            self._handle[1].close()
        self._handle = None

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _handle=None)  # neither files nor locks can be pickled
