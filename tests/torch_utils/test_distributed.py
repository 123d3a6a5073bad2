# SPDX-License-Identifier: Apache-2.0
"""Processes: how they start, what they share, and how a run ends when one of them fails."""
import os
import signal
import subprocess
import time
from multiprocessing import resource_tracker

import pytest
import torch

from dnnlib.util import UserError
from torch_utils import distributed
from torch_utils.processes.consistency import check_agreement

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')


def share(folder):
    device = distributed.join('cpu')
    a, b = torch.tensor([[1.0 + distributed.rank()]]), torch.tensor([4.0, 6.0]) * distributed.rank()
    distributed.average([a, b])
    found = {'rank': distributed.rank(), 'size': distributed.world_size(), 'a': a, 'b': b,
             'local_size': distributed.local_world_size(), 'threads': torch.get_num_threads(),
             'value': distributed.broadcast_value({'from': distributed.rank()})}
    torch.save(found, f'{folder}/{distributed.rank()}.pt')
    distributed.leave()
    assert device.type == 'cpu' and distributed.world_size() == 1


def fail(how):
    distributed.join('cpu')
    if distributed.rank() == 0:
        # Waits for the other, as in the middle of a reduction.
        distributed.average([torch.zeros(1)])
    if how == 'user error':
        raise UserError('--option=1: is wrong; use 2')
    if how == 'bug':
        raise KeyError('lost')
    if how == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(75)


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import PyTorch; those of the other tests start as they do for users."""
    monkeypatch.setattr(distributed, 'START_METHOD', 'fork')


@pytest.fixture
def heeds_ctrl_c():
    """What runs in the background of a shell is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@needs_processes
def test_processes_of_a_launch_share_means_and_values(tmp_path, heeds_ctrl_c):
    threads = torch.get_num_threads()
    distributed.launch(share, (str(tmp_path),), 2)
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pt')
        assert (found['rank'], found['size'], found['local_size']) == (rank, 2, 2)
        assert found['a'].tolist() == [[1.5]] and found['b'].tolist() == [2.0, 3.0]
        assert found['value'] == {'from': 0} and found['threads'] >= 1
    assert torch.get_num_threads() == threads and not torch.distributed.is_initialized()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, 'not that of the launcher any more'


@needs_processes
def test_a_user_error_of_a_process_is_the_error_of_the_launch(tmp_path):
    with pytest.raises(UserError, match=r'^--option=1: is wrong; use 2$'):
        distributed.launch(fail, ('user error',), 2)


@needs_processes
@pytest.mark.parametrize('how, status, words', [
    ('bug', 1, ['Process 1', "KeyError: 'lost'"]), ('killed', 1, ['Error: process 1 was killed by SIGKILL']),
    ('status', 75, []),
])
def test_a_failing_process_ends_the_launch_and_says_why(how, status, words, capfd, forked):
    with pytest.raises(SystemExit) as caught:
        distributed.launch(fail, (how,), 2)
    assert caught.value.code == status
    shown = capfd.readouterr().err
    assert all(word in shown for word in words) and (words or 'rocess' not in shown)


@pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='not a POSIX system')
def test_ctrl_c_is_heard_by_the_launcher_and_not_by_processes_that_start(heeds_ctrl_c):
    with pytest.raises(KeyboardInterrupt), distributed._interrupts_held_back():
        resource_tracker.ensure_running()  # as the start of a process does
        assert subprocess.run(['sh', '-c', 'kill -INT $$; exit 7'], check=False).returncode == 7
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(500):  # as the launcher does, whose thread here is not the one that is woken
            time.sleep(0.02)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_without_a_group_everything_is_local():
    x = torch.ones(2)
    distributed.average([x])
    distributed.leave()
    assert x.tolist() == [1, 1] and distributed.broadcast_value('v') == 'v'
    assert distributed.local_world_size() == 1


def hang():
    group = distributed.Group(torch.device('cpu'), 2, timeout_sec=2, advice='; try again')
    with group:
        distributed.note_phase('sum')
        distributed.average([torch.zeros(1)])
        if distributed.rank() == 1:
            distributed.note_phase('data')
            time.sleep(600)
        distributed.average([torch.zeros(1)])


@needs_processes
def test_a_process_that_hangs_ends_the_launch_in_time_with_its_name_and_phase(capfd, forked):
    start = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        distributed.launch(hang, (), 2)
    assert caught.value.code == 1 and time.monotonic() - start < 60
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('Error')]
    assert lines == ['Error: process 1 has stalled the others for 2 seconds in the phase data; '
                     'all processes stop; try again']


def agree():
    with distributed.Group(torch.device('cpu'), 3) as group:
        answers = [distributed.start_max(int(distributed.rank() == 2)), distributed.start_max(0)]
        values = distributed.gather_values(distributed.rank() * 2)
        assert [answer() for answer in answers] == [1, 0] and values == [0, 2, 4]
        assert group.device == torch.device('cpu')
        check_agreement({'w': torch.ones(3)})
        odd = {'w': torch.full([3], float(distributed.rank() == 2)), 'n': distributed.rank()}
        check_agreement(odd)


@needs_processes
def test_three_processes_find_out_which_of_them_is_different(forked):
    with pytest.raises(UserError, match='w differs on process 2'):
        distributed.launch(agree, (), 3)
