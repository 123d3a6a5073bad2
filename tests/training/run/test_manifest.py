# SPDX-License-Identifier: Apache-2.0
"""The list of snapshots: what counts as complete, which one is taken, which ones stay."""
import json

import pytest

from dnnlib.util import UserError
from training.run import manifest
from training.run.manifest import FAKES, NETWORKS, STATE, SnapshotEntry


def latest_state(folder):
    return manifest.latest_state(folder, manifest.read_manifest(folder))


def snapshot(folder, nimg, roles=(STATE, NETWORKS), **metrics):
    """An entry with files on the disk."""
    names = {STATE: f'training-state-{nimg}.pt', NETWORKS: f'network-snapshot-{nimg}.pkl',
             FAKES: f'fakes{nimg}.png'}
    for role in roles:
        (folder / names[role]).write_bytes(f'{role} {nimg}'.encode())
    files = {role: manifest.describe_file(folder / names[role]) for role in roles}
    return SnapshotEntry(nimg, files, metrics)


def test_a_manifest_comes_back(tmp_path):
    entries = tuple(snapshot(tmp_path, nimg, fid50k=nimg / 3) for nimg in (4, 8))
    manifest.write_manifest(tmp_path, entries)
    assert manifest.read_manifest(tmp_path) == entries
    assert [p.name for p in tmp_path.glob('.*')] == []


def test_a_folder_without_manifest_has_no_snapshots(tmp_path):
    assert manifest.read_manifest(tmp_path) == () and latest_state(tmp_path) == (None, [])


LEADING_OUT = ('{"format": 1, "snapshots": [{"nimg": 1, "metrics": {}, "files": {"state": '
               '{"name": "../x", "size": 1, "sha256": ""}}}]}')


@pytest.mark.parametrize('text', [
    '', '[]', '{"format": 1}', '{"format": 1, "snapshots": [3]}', '\xff', '[' * 100_000, LEADING_OUT,
    LEADING_OUT.replace('../x', '..'),
    '{"format": 1, "snapshots": [{"nimg": "1", "metrics": {}, "files": {}}]}',
    '{"format": 1, "snapshots": [{"nimg": 1, "metrics": [], "files": {}}]}'])
def test_a_manifest_that_is_none_is_refused_in_one_line(tmp_path, text):
    (tmp_path / manifest.MANIFEST).write_bytes(text.encode('latin1'))
    with pytest.raises(UserError, match=r'snapshots\.json: not a list of snapshots'):
        manifest.read_manifest(tmp_path)


def test_a_manifest_of_a_later_program_is_refused(tmp_path):
    (tmp_path / manifest.MANIFEST).write_text(json.dumps({'format': 2, 'snapshots': []}))
    with pytest.raises(UserError, match='format 2, but this program reads 1'):
        manifest.read_manifest(tmp_path)


def test_the_latest_undamaged_state_is_taken_and_the_damaged_ones_are_named(tmp_path):
    entries = tuple(snapshot(tmp_path, nimg) for nimg in (4, 8, 12, 16))
    manifest.write_manifest(tmp_path, entries)
    assert latest_state(tmp_path) == (tmp_path / 'training-state-16.pt', [])
    (tmp_path / 'training-state-16.pt').unlink()
    (tmp_path / 'training-state-12.pt').write_bytes(b'stat')
    (tmp_path / 'training-state-8.pt').write_bytes(b'state 9')
    path, notes = latest_state(tmp_path)
    assert path == tmp_path / 'training-state-4.pt'
    assert ['16.pt: cannot be read' in notes[0], '12.pt: 4 bytes instead of 8' in notes[1],
            '8.pt: its checksum' in notes[2]] == [True] * 3


def test_files_that_are_not_listed_do_not_count(tmp_path):
    manifest.write_manifest(tmp_path, (snapshot(tmp_path, 4),))
    snapshot(tmp_path, 8)
    assert latest_state(tmp_path)[0].name == 'training-state-4.pt'


def test_snapshots_without_a_state_are_passed_over(tmp_path):
    manifest.write_manifest(tmp_path, (snapshot(tmp_path, 4), snapshot(tmp_path, 8, [NETWORKS])))
    assert latest_state(tmp_path)[0].name == 'training-state-4.pt'


