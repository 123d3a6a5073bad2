# SPDX-License-Identifier: Apache-2.0
"""snapshots.json: the complete snapshots of a run. Files that are not listed are ignored.

A snapshot is a set of files: training state, networks, sample sheet. The manifest is replaced only once all
of them are on disk, so that a crash leaves the previous snapshots.
"""
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.util import UserError, file_sha256, read_regular, replace_file
from training.config.values import HIGHER_IS_BETTER
from training.report.ticks import kimg_number

MANIFEST = 'snapshots.json'
FORMAT = 1
STATE, NETWORKS, SAFETENSORS, FAKES = 'state', 'networks', 'safetensors', 'fakes'  # roles of files
NUM_STATES = 2  # kept at least: the older one is the fallback if the newest is corrupt
TEMPORARY = re.compile(r'\.[0-9a-f]{32}\.tmp(\.\w+)?')  # of dnnlib.util.replace_file


@dataclass(frozen=True)
class FileEntry:
    """A file in the run directory: its name, bytes, and SHA-256 in hexadecimal digits."""

    name: str
    size: int
    sha256: str

    def problem(self, run_dir: str | os.PathLike) -> str | None:
        """Why the file on disk is invalid; None if it is valid."""
        path = Path(run_dir, self.name)
        try:
            if path.stat().st_size != self.size:
                return f'{path}: {path.stat().st_size} bytes instead of {self.size}'
            return None if file_sha256(path) == self.sha256 else f'{path}: its checksum does not match'
        except OSError as error:
            return f'{path}: cannot be read ({error.strerror or error})'


@dataclass(frozen=True)
class SnapshotEntry:
    """A complete snapshot, at `nimg` images.  files: by role.  metrics: results so far."""

    nimg: int
    files: Mapping[str, FileEntry]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def without(self, roles: Sequence[str]) -> 'SnapshotEntry':
        """The same snapshot without some of its files."""
        return dataclasses.replace(self, files={r: f for r, f in self.files.items() if r not in roles})


Entries = tuple[SnapshotEntry, ...]


def describe_file(path: str | os.PathLike) -> FileEntry:
    """The entry for a file that is complete. Raises OSError."""
    path = Path(path)
    return FileEntry(path.name, path.stat().st_size, file_sha256(path))


def read_manifest(run_dir: str | os.PathLike) -> Entries:
    """The snapshots of a run, oldest first; none if there is no manifest.

    Raises UserError if it cannot be read, or another program wrote it.
    """
    path = Path(run_dir, MANIFEST)
    try:
        data = json.loads(read_regular(path))
        if data['format'] != FORMAT:
            raise UserError(f'{path}: format {data["format"]}, but this program reads {FORMAT}; continue '
                            'with the program that wrote it')
        return tuple(_entry(row) for row in data['snapshots'])
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'{path}: not a list of snapshots; give --resume a training-state-*.pt instead') from error


def _entry(row: Mapping[str, Any]) -> SnapshotEntry:
    """Raises ValueError, TypeError or others for what no program of ours has written."""
    files = {role: FileEntry(**values) for role, values in row['files'].items()}
    for file in files.values():
        # Pruning deletes by these names, so none may lead out of the folder.
        is_name = file.name == Path(file.name).name and file.name not in ('', '..')
        if not is_name or type(file.size) is not int or type(file.sha256) is not str:
            raise ValueError(f'no file of a run: {file}')
    metrics = {name: value for name, value in row['metrics'].items() if isinstance(value, (int, float))}
    if type(row['nimg']) is not int:
        raise ValueError(f'no number of images: {row["nimg"]}')
    return SnapshotEntry(row['nimg'], files, metrics)


def write_manifest(run_dir: str | os.PathLike, entries: Entries) -> None:
    """Replace the manifest of a run in one step. Raises UserError if it cannot be written."""
    data = {'format': FORMAT, 'snapshots': [dataclasses.asdict(entry) for entry in entries]}
    with replace_file(Path(run_dir, MANIFEST), durable=True) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + '\n', encoding='ascii')


