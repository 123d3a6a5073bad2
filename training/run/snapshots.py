# SPDX-License-Identifier: Apache-2.0
"""Writes snapshots while training goes on: from copies, in a thread, one at a time."""
import contextlib
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.util import UserError
from training.checkpoint import HostCopies, atomic_write
from training.formats.convert import write_snapshot
from training.run.manifest import (
    NETWORKS,
    SAFETENSORS,
    STATE,
    Entries,
    SnapshotEntry,
    describe_file,
    forget_files,
    prune,
    read_manifest,
    state_name,
    with_snapshot,
    write_manifest,
)
from training.run.state_file import write_state

ROLES = {'pkl': NETWORKS, 'safetensors': SAFETENSORS}


@dataclass(frozen=True)
class Snapshot:
    """What is to be written of a run at `nimg` pictures; all tensors are from `copies`.

    payload: see run_state_file.make_payload.  networks: see checkpoint.copy_networks, None for none, under
    the name `networks_name`.  others: role -> name of files that belong to the snapshot and are written
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
    networks.  What goes wrong costs the snapshot, not the run: take_problems() tells. Raises UserError if
    there is a manifest that it cannot read.
    """

    def __init__(
        self, run_dir: str | os.PathLike, keep: int | None = None, metric: str | None = None,
        formats: Sequence[str] = ('pkl',),
    ):
        self.run_dir, self.keep, self.metric, self.formats = Path(run_dir), keep, metric, tuple(formats)
        self._entries: Entries = read_manifest(run_dir)
        self._results: dict[int, Mapping[str, float]] = {}
        self._problems: list[str] = []
        self.has_failed = False  # whether the snapshot before the last wait() is missing
        self._thread: threading.Thread | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start to write; waits for the snapshot before, should that still be under way."""
        self.wait()
        # Not a daemon: the interpreter waits for it, even if the program ends with an error.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name='snapshot')
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._results:
            self._explain_errors(self._add_results)

    def wait_for_files(self, timeout_sec: float) -> None:
        """Give the files that are being written so long to be complete. For the end of a program only."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_sec)

    def take_problems(self) -> list[str]:
        """A line for each thing that went wrong since the last call."""
        problems, self._problems = self._problems, []
        return problems

    def add_results(self, nimg: int, results: Mapping[str, float]) -> None:
        """Note the results of metrics for the snapshot at nimg, as soon as nothing is being written."""
        if results:
            self._results[nimg] = results
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def _write(self, snapshot: Snapshot) -> None:
        snapshot.copies.wait()
        path = self.run_dir / state_name(self._entries, snapshot.nimg)
        self.has_failed = not self._explain_errors(lambda: self._write_files(snapshot, path))
        if self.has_failed:
            # On a full disk, a large file that nobody will look for does harm.
            self._delete([path.name])

    def _write_files(self, snapshot: Snapshot, path: Path) -> None:
        with atomic_write(path) as file:
            write_state(file, snapshot.payload)
        names = {STATE: path.name, **snapshot.others}
        if snapshot.networks is not None:
            stem = Path(snapshot.networks_name).stem
            networks = {ROLES[kind]: f'{stem}.{kind}' for kind in self.formats}
            # A listed name is struck off before its file is replaced, so that the list is always true.
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
        """Put a new list on the disk, then delete what it does without."""
        kept, gone = prune(entries, self.keep, self.metric)
        write_manifest(self.run_dir, kept)
        self._entries = kept
        self._delete(gone)

    def _delete(self, names: list[str]) -> None:
        listed = {f.name for e in self._entries for f in e.files.values()}
        for name in names:
            if name not in listed:
                with contextlib.suppress(OSError):  # what cannot be deleted only takes room
                    (self.run_dir / name).unlink(missing_ok=True)

    def _explain_errors(self, action: Callable[[], None]) -> bool:
        """Whether the action succeeded; if not, there is a line on it."""
        try:
            action()
        except (UserError, OSError, RuntimeError, pickle.PickleError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            self._problems.append(f'Snapshot not saved, training goes on: {text}')
            return False
        return True
