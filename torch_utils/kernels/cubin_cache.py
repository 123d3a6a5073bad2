# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk: one file per key, written atomically, verified when read, no locks."""
import hashlib
import os
import struct
import tempfile
from pathlib import Path

MAGIC = b'SG2CUBIN'
_HEADER = struct.Struct('<8sQ32s')  # magic, length of the code, its SHA-256
SUFFIX = '.cubin'


class CubinCache:
    """A folder of compiled code. Several processes may use it at once: the last writer wins, with the same
    content.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of `key`."""
        return self.folder / (key + SUFFIX)

    def load(self, key: str) -> bytes | None:
        """The code of `key`; None if it is missing, unreadable or corrupt."""
        try:
            data = self.path(key).read_bytes()
        except OSError:
            return None
        if len(data) < _HEADER.size:
            return None
        magic, length, digest = _HEADER.unpack_from(data)
        code = data[_HEADER.size:]
        intact = magic == MAGIC and len(code) == length and hashlib.sha256(code).digest() == digest
        return code if intact else None

    def store(self, key: str, code: bytes) -> None:
        """Store `code` under `key`. Raises OSError if the folder cannot be created or written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=key[:16], suffix='.tmp')
        try:
            with os.fdopen(handle, 'wb') as file:
                file.write(_HEADER.pack(MAGIC, len(code), hashlib.sha256(code).digest()) + code)
            os.replace(temporary, self.path(key))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def usage(self) -> tuple[int, int]:
        """(number of files, their bytes)."""
        sizes = [path.stat().st_size for path in self.folder.glob('*' + SUFFIX)]
        return len(sizes), sum(sizes)


def key_of(*parts: str | bytes) -> str:
    """SHA-256 of the parts in hexadecimal; depends on the boundaries between parts, too."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(struct.pack('<Q', len(data)) + data)
    return digest.hexdigest()
