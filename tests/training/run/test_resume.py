# SPDX-License-Identifier: Apache-2.0
"""What --resume means, which options it accepts, and what the records of a run forget."""
import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
from small_run import SmallRun, small_config

from dnnlib.util import UserError
from metrics.evaluation import data_of_run
from training.formats.pickled import HostCopies
from training.report.curves import read_ticks
from training.run.folder import read_flags
from training.run.log import StatsWriter
from training.run.manifest import read_manifest
from training.run.resume import find_state, missing_metrics, rewind_records
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload, read_state, write_state


def add_snapshot(run_dir, nimg, config=None, tick=3):
    """A training state that holds next to nothing."""
    run_dir.mkdir(parents=True, exist_ok=True)
    options = (config or small_config()).to_options()
    writer = SnapshotWriter(run_dir, entries=read_manifest(run_dir))
    writer.save(Snapshot(nimg, make_payload(options, {'cur_nimg': nimg}, {'tick': tick}, {}), HostCopies()))
    writer.wait()
    assert writer.take_problems() == []
    return Path(find_state(str(run_dir), None)[0].state_path)


def found(resume, outdir=None):
    """(path of the training state, notes)."""
    request, notes = find_state(resume, outdir)
    return request.state_path, notes


def test_latest_is_the_run_of_the_highest_number_that_has_a_snapshot(tmp_path):
    add_snapshot(tmp_path / '00009-a', 8000)
    path = add_snapshot(tmp_path / '00010-b', 4000)
    (tmp_path / '00011-killed-early').mkdir()
    (tmp_path / '99999').write_text('a file')
    add_snapshot(tmp_path / 'other', 8000)
    assert found('latest', tmp_path) == (str(path), [])


def test_latest_without_any_run_is_a_new_one_and_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / 'none'):
        state, notes = find_state('latest', folder)
        assert state is None and 'this is a new one' in notes[0]


def test_a_folder_or_a_file_can_be_named(tmp_path):
    path = add_snapshot(tmp_path / 'run', 4000)
    later = add_snapshot(tmp_path / 'run', 8000)
    assert found(str(tmp_path / 'run')) == (str(later), [])
    assert found(str(path)) == (str(path), [])


def test_what_cannot_be_continued_is_explained_in_one_line(tmp_path):
    (tmp_path / 'empty').mkdir()
    path = add_snapshot(tmp_path / 'damaged', 4000)
    path.write_bytes(b'nothing')
    for resume, message in [('x.pt', 'no such file'), ('runs/3', 'no such folder'),
                            ('empty', 'has no complete snapshot'),
                            ('damaged', 'every training state is damaged')]:
        with pytest.raises(UserError, match=message) as caught:
            find_state(str(tmp_path / resume), None)
        assert str(caught.value).startswith('--resume=') and '\n' not in str(caught.value)
    # Falling back to another run would be a surprise.
    add_snapshot(tmp_path / '00001', 4000)
    (tmp_path / 'damaged').rename(tmp_path / '00002')
    with pytest.raises(UserError, match='every training state is damaged'):
        find_state('latest', tmp_path)


def test_options_that_do_not_fit_are_refused_unless_allowed(tmp_path):
    request = request_of(add_snapshot(tmp_path, 4000))
    assert request.fit(small_config(kimg=77), 'cpu', ()).total_kimg == 77
    with pytest.raises(UserError, match='--gamma'):
        request.fit(small_config(gamma=5.0), 'cpu', ('gamma',))
    assert request.fit(small_config(gamma=5.0), 'cpu', ('gamma', 'allow_changes')).loss.r1_gamma == 5


def request_of(path):
    return find_state(str(path), None)[0]


def test_a_batch_that_was_halved_for_lack_of_memory_stays_so(tmp_path):
    halved = small_config(batch=8, batch_gpu=2)
    request, asked = request_of(add_snapshot(tmp_path, 4000, halved)), small_config(batch=8)
    assert asked.batch_gpu == 8
    config = request.fit(asked, 'cpu', ())
    assert (config.batch_gpu, config.D.mbstd_group_size) == (2, halved.D.mbstd_group_size)
    with pytest.raises(UserError, match='--batch-gpu'):
        request.fit(asked, 'cpu', ('batch_gpu',))


