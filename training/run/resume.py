# SPDX-License-Identifier: Apache-2.0
"""Resuming a run: choosing the training state, comparing options, and removing later records.

A killed run has written lines, and perhaps files, after its last snapshot. They are removed, so that the
records of an interrupted run equal those of an uninterrupted one.
"""
import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.util import UserError, replace_file
from training.config import TrainConfig
from training.config.changes import check_changes
from training.report.ticks import nimg_of_name
from training.run.folder import LOCK_FILE, RunLock
from training.run.manifest import (
    Entries,
    forget_files,
    latest_state,
    read_manifest,
    remove_leftovers,
    write_manifest,
)
from training.run.snapshots import read_state

RUN_NUMBER = re.compile(r'\d+')
# In place of a training state: what is known before the first image.
BEGINNING: dict[str, Any] = {'run': {'cur_nimg': -1}, 'loop': {'tick': 0}}


@dataclass(frozen=True)
class ResumeRequest:
    """A training state to resume from, as found once for all processes.

    entries: the manifest of its run directory.  options: those that it was saved with.  data_key: of the
    images and labels it was trained on, None if unknown.  flags: to be saved with the options, None to save
    neither.
    """

    state_path: str
    entries: Entries
    options: Mapping[str, Any]
    data_key: str | None = None
    flags: Mapping[str, Any] | None = None

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.state_path).parent

    def fit(self, config: TrainConfig, device_type: str, given: Collection[str]) -> TrainConfig:
        """`config` with the batch_gpu of the state, which may have been halved when memory ran out, unless
        the flags `given` decide otherwise. Raises UserError for other changes that affect training, unless
        allow_changes is given.
        """
        try:
            before = TrainConfig.from_options(self.options)
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'{self.state_path}: the options of this state cannot be read ({error}); use an '
                            'earlier one') from error
        is_same_batch = (config.batch_size, config.num_gpus) == (before.batch_size, before.num_gpus)
        if is_same_batch and not {'batch', 'batch_gpu', 'gpus'} & set(given):
            D = dataclasses.replace(config.D, mbstd_group_size=before.D.mbstd_group_size)
            config = dataclasses.replace(config, batch_gpu=before.batch_gpu, D=D)
        if 'allow_changes' not in given:
            check_changes(before, config.for_device(device_type))
        return config

    def check_data(self, data_key: str, *, allow_changes: bool) -> list[str]:
        """A note if the images or labels are others than those of the state. Raises UserError unless they may
        be.
        """
        if self.data_key in (None, data_key):
            return []
        if not allow_changes:
            raise UserError('--resume: --data holds other images or labels than those the run was trained '
                            'on; give the same ones, or add --allow-changes=1')
        return ['--data holds other images or labels than before, as allowed by --allow-changes.']


def find_state(resume: str, outdir: str | os.PathLike | None) -> tuple[ResumeRequest | None, list[str]]:
    """(the training state that --resume means, notes on the choice for the user).

    resume: 'latest' for the run of the highest number in `outdir` that has a complete snapshot; the folder
    of a run; or a training-state-*.pt.  None if 'latest' finds no run. Raises UserError if there is no such
    file, all states of the run are damaged, or 'latest' is a run that another program has just begun.
    """
    path = Path(resume)
    if resume == 'latest':
        return _latest_of_runs(Path(outdir or '.'))
    if path.suffix == '.pt' or path.is_file():
        if not path.is_file():
            raise UserError(f'--resume={resume}: no such file; give the folder of a run, or latest')
        return _request(path, read_manifest(path.parent)), []
    if not path.is_dir():
        raise UserError(f'--resume={resume}: no such folder; give latest, the folder of a run, a '
                        'training-state-*.pt, or a network .pkl to start a new run from')
    found, notes = newest_state(path)
    if found is None:
        raise UserError(_no_state(path, 'has no complete snapshot'))
    return found, notes


def newest_state(run_dir: Path) -> tuple[ResumeRequest | None, list[str]]:
    """(the newest undamaged training state of a run, None without snapshots; a line for each damaged one that
    is newer). Raises UserError if all are damaged.
    """
    entries = read_manifest(run_dir)
    path, notes = latest_state(run_dir, entries)
    if path is None and notes:
        raise UserError(_no_state(run_dir, f'every training state is damaged ({notes[0].partition(";")[0]})'))
    return None if path is None else _request(path, entries), notes


