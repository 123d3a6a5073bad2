# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset, a folder or a .zip, that appears only once it is complete."""
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dnnlib.util import UserError

ARCHIVE_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date in a zip; equal input gives equal bytes
OTHER_ARCHIVES = {'.rar', '.tar', '.7z', '.gz', '.tgz', '.bz2', '.xz', '.zst', '.zipx'}
Write = Callable[[str, bytes], None]


@contextmanager
def dataset_writer(dest: str, option: str = '--dest') -> Iterator[Write]:
    """Yield write(name, data) for a new dataset at `dest`: a zip if it ends in '.zip', else a folder.

    Written under a temporary name beside `dest` and renamed at the end; removed on failure. A zip replaces
    an existing one; a folder must be missing or empty. Raises UserError naming
    `option`.
    """
    is_zip = _is_zip_name(dest)
    check_dest(dest, option)
    target = Path(os.path.abspath(dest))
    # Beside the target: renaming is atomic only within one file system.
    # Unique beyond the process id, which two containers with one disk may share.
    partial = target.with_name(f'.{target.name[:100]}.{uuid.uuid4().hex}.partial')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (_open_zip if is_zip else _open_folder)(partial) as write:
            yield write
        # Not every system can rename over an existing empty folder.
        if not is_zip and target.exists():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{option}={dest}: cannot be written ({error.strerror or error})') from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        elif partial.is_file():
            partial.unlink()


def _is_zip_name(dest: str) -> bool:
    return dest.lower().endswith('.zip')


def check_dest(dest: str, option: str = '--dest') -> None:
    """Raise UserError if `dest` is a non-empty folder, another archive, or a file (for a zip: a folder)."""
    path = Path(dest)
    if path.suffix.lower() in OTHER_ARCHIVES and not path.is_dir():
        raise UserError(f'{option}={dest}: a dataset is a folder or a .zip; choose a name that ends in .zip')
    if _is_zip_name(dest):
        if path.is_dir():
            raise UserError(f'{option}={dest}: is a folder; remove it or choose another name')
    elif path.is_dir():
        if any(path.iterdir()):
            raise UserError(f'{option}={dest}: the folder is not empty; empty it or choose another')
    elif path.exists():
        raise UserError(f'{option}={dest}: is a file; choose a folder, or a name that ends in .zip')


@contextmanager
def _open_zip(path: Path) -> Iterator[Write]:
    with zipfile.ZipFile(path, 'w', compression=zipfile.ZIP_STORED) as archive:
        def write(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(name, date_time=ARCHIVE_DATE)
            info.create_system, info.external_attr = 3, 0o644 << 16  # the same on every system
            archive.writestr(info, data)

        yield write


@contextmanager
def _open_folder(path: Path) -> Iterator[Write]:
    path.mkdir()

    def write(name: str, data: bytes) -> None:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    yield write