def write_records(folder, *, ticks, snapshots):
    lines = [{'Progress/tick': {'num': 1, 'mean': tick, 'std': 0}} for tick in range(ticks)]
    (folder / 'stats.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"Progress/ti')
    rows = [{'results': {'swd': 1.0}, 'metric': 'swd', 'snapshot_pkl': f'network-snapshot-{n:06d}.pkl'}
            for n in snapshots]
    (folder / 'metric-swd.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_the_records_forget_what_came_after_the_snapshot(tmp_path):
    states = [add_snapshot(tmp_path, nimg, tick=tick) for nimg, tick in ((4000, 2), (8000, 4))]
    write_records(tmp_path, ticks=7, snapshots=[0, 4, 8, 12])
    leftover = tmp_path / f'.{"0" * 32}.tmp.pt'
    leftover.write_bytes(b'half')
    rewind_records(tmp_path, read_state(states[1]), read_manifest(tmp_path))
    assert len((tmp_path / 'stats.jsonl').read_text().splitlines()) == 4
    assert 'network-snapshot-000012' not in (tmp_path / 'metric-swd.jsonl').read_text()
    assert len(read_manifest(tmp_path)) == 2 and not leftover.exists()
    left = rewind_records(tmp_path, read_state(states[0]), read_manifest(tmp_path))
    assert len((tmp_path / 'stats.jsonl').read_text().splitlines()) == 2
    assert len((tmp_path / 'metric-swd.jsonl').read_text().splitlines()) == 2
    assert [e.nimg for e in left] == [4000] and read_manifest(tmp_path) == left


def test_records_that_are_right_are_not_written_anew(tmp_path):
    state = add_snapshot(tmp_path, 4000, tick=3)
    (tmp_path / 'stats.jsonl').write_text('{"Progress/tick": {"mean": 2}}\n')
    (tmp_path / 'metric-swd.jsonl').write_text('{"made": "by hand"}\n')
    before = {p: p.stat().st_ino for p in tmp_path.iterdir()}
    rewind_records(tmp_path, read_state(state), read_manifest(tmp_path))
    assert {p: p.stat().st_ino for p in tmp_path.iterdir()} == before


def test_metrics_that_were_cut_off_are_known(tmp_path):
    write_records(tmp_path, ticks=1, snapshots=[4])
    names = ('swd', 'fid50k_full')
    assert missing_metrics(tmp_path, names, 'network-snapshot-000004.pkl') == ['fid50k_full']
    assert missing_metrics(tmp_path, names, 'network-snapshot-000008.pkl') == list(names)
    assert missing_metrics(tmp_path, (), 'network-snapshot-000008.pkl') == []


def test_a_request_can_be_sent_to_other_processes(tmp_path):
    request = dataclasses.replace(request_of(add_snapshot(tmp_path, 4000)), flags={'kimg': 3})
    assert pickle.loads(pickle.dumps(request)) == request


def test_lines_of_another_type_and_folders_like_temporary_files_are_no_obstacle(tmp_path):
    state = add_snapshot(tmp_path, 4000)
    write_records(tmp_path, ticks=2, snapshots=[4])
    odd = ['[]', '3', 'null', '{"Progress/tick": 3, "snapshot_pkl": 7}', '[' * 100_000, '\x80']
    for name in ('stats.jsonl', 'metric-swd.jsonl'):
        lines = (tmp_path / name).read_text().splitlines()[:-1 if name == 'stats.jsonl' else None]
        (tmp_path / name).write_text('\n'.join([*odd, *lines]) + '\n', encoding='latin1')
    folder = tmp_path / f'.{"0" * 32}.tmp.pt'
    folder.mkdir()
    rewind_records(tmp_path, read_state(state), read_manifest(tmp_path))
    assert len((tmp_path / 'stats.jsonl').read_text().splitlines()) == 2 and folder.is_dir()
    assert missing_metrics(tmp_path, ('swd',), 'network-snapshot-000004.pkl') == []


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_records_that_are_pipes_are_not_waited_for(tmp_path):
    for name in ('training_flags.json', 'training_options.json', 'snapshots.json', 'stats.jsonl'):
        os.mkfifo(tmp_path / name)
    for read in (lambda: read_flags(tmp_path), lambda: read_manifest(tmp_path), lambda: StatsWriter(tmp_path),
                 lambda: read_ticks(tmp_path / 'stats.jsonl')):
        with pytest.raises(UserError, match='not a regular file'):
            read()
    assert data_of_run(str(tmp_path)) is None


@pytest.mark.parametrize('text', ['[' * 200_000, '[]', '{"training_set_kwargs": 3}', '\x80'])
def test_options_of_another_type_name_no_dataset(tmp_path, text):
    (tmp_path / 'training_options.json').write_text(text, encoding='latin1')
    assert data_of_run(str(tmp_path)) is None


def test_states_that_lack_something_are_refused_in_one_line(tmp_path):
    counters = [({}, {'tick': 1}), ({'cur_nimg': 3}, {}), ({'cur_nimg': 'x'}, {'tick': 1})]
    for i, (run, loop) in enumerate(counters):
        payload = make_payload(small_config().to_options(), run, loop, {})
        path = tmp_path / f'training-state-{i:06d}.pt'
        with open(path, 'xb') as file:
            write_state(file, payload)
        with pytest.raises(UserError, match='parts of this training state are missing') as caught:
            find_state(str(path), None)
        assert '\n' not in str(caught.value)
    state = SmallRun(small_config()).state
    saved = state.state_dict()
    for part, key in [('run', 'G'), ('run', 'D_opt'), ('run', 'pl_mean'), ('loop', 'tick')]:
        broken = {**saved, part: {name: value for name, value in saved[part].items() if name != key}}
        with pytest.raises(UserError, match='parts of the training state are missing or of another kind'):
            state.load_state_dict(broken)
