# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, in both formats, read by our own interpreter instead of torch.load: nothing runs."""
import io
import zipfile
from collections.abc import Callable
from typing import Any

from torch_utils.pickles import describe
from torch_utils.pickles.machine import Buildable, Damaged, Global, Machine
from torch_utils.pickles.tensors import STORAGE_TYPES, Declared, Storage, read_header

ZIP_HEAD = b'PK\x03\x04'
OLD_HEAD = b'\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'  # after two bytes: the first pickle before torch 1.6
BAD_ZIP = (zipfile.BadZipFile, LookupError, NotImplementedError, RuntimeError, OSError, EOFError, ValueError)


class _Bag(Buildable):
    """Stands in for argparse.Namespace, the options of a program, which are ignored."""

    def build(self, state: Any) -> None:
        """Take any state."""


TABLE = {**describe.ALLOWED, **STORAGE_TYPES, ('argparse', 'Namespace'): Global(new=_Bag)}


def is_torch_file(data: bytes) -> bool:
    """Whether torch.save wrote this, judging by its first bytes."""
    return data[:4] == ZIP_HEAD or data[2:2 + len(OLD_HEAD)] == OLD_HEAD


def load(data: bytes, name: str) -> Any:
    """Contents of the file: plain values, with a StoredTensor in place of every tensor.

    name: of the file in error messages. Raises UserError, one line, if the file is damaged or refers to
    anything but tensors.
    """
    with describe.explained(name):
        return _from_zip(data) if data[:4] == ZIP_HEAD else _from_stream(data)


def _from_zip(data: bytes) -> Any:
    """<root>/data.pkl, whose persistent ids name the files <root>/data/<key>."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            main = next((item for item in archive.namelist() if item.endswith('/data.pkl')), None)
            if main is None:
                raise Damaged('a zip archive that torch.save did not write')
            root = main.removesuffix('data.pkl')
            read = _reader(archive, len(data))
            if root + 'byteorder' in archive.namelist() and read(root + 'byteorder') != b'little':
                raise Damaged('numbers in another byte order')
            storages: dict[str, Storage] = {}

            def find(declared: Declared) -> Storage:
                if declared.key not in storages:
                    storages[declared.key] = _storage(declared, read(f'{root}data/{declared.key}'))
                return storages[declared.key]
            return _run(io.BytesIO(read(main)), find)
    except BAD_ZIP as error:
        raise Damaged(f'{type(error).__name__}: {str(error)[:80]}') from error


def _reader(archive: zipfile.ZipFile, size: int) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        item = archive.getinfo(name)
        # torch.save never compresses; an uncompressed entry cannot be larger than the file.
        if item.compress_type != zipfile.ZIP_STORED or item.file_size > size:
            raise Damaged(f'{name[:40]} is compressed')
        return archive.read(item)
    return read


def _from_stream(data: bytes) -> Any:
    """Three small pickles, the main one, the list of keys, then size and bytes of each storage."""
    file = io.BytesIO(data)
    read_header(file, 'a file')
    start, declared = file.tell(), {}

    def note(wanted: Declared) -> Storage:
        declared[wanted.key] = wanted
        return Storage(memoryview(b''), wanted.dtype, wanted.numel)
    # Run twice, because the data of the storages follows the pickle that names them.
    _run(file, note)
    keys = Machine(file, {}).load()
    # Exact types first: comparing nested lists can take exponential time.
    is_list = type(keys) is list and all(type(key) is str for key in keys)
    if not is_list or sorted(keys) != sorted(declared):
        raise Damaged('other storages than the tensors need')
    storages = {}
    for key in keys:
        numel = int.from_bytes(file.read(8), 'little')
        if numel != declared[key].numel:
            raise Damaged('a storage of another size than declared')
        storages[key] = _storage(declared[key], file.read(numel * declared[key].dtype.itemsize))
    file.seek(start)
    return _run(file, lambda wanted: storages[wanted.key])


def _run(file: io.BytesIO, find: Callable[[Declared], Storage]) -> Any:
    return Machine(file, TABLE, lambda pid: find(Declared(pid)), drops_dict_state=True).load()


def _storage(declared: Declared, data: bytes) -> Storage:
    if len(data) != declared.numel * declared.dtype.itemsize:
        raise Damaged(f'a storage of {declared.numel} elements with {len(data)} bytes')
    return Storage(memoryview(data), declared.dtype, declared.numel)
