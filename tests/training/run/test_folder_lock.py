# SPDX-License-Identifier: Apache-2.0
"""One program at a time trains in a folder, and a dead one does not count."""
import errno
import os
import signal
import time

import pytest

from dnnlib.util import UserError
from training.run import folder as run_lock
from training.run.folder import LOCK_FILE, RunLock

pytestmark = pytest.mark.skipif(run_lock.fcntl is None, reason='a system without locks')


@pytest.fixture
def holder(tmp_path):
    """The number of another process, which holds the lock of tmp_path."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(tmp_path):
            os.write(write, b'1')
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_another_process_is_named(holder, tmp_path):
    with pytest.raises(UserError, match=rf'^{tmp_path}: process {holder} on .* is training in'), \
            RunLock(tmp_path, wait_sec=0.2):
        pass


def test_a_process_that_ends_meanwhile_is_waited_for(tmp_path):
    pid = os.fork()
    if pid == 0:
        with RunLock(tmp_path):
            time.sleep(0.4)
        os._exit(0)
    while not (tmp_path / LOCK_FILE).is_file() or not (tmp_path / LOCK_FILE).read_text():
        time.sleep(0.01)
    start = time.monotonic()
    with RunLock(tmp_path, wait_sec=20) as lock:
        assert lock.note is None and time.monotonic() - start > 0.05
    os.waitpid(pid, 0)


def test_a_killed_process_leaves_nothing_behind_that_holds(tmp_path):
    pid = os.fork()
    if pid == 0:
        with RunLock(tmp_path):
            # A data worker may live longer than the run.
            if os.fork() == 0:
                time.sleep(2)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK_FILE).is_file()
    with RunLock(tmp_path, wait_sec=0) as lock:
        assert lock.note is None


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(run_lock.fcntl, 'lockf', refuse)
    with RunLock(tmp_path) as lock:
        assert 'No locks available' in lock.note and str(tmp_path) in lock.note
    monkeypatch.setattr(run_lock, 'fcntl', None)
    with RunLock(tmp_path) as lock:
        assert 'this system has no locks' in lock.note


def test_a_lock_file_of_bytes_is_no_obstacle(tmp_path):
    (tmp_path / LOCK_FILE).write_bytes(b'\xff\x00\x1b[2J')
    with RunLock(tmp_path, wait_sec=0) as lock:
        assert lock.note is None


def test_the_holder_is_named_without_escape_sequences(holder, tmp_path):
    (tmp_path / LOCK_FILE).write_bytes(b'\xff\x1b[2J')
    with pytest.raises(UserError) as caught, RunLock(tmp_path, wait_sec=0):
        pass
    assert str(caught.value).isprintable()
