# SPDX-License-Identifier: Apache-2.0
"""Writes snapshots while training continues: from copies, in a thread, one at a time."""
import contextlib
import hashlib
import os
import pickle
import platform
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dnnlib.util import UserError, first_line, replace_file
from training.formats.convert import write_snapshot
from training.formats.pickled import HostCopies
from training.run.manifest import (
    NETWORKS,
    SAFETENSORS,
    STATE,
    Entries,
    SnapshotEntry,
    describe_file,
    forget_files,
    prune,
    state_name,
    with_snapshot,
    write_manifest,
)

ROLES = {'pkl': NETWORKS, 'safetensors': SAFETENSORS}


@dataclass(frozen=True)
class Snapshot:
    """What is to be written of a run at `nimg` images; all tensors are from `copies`.

    payload: see make_payload.  networks: see training.formats.pickled.copy_networks, None for none, under the
    name `networks_name`.  others: role -> name of files that belong to the snapshot and are written
    already.
    """

    nimg: int
    payload: Mapping[str, Any]
    copies: HostCopies
    networks: Mapping[str, Any] | None = None
    networks_name: str = ''
    others: Mapping[str, str] = field(default_factory=dict)


class SnapshotWriter:
    """Writes snapshots into the folder of a run and lists them in its manifest; one process of a run has one.

    keep: see manifest.prune.  metric: the one that decides which snapshot is the best.  formats: of the
    networks.  entries: what the manifest lists already.  What goes wrong costs the snapshot, not the run:
    take_problems() tells.
    """

    def __init__(
        self, run_dir: str | os.PathLike, keep: int | None = None, metric: str | None = None,
        formats: Sequence[str] = ('pkl',), entries: Entries = (),
    ):
        self.run_dir, self.keep, self.metric, self.formats = Path(run_dir), keep, metric, tuple(formats)
        self._entries = entries
        self._results: dict[int, Mapping[str, float]] = {}
        self._problems: list[str] = []
        self.has_failed = False  # whether the snapshot before the last wait() is missing
        self._thread: threading.Thread | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start writing; first waits for the previous snapshot to complete."""
        self.wait()
        # Not a daemon: the interpreter waits for it, even if the program ends with an error.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name='snapshot')
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._results:
            self._explain_errors(self._add_results)

    def wait_for_files(self, timeout_sec: float) -> None:
        """Wait for files that are being written, at most this long. For the end of a program only."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_sec)

    def take_problems(self) -> list[str]:
        """One line per problem since the last call."""
        problems, self._problems = self._problems, []
        return problems

    def latest_state(self) -> str | None:
        """Name of the newest training state, None without one."""
        return self._latest((STATE,))

    def latest_networks(self) -> str | None:
        """Name of the newest network file, None without one."""
        return self._latest((NETWORKS, SAFETENSORS))

    def _latest(self, roles: Sequence[str]) -> str | None:
        files = [entry.files[role] for entry in self._entries for role in roles if role in entry.files]
        return files[-1].name if files else None

    def add_results(self, nimg: int, results: Mapping[str, float]) -> None:
        """Add results of metrics to the snapshot at nimg, as soon as nothing is being written."""
        if results:
            self._results[nimg] = results
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def _write(self, snapshot: Snapshot) -> None:
        snapshot.copies.wait()
        path = self.run_dir / state_name(self._entries, snapshot.nimg)
        self.has_failed = not self._explain_errors(lambda: self._write_files(snapshot, path))
        if self.has_failed:
            # An unlisted large file would only fill the disk.
            self._delete([path.name])

    def _write_files(self, snapshot: Snapshot, path: Path) -> None:
        with replace_file(path, durable=True) as temporary, open(temporary, 'xb') as file:
            write_state(file, snapshot.payload)
        names = {STATE: path.name, **snapshot.others}
        if snapshot.networks is not None:
            stem = Path(snapshot.networks_name).stem
            networks = {ROLES[kind]: f'{stem}.{kind}' for kind in self.formats}
            # Remove a name from the list before its file is replaced, so that the list is always valid.
            others = forget_files(self._entries, set(networks.values()))
            if others != self._entries:
                self._publish(others)
            write_snapshot(self.run_dir / snapshot.networks_name, snapshot.networks, self.formats)
            names.update(networks)
        files = {role: describe_file(self.run_dir / name) for role, name in names.items()}
        self._publish(with_snapshot(self._entries, SnapshotEntry(snapshot.nimg, files)))

    def _add_results(self) -> None:
        results, self._results = self._results, {}
        self._publish(tuple(
            SnapshotEntry(e.nimg, e.files, {**e.metrics, **results.get(e.nimg, {})}) for e in self._entries))

    def _publish(self, entries: Entries) -> None:
        """Write a new list, then delete files that it drops."""
        kept, gone = prune(entries, self.keep, self.metric)
        write_manifest(self.run_dir, kept)
        self._entries = kept
        self._delete(gone)

    def _delete(self, names: list[str]) -> None:
        listed = {f.name for e in self._entries for f in e.files.values()}
        for name in names:
            if name not in listed:
                with contextlib.suppress(OSError):  # a file that cannot be deleted only takes space
                    (self.run_dir / name).unlink(missing_ok=True)

    def _explain_errors(self, action: Callable[[], None]) -> bool:
        """Run the action; on an error, record it as a problem and return False."""
        try:
            action()
        except (UserError, OSError, RuntimeError, pickle.PickleError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            self._problems.append(f'Snapshot not saved, training continues: {text}')
            return False
        return True


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: not a training state ({first_line(error)}); use an earlier one') from error
    parts = [payload.get(key) for key in KEYS] if isinstance(payload, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts[1:]):
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
