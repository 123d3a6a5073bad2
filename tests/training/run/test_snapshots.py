# SPDX-License-Identifier: Apache-2.0
"""Snapshots in the background: whole, listed, or not there at all, whatever happens in between."""
import os
import pickle
import random
import resource
import signal
import sys
import threading
import time

import pytest
import torch
from small_networks import small_generator

from training.formats.pickled import HostCopies, copy_networks
from training.run import snapshots
from training.run.manifest import STATE, read_manifest, remove_leftovers
from training.run.resume import find_state
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload, read_state

KILLS = 50


def snapshot(nimg, *, networks=True, size=10, name='network-snapshot-000000.pkl'):
    """A snapshot whose every part tells at how many images it was taken."""
    copies = HostCopies()
    held = None
    if networks:
        G_ema = small_generator(z_dim=4, w_dim=4)
        torch.nn.init.constant_(G_ema.mapping.fc0.bias, nimg)
        held = copy_networks(copies, {'G_ema': G_ema})
    run = {'cur_nimg': nimg, 'w': torch.full([size], float(nimg))}
    payload = make_payload({}, run, {'tick': 1}, {})
    return Snapshot(nimg, copies.tree(payload), copies, held, name)


def write(writer, *args, **kwargs):
    writer.save(snapshot(*args, **kwargs))
    writer.wait()
    assert writer.take_problems() == []


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def assert_sound(folder):
    """What the manifest lists is there and whole; the images at the latest snapshot."""
    for entry in read_manifest(folder):
        for file in entry.files.values():
            assert file.problem(folder) is None
        if STATE in entry.files:
            state = read_state(folder / entry.files[STATE].name)
            assert state['run']['cur_nimg'] == entry.nimg and (state['run']['w'] == entry.nimg).all()
        if 'networks' in entry.files:
            held = pickle.loads((folder / entry.files['networks'].name).read_bytes())
            assert (held['G_ema'].mapping.fc0.bias == entry.nimg).all()
    state, notes = find_state(str(folder), None)
    assert notes == []
    return read_state(state.state_path)['run']['cur_nimg']


def test_a_snapshot_is_its_files_and_a_line_in_the_list(tmp_path):
    write(SnapshotWriter(tmp_path), 4000, name='network-snapshot-000004.pkl')
    assert names(tmp_path) == ['network-snapshot-000004.pkl', 'snapshots.json', 'training-state-000004.pt']
    assert assert_sound(tmp_path) == 4000


def test_another_process_goes_on_with_the_list(tmp_path):
    for nimg in (4000, 8000, 12000):
        write(SnapshotWriter(tmp_path, entries=read_manifest(tmp_path)), nimg, networks=False)
    assert [e.nimg for e in read_manifest(tmp_path)] == [8000, 12000]


def test_networks_of_the_same_name_replace_each_other_and_states_never(tmp_path):
    writer = SnapshotWriter(tmp_path)
    for nimg in (4, 8, 12):
        write(writer, nimg)
        assert assert_sound(tmp_path) == nimg
    assert names(tmp_path) == ['network-snapshot-000000.pkl', 'snapshots.json',
                               'training-state-000000-008.pt', 'training-state-000000-012.pt']


def test_a_limit_deletes_what_is_older_and_keeps_the_best(tmp_path):
    writer = SnapshotWriter(tmp_path, keep=1, metric='swd')
    for nimg, swd in ((1000, 5.0), (2000, 1.0), (3000, 4.0), (4000, 3.0)):
        write(writer, nimg, name=f'network-snapshot-{nimg // 1000:06d}.pkl')
        writer.add_results(nimg, {'swd': swd})
    found = [name for name in names(tmp_path) if name.startswith('network')]
    assert found == ['network-snapshot-000002.pkl', 'network-snapshot-000004.pkl']
    assert [e.metrics for e in read_manifest(tmp_path)] == [{'swd': 1.0}, {'swd': 4.0}, {'swd': 3.0}]
    assert assert_sound(tmp_path) == 4000