def _request(path: Path, entries: Entries) -> ResumeRequest:
    payload = read_state(path)
    _check_parts(path, payload)
    return ResumeRequest(str(path), entries, payload['config'], payload['extra'].get('data_key'))


def _check_parts(path: Path, payload: Mapping[str, Any]) -> None:
    """Raise UserError unless the parts of a training state are there that are used before it is loaded."""
    run, loop = payload['run'], payload['loop']
    parts = [payload['config'], run, loop, payload['extra']]
    if not all(isinstance(part, dict) for part in parts) or not all(
            type(number) is int for number in (run.get('cur_nimg'), loop.get('tick'))):
        raise UserError(f'{path}: parts of this training state are missing; use an earlier one')


def _no_state(run_dir: Path, reason: str) -> str:
    return (f'--resume={run_dir}: {reason}; start a new run, perhaps with --resume from one of its '
            'network-snapshot-*.pkl')


def _latest_of_runs(outdir: Path) -> tuple[ResumeRequest | None, list[str]]:
    runs = [path for path in (outdir.iterdir() if outdir.is_dir() else ())
            if path.is_dir() and RUN_NUMBER.match(path.name)]
    for run in sorted(runs, key=lambda path: int(RUN_NUMBER.match(path.name)[0]), reverse=True):
        found, notes = newest_state(run)
        if found is not None:
            return found, notes
        # It was killed before its first snapshot, unless it has only just started.
        _check_is_dead(run)
    return None, [f'--resume=latest: no run with a snapshot in {outdir}; this is a new one']


def _check_is_dead(run: Path) -> None:
    if not (run / LOCK_FILE).is_file():
        return
    try:
        with RunLock(run):
            pass
    except UserError as error:
        raise UserError(f'--resume=latest: {error}; to resume an older run, name its directory') from error


def rewind_records(run_dir: str | os.PathLike, payload: Mapping[str, Any], entries: Entries) -> Entries:
    """Remove what the records of a run say about the time after a training state, and temporary files.

    payload: of the state, or BEGINNING.  entries: of the manifest; returns those that are left. Only one
    process may call it, before the records are opened. Each file is replaced in one step. Raises UserError
    if one cannot be written.
    """
    run_dir, nimg, tick = Path(run_dir), payload['run']['cur_nimg'], payload['loop']['tick']
    remove_leftovers(run_dir)
    later = {f.name for e in entries if e.nimg > nimg for f in e.files.values()}
    if later:
        entries = forget_files(entries, later)
        write_manifest(run_dir, entries)
    _keep_lines(run_dir / 'stats.jsonl', lambda line: line['Progress/tick']['mean'] < tick)
    for path in sorted(run_dir.glob('metric-*.jsonl')):
        _keep_lines(path, lambda line: _nimg_of(line) <= nimg)
    return entries


def _nimg_of(line: Mapping[str, Any]) -> int:
    """cur_nimg at the snapshot of a line, according to its name."""
    # Lines that belong to no snapshot of this run, such as those of calc_metrics.py, stay.
    return nimg_of_name(line.get('snapshot_pkl') or '', 'network-snapshot-') or 0


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the wanted lines of a JSON lines file; drops an incomplete last line."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_wanted(line, wanted)]
    if kept != lines:
        with replace_file(path, durable=True) as temporary:
            temporary.write_bytes(b''.join(kept))


def _is_wanted(line: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return line.endswith(b'\n') and wanted(json.loads(line))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def missing_metrics(run_dir: str | os.PathLike, names: Collection[str], networks_name: str) -> list[str]:
    """Metrics without a result for a network pickle, since the run was killed while they ran."""
    def has_result(name: str) -> bool:
        path = Path(run_dir, f'metric-{name}.jsonl')
        found = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        return any(_is_wanted(line, lambda row: row['snapshot_pkl'] == networks_name) for line in found)
    return [name for name in names if not has_result(name)]
