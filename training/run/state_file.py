# SPDX-License-Identifier: Apache-2.0
"""training-state-*.pt: all that a run needs to go on as if nothing had happened.

The file is what torch.save writes, a zip archive, and torch.load(weights_only=True) reads it: tensors and
plain values. The comment at the end of the archive holds the SHA-256 of everything before it.
"""
import hashlib
import os
import pickle
import platform
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

from dnnlib.util import UserError

FORMAT = 1
KEYS = ('format', 'config', 'versions', 'run', 'loop', 'extra')
HASH_CHUNK = 1 << 20
COMMENT_MARK = b'sha256:'
COMMENT_SIZE = len(COMMENT_MARK) + 64
# The last two bytes of a zip file without comment: the comment's length, 0.
LENGTH_FIELD = struct.Struct('<H')


class _Sink:
    """Passes bytes on to a file and hashes them; keeps an error for later.

    PyTorch's writer does not expect exceptions from the file that it writes to, and may abort the process.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: whoever opened the file flushes it."""


def make_payload(
    config: Mapping[str, Any], run: Mapping[str, Any], loop: Mapping[str, Any], extra: Mapping[str, Any],
) -> dict[str, Any]:
    """What write_state takes.

    config: the options of the run as plain values.  run: TrainingState.state_dict().  loop: bookkeeping.
    extra: what companions such as guards and statistics keep.
    """
    versions = {'python': platform.python_version(), 'torch': str(torch.__version__), 'numpy': np.__version__}
    return {'format': FORMAT, 'config': dict(config), 'versions': versions, 'run': dict(run),
            'loop': dict(loop), 'extra': dict(extra)}


def write_state(file: BinaryIO, payload: Mapping[str, Any]) -> None:
    """Write a payload of tensors and plain values into a file opened for writing and seeking.

    Raises OSError if there is no room.
    """
    sink = _Sink(file)
    torch.save(dict(payload), sink)
    if sink.error is not None:
        raise sink.error
    file.seek(-LENGTH_FIELD.size, os.SEEK_END)
    file.write(_ending(sink.hash.hexdigest()))


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """The payload of a file, its tensors on the CPU.

    Raises UserError if the file is missing, damaged, or of another format.
    """
    try:
        _check_whole(path)
        payload = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f'{path}: not a training state ({_first_line(error)}); use an earlier one') from error
    if not isinstance(payload, dict) or not set(KEYS) <= set(payload):
        raise UserError(f'{path}: not a training state; give a training-state-*.pt or the folder of a run')
    if payload['format'] != FORMAT:
        raise UserError(f'{path}: written in format {payload["format"]}, but this program reads {FORMAT}; '
                        'continue with the program that wrote it')
    return payload


def _ending(digest: str) -> bytes:
    """What a file ends with: the length of the comment, and the comment."""
    return LENGTH_FIELD.pack(COMMENT_SIZE) + COMMENT_MARK + digest.encode('ascii')


def _check_whole(path: str | os.PathLike) -> None:
    """Compare the file with its own checksum. Raises UserError."""
    size = os.path.getsize(path) - COMMENT_SIZE - LENGTH_FIELD.size
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        for start in range(0, max(size, 0), HASH_CHUNK):
            digest.update(file.read(min(HASH_CHUNK, size - start)))
        # As it was before the comment was added.
        digest.update(LENGTH_FIELD.pack(0))
        ending = file.read()
    if size < 0 or ending != _ending(digest.hexdigest()):
        raise UserError(f'{path}: damaged or incomplete (its checksum does not fit); use an earlier one')


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