def test_no_listed_state_is_ever_overwritten(tmp_path):
    entries = ()
    for nimg in (3000, 3064, 3999, 4000):
        name = manifest.state_name(entries, nimg)
        assert name not in {e.files[STATE].name for e in entries}
        assert manifest.state_name(entries, nimg) == name
        files = {STATE: manifest.FileEntry(name, 1, '')}
        entries = manifest.with_snapshot(entries, SnapshotEntry(nimg, files))
    assert [e.files[STATE].name for e in entries] == [
        'training-state-000003.pt', 'training-state-000003-064.pt', 'training-state-000003-999.pt',
        'training-state-000004.pt']
    # The same images again are the same state.
    assert manifest.state_name(entries, 3000) == 'training-state-000003.pt'


def test_a_file_that_is_written_anew_leaves_the_older_snapshot(tmp_path):
    first = snapshot(tmp_path, 4)
    second = SnapshotEntry(8, {NETWORKS: first.files[NETWORKS]})
    entries = manifest.with_snapshot((first,), second)
    assert entries == (first.without([NETWORKS]), second)
    assert manifest.forget_files(entries, {first.files[NETWORKS].name}) == (first.without([NETWORKS]),)


def test_without_a_limit_all_networks_stay_and_two_states(tmp_path):
    entries = tuple(snapshot(tmp_path, nimg, [STATE, NETWORKS, FAKES]) for nimg in (4, 8, 12, 16))
    kept, gone = manifest.prune(entries)
    assert gone == ['training-state-4.pt', 'training-state-8.pt']
    assert [list(e.files) for e in kept] == [[NETWORKS, FAKES]] * 2 + [[STATE, NETWORKS, FAKES]] * 2


@pytest.mark.parametrize(('metric', 'best'), [
    ('fid50k_full', 8), ('is50k', 4), ('pr50k3_full', 12), ('swd', None), (None, None)])
def test_a_limit_keeps_the_last_and_the_best(tmp_path, metric, best):
    results = [{'fid50k_full': 9.0, 'is50k_mean': 7.0, 'pr50k3_full_precision': 0.1},
               {'fid50k_full': 2.0, 'is50k_mean': 6.0, 'pr50k3_full_precision': 0.2},
               {'fid50k_full': 3.0, 'is50k_mean': 1.0, 'pr50k3_full_precision': 0.5}, {},
               {'fid50k_full': 5.0}]
    entries = tuple(snapshot(tmp_path, 4 * (i + 1), **row) for i, row in enumerate(results))
    kept, gone = manifest.prune(entries, 1, metric)
    assert [e.nimg for e in kept if NETWORKS in e.files] == sorted({20} | ({best} if best else set()))
    # The state before the last one is there for the day when that is damaged.
    assert [e.nimg for e in kept if STATE in e.files] == sorted({16, 20} | ({best} if best else set()))
    assert gone == sorted(gone, key=lambda name: not name.endswith('.pt')) and len(set(gone)) == len(gone)
    assert not {f.name for e in kept for f in e.files.values()} & set(gone)


def test_states_saved_in_between_go_when_two_newer_ones_are_there(tmp_path):
    entries = (snapshot(tmp_path, 4, [STATE]), snapshot(tmp_path, 8), snapshot(tmp_path, 12))
    kept, gone = manifest.prune(entries)
    assert [e.nimg for e in kept] == [8, 12] and gone == ['training-state-4.pt']


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path):
    entries = tuple(snapshot(tmp_path, nimg, swd=value) for nimg, value in ((4, float('nan')), (8, 3.0)))
    assert manifest.best_snapshot(entries, 'swd').nimg == 8


def test_only_leftovers_are_removed(tmp_path):
    kept = [tmp_path / name for name in ('a.pt', '.hidden', '.tmp', 'network-snapshot-000000.pkl')]
    left = [tmp_path / f'.{"0123456789abcdef" * 2}.tmp{suffix}' for suffix in ('', '.pt', '.json')]
    for path in kept + left:
        path.write_bytes(b'')
    assert manifest.remove_leftovers(tmp_path) == sorted(p.name for p in left)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