def test_the_loop_goes_on_while_a_snapshot_is_written(tmp_path, monkeypatch):
    original, may_write = snapshots.write_state, threading.Event()

    def slow(*args):
        may_write.wait(60)
        original(*args)
    monkeypatch.setattr(snapshots, 'write_state', slow)
    writer = SnapshotWriter(tmp_path)
    writer.save(snapshot(1000, networks=False))
    writer.add_results(1000, {'swd': 1.0})
    assert not list(tmp_path.glob('training-state-*.pt'))
    second = threading.Thread(target=writer.save, args=(snapshot(2000, networks=False),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), 'two at a time would need the memory twice'
    may_write.set()
    second.join()
    writer.wait()
    assert assert_sound(tmp_path) == 2000 and read_manifest(tmp_path)[0].metrics == {'swd': 1.0}


def test_what_training_does_meanwhile_is_not_in_the_snapshot(tmp_path, monkeypatch):
    original = snapshots.write_state
    monkeypatch.setattr(snapshots, 'write_state', lambda *args: (time.sleep(0.1), original(*args)))
    weight, copies = torch.zeros(5, requires_grad=True), HostCopies()
    payload = make_payload({}, {'cur_nimg': 1, 'w': weight, 'again': [weight]}, {'tick': 0}, {})
    writer = SnapshotWriter(tmp_path)
    writer.save(Snapshot(1, copies.tree(payload), copies))
    with torch.no_grad():
        weight.fill_(1)
    writer.wait()
    run = read_state(find_state(str(tmp_path), None)[0].state_path)['run']
    assert not run['w'].any() and not run['w'].requires_grad and not run['again'][0].any()


def test_a_full_disk_costs_the_snapshot_and_leaves_nothing(tmp_path):
    writer = SnapshotWriter(tmp_path)
    write(writer, 1000)
    before = names(tmp_path)
    # A limit of the process stands for a disk without room; only files that grow beyond it are concerned.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        writer.save(snapshot(2000, size=1_000_000))
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    problems = writer.take_problems()
    assert len(problems) == 1 and '\n' not in problems[0] and writer.has_failed
    assert problems[0].startswith('Snapshot not saved, training continues: ')
    assert 'training-state-000002.pt: cannot be written (File too large)' in problems[0]
    assert names(tmp_path) == before and assert_sound(tmp_path) == 1000
    write(writer, 3000, size=1_000_000)
    assert not writer.has_failed and assert_sound(tmp_path) == 3000


def test_room_for_the_state_alone_is_not_a_snapshot_either(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(snapshots, 'write_snapshot', fail)
    writer = SnapshotWriter(tmp_path)
    writer.save(snapshot(1000))
    writer.wait()
    assert names(tmp_path) == [] and 'No space left' in writer.take_problems()[0]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    writer = SnapshotWriter(tmp_path / 'run')
    writer.save(snapshot(1000))
    writer.wait()
    assert len(writer.take_problems()) == 1 and writer.take_problems() == []


def _write_for_ever(folder):
    writer = SnapshotWriter(folder)
    nimg = find_start(folder)
    while True:
        nimg += 4
        writer.save(snapshot(nimg, size=20_000))
        writer.wait()


def find_start(folder):
    return max((e.nimg for e in read_manifest(folder)), default=0)


@pytest.mark.skipif(sys.platform == 'win32', reason='needs fork')
def test_killing_at_fifty_moments_never_leaves_a_broken_latest_snapshot(tmp_path):
    rng, reached = random.Random(0), []
    for _ in range(KILLS):
        start = find_start(tmp_path)
        pid = os.fork()
        if pid == 0:
            try:
                _write_for_ever(tmp_path)
            finally:
                os._exit(1)
        # From the first snapshot on, so that slow machines come as far.
        while find_start(tmp_path) < start + 4:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        reached.append(assert_sound(tmp_path))
    assert reached == sorted(set(reached))
    assert remove_leftovers(tmp_path), 'no kill came while a file was being written'