def latest_state(run_dir: str | os.PathLike, entries: Entries) -> tuple[Path | None, list[str]]:
    """The newest intact training state of a run, and one line per newer one that is damaged.

    None if there is none.
    """
    notes = []
    for entry in reversed(entries):
        if STATE not in entry.files:
            continue
        problem = entry.files[STATE].problem(run_dir)
        if problem is None:
            return Path(run_dir, entry.files[STATE].name), notes
        notes.append(f'{problem}; continuing from the snapshot before')
    return None, notes


def state_name(entries: Entries, nimg: int) -> str:
    """Name of the training state at nimg: training-state-<kimg>.pt.

    If another snapshot has this name, the remaining images are appended, so that a listed state is never
    overwritten.
    """
    name = f'training-state-{kimg_number(nimg)}.pt'
    taken = {e.files[STATE].name for e in entries if STATE in e.files and e.nimg != nimg}
    return name if name not in taken else f'training-state-{kimg_number(nimg, is_taken=True)}.pt'


def with_snapshot(entries: Entries, new: SnapshotEntry) -> Entries:
    """The list with one more snapshot, which replaces files of equal name and a snapshot of equal nimg."""
    rest = forget_files([e for e in entries if e.nimg != new.nimg], {f.name for f in new.files.values()})
    return tuple(sorted([*rest, new], key=lambda e: e.nimg))


def forget_files(entries: Sequence[SnapshotEntry], names: set[str]) -> Entries:
    """The list without the files of these names."""
    kept = [e.without([role for role, f in e.files.items() if f.name in names]) for e in entries]
    return tuple(e for e in kept if e.files)


def prune(entries: Entries, keep: int | None = None, metric: str | None = None) -> tuple[Entries, list[str]]:
    """(the snapshots to keep, the names of the files to delete afterwards, training states first).

    keep: number of newest snapshots whose networks are kept, besides the best one by `metric`; None: all.
    Training states, which are large, are kept with these networks, and in the NUM_STATES newest snapshots.
    Sample sheets are always kept.
    """
    chosen = {e.nimg for e in _chosen(entries, keep, metric)}
    last = {e.nimg for e in [e for e in entries if STATE in e.files][-NUM_STATES:]}
    kept = []
    for entry in entries:
        has_state = entry.nimg in last or (keep is not None and entry.nimg in chosen)
        has_networks = keep is None or entry.nimg in chosen
        drop = ([] if has_state else [STATE]) + ([] if has_networks else [NETWORKS, SAFETENSORS])
        kept.append(entry.without(drop))
    listed = {f.name for e in kept for f in e.files.values()}
    gone = [e.files[role].name for role in (STATE, NETWORKS, SAFETENSORS) for e in entries if role in e.files]
    return tuple(e for e in kept if e.files), [name for name in gone if name not in listed]


def _chosen(entries: Entries, keep: int | None, metric: str | None) -> Entries:
    if keep is None:
        return ()
    candidates = [e for e in entries if _has_networks(e)]
    best = best_snapshot(entries, metric)
    return tuple(candidates[-keep:]) + (() if best is None else (best,))


def best_snapshot(entries: Entries, metric: str | None) -> SnapshotEntry | None:
    """The snapshot with the best value of a metric, by its name or a result's; None if there is none."""
    if metric is None:
        return None
    scored = [(value, e) for e in entries if _has_networks(e)
              for value in [_value(e.metrics, metric)] if value is not None]
    if not scored:
        return None
    pick = max if metric.startswith(HIGHER_IS_BETTER) else min
    return pick(scored, key=lambda pair: pair[0])[1]


def _has_networks(entry: SnapshotEntry) -> bool:
    return NETWORKS in entry.files or SAFETENSORS in entry.files


def _value(metrics: Mapping[str, float], metric: str) -> float | None:
    # A metric may have several results, such as pr50k3_precision and pr50k3_recall: the first one counts.
    found = [value for name, value in metrics.items() if name == metric or name.startswith(metric + '_')]
    return found[0] if found and found[0] == found[0] else None


def remove_leftovers(run_dir: str | os.PathLike) -> list[str]:
    """Delete temporary files that a killed process left in the run directory; returns their names."""
    removed = []
    for path in sorted(Path(run_dir).iterdir()):
        # A folder of such a name is none of ours.
        if TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed
