# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, in both formats, read by our own interpreter instead of torch.load: nothing runs."""
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from torch_utils.pickles import describe
from torch_utils.pickles.budget import Budget, Damaged
from torch_utils.pickles.machine import Buildable, Global, Machine
from torch_utils.pickles.tensors import STORAGE_TYPES, Declared, Storage, read_header

ZIP_HEAD = b'PK\x03\x04'
OLD_HEAD = b'\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'  # after two bytes: the first pickle before torch 1.6
LOCAL_HEADER = struct.Struct('<26xHH')  # before a member of a zip: lengths of its name and extra field
BAD_ZIP = (zipfile.BadZipFile, struct.error, LookupError, NotImplementedError, RuntimeError, OSError,
           EOFError, ValueError, ArithmeticError)


class _Bag(Buildable):
    """Stands in for argparse.Namespace, the options of a program, which are ignored."""

    def build(self, state: Any) -> None:
        """Take any state."""


TABLE = {**STORAGE_TYPES, ('argparse', 'Namespace'): Global(new=_Bag)}


def is_torch_file(data: bytes) -> bool:
    """Whether torch.save wrote this, judging by its first bytes."""
    return data[:4] == ZIP_HEAD or data[2:2 + len(OLD_HEAD)] == OLD_HEAD


def load(data: bytes, name: str) -> Any:
    """Contents of the file: plain values, with a StoredTensor in place of every tensor, and a
    ModuleDescription in place of every network module.

    name: of the file in error messages. Raises UserError, one line, if the file is damaged or refers to
    anything but tensors and networks.
    """
    with describe.explained(name):
        return (_from_zip if data[:4] == ZIP_HEAD else _from_stream)(data, Budget(len(data)))


def _from_zip(data: bytes, budget: Budget) -> Any:
    """<root>/data.pkl, whose persistent ids name the files <root>/data/<key>."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            main = next((item for item in archive.namelist() if item.endswith('/data.pkl')), None)
            if main is None:
                raise Damaged('a zip archive that torch.save did not write')
            root = main.removesuffix('data.pkl')
            read = _reader(archive, data, budget)
            if root + 'byteorder' in archive.namelist() and read(root + 'byteorder') != b'little':
                raise Damaged('numbers in another byte order')
            storages: dict[str, Storage] = {}

            def find(declared: Declared) -> Storage:
                if declared.key not in storages:
                    storages[declared.key] = _storage(declared, read(f'{root}data/{declared.key}'))
                return storages[declared.key]
            return _run(io.BytesIO(read(main)), find, budget)
    except BAD_ZIP as error:
        raise Damaged(f'{type(error).__name__}: {str(error)[:80]}') from error


def _reader(archive: zipfile.ZipFile, data: bytes, budget: Budget) -> Callable[[str], memoryview]:
    def read(name: str) -> memoryview:
        item = archive.getinfo(name)
        # torch.save never compresses; an uncompressed entry cannot be larger than the file.
        if item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1:
            raise Damaged(f'{name[:40]} is compressed or encrypted')
        start = item.header_offset + LOCAL_HEADER.size
        start += sum(LOCAL_HEADER.unpack_from(data, item.header_offset))
        # A view: members may overlap, and most never become tensors.
        part = memoryview(data)[start:start + item.file_size]
        budget.charge(len(part))
        if len(part) != item.file_size or zlib.crc32(part) != item.CRC:
            raise Damaged(f'{name[:40]} is cut off or changed')
        return part
    return read


def _from_stream(data: bytes, budget: Budget) -> Any:
    """Three small pickles, the main one, the list of keys, then size and bytes of each storage."""
    file = io.BytesIO(data)
    read_header(file, 'a file', budget)
    start, declared = file.tell(), {}

    def note(wanted: Declared) -> Storage:
        declared[wanted.key] = wanted
        return Storage(memoryview(b''), wanted.dtype, wanted.numel)
    # Run twice, because the data of the storages follows the pickle that names them.
    _run(file, note, budget)
    keys = Machine(file, {}, budget=budget).load()
    # Exact types first: comparing nested lists can take exponential time.
    is_list = type(keys) is list and all(type(key) is str for key in keys)
    if not is_list or sorted(keys) != sorted(declared):
        raise Damaged('other storages than the tensors need')
    storages, position = {}, file.tell()
    for key in keys:
        numel, position = int.from_bytes(data[position:position + 8], 'little'), position + 8
        if numel != declared[key].numel:
            raise Damaged('a storage of another size than declared')
        end = position + numel * declared[key].dtype.itemsize
        storages[key], position = _storage(declared[key], memoryview(data)[position:end]), end
    file.seek(start)
    return _run(file, lambda wanted: storages[wanted.key], budget)


def _run(file: io.BytesIO, find: Callable[[Declared], Storage], budget: Budget) -> Any:
    table = {**describe.table(budget), **TABLE}
    return Machine(file, table, lambda pid: find(Declared(pid)), budget, drops_dict_state=True).load()


def _storage(declared: Declared, data: memoryview) -> Storage:
    if len(data) != declared.numel * declared.dtype.itemsize:
        raise Damaged(f'a storage of {declared.numel} elements with {len(data)} bytes')
    return Storage(data, declared.dtype, declared.numel)
