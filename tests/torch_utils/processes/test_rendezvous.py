# SPDX-License-Identifier: Apache-2.0
"""How processes find each other in a store that earlier starts have used, and what is decided for all."""
import socket
import threading

import pytest
import torch

from dnnlib.util import UserError

if not torch.distributed.is_available():
    pytest.skip('torch without distributed', allow_module_level=True)

from torch_utils.processes import rendezvous
from torch_utils.processes.rendezvous import Rendezvous


def in_threads(*functions):
    """The results of functions that run at the same time."""
    results = [None] * len(functions)

    def run(index):
        results[index] = functions[index]()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def meeting_of(store, rank, size=2):
    return Rendezvous(rank, size, 'start', torch.distributed.PrefixStore('start', store), store)


@pytest.fixture
def store():
    return torch.distributed.HashStore()


def test_every_start_has_a_name_of_its_own_that_all_its_processes_know(store):
    guests = [lambda r=r: rendezvous._join(store, r) for r in (1, 2)]
    names = [in_threads(lambda: rendezvous._host(store, 3), *guests) for _ in range(3)]
    assert all(len(set(start)) == 1 for start in names) and len({start[0] for start in names}) == 3


def test_processes_that_do_not_come_are_named(store, monkeypatch):
    monkeypatch.setattr(rendezvous, 'WAIT_SEC', 0.1)
    # This one asked in an earlier start and is gone.
    store.set('asks/2', 'word')
    with pytest.raises(UserError, match=r'^processes 1, 2 of 3 have not come within 0.1 seconds'):
        rendezvous._host(store, 3)


def test_what_the_first_decides_holds_for_all(store):
    first, other = meeting_of(store, 0), meeting_of(store, 1)
    assert in_threads(lambda: first.from_first(lambda: {'run': 3}),
                      lambda: other.from_first(lambda: 1 / 0)) == [{'run': 3}] * 2


def test_an_error_of_the_first_lets_the_others_leave_in_silence(store, capsys):
    with pytest.raises(UserError, match='no'):
        meeting_of(store, 0).from_first(fail)
    with pytest.raises(SystemExit) as left:
        meeting_of(store, 1).from_first(fail)
    assert left.value.code == rendezvous.REFUSED and capsys.readouterr() == ('', '')


def fail():
    raise UserError('no')


def test_the_same_is_said_once(store):
    ranks = [meeting_of(store, rank) for rank in range(3)]
    assert [m.is_first_to_say('a') for m in ranks] == [True, False, False]
    assert meeting_of(store, 2).is_first_to_say('b')


def test_what_is_remembered_outlives_a_start_and_its_loss_is_an_error(store, monkeypatch):
    monkeypatch.delenv('TORCHELASTIC_RESTART_COUNT', raising=False)
    assert meeting_of(store, 0).recall() == {}
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    # The first start failed before it had anything to say.
    assert meeting_of(store, 0).recall() == {}
    meeting_of(store, 0).remember(run_dir='a', deadline=None)
    assert meeting_of(store, 0).recall() == {'run_dir': 'a', 'deadline': None}
    with pytest.raises(UserError, match=r'--max-restarts: .*--resume=latest'):
        meeting_of(torch.distributed.HashStore(), 0).recall()


def test_without_the_launcher_everyone_speaks(store, monkeypatch):
    def lose(*_):
        raise torch.distributed.DistNetworkError('connection reset')
    monkeypatch.setattr(torch.distributed.PrefixStore, 'compare_set', lose)
    assert meeting_of(store, 1).is_first_to_say('a')
    # Who has not met the others does not wait for them to say so.
    assert not rendezvous.meet.cache_info().currsize and rendezvous.is_first_to_say('a')


@pytest.mark.parametrize(('rank', 'words'), [('0', 'cannot listen there'), ('1', 'cannot reach it')])
def test_a_port_that_is_taken_or_silent_is_one_line(rank, words, monkeypatch):
    with socket.socket() as taken:
        taken.bind(('localhost', 0))
        if rank == '0':
            taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {'RANK': rank, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv('TORCHELASTIC_USE_AGENT_STORE', raising=False)
        with pytest.raises(UserError, match=rf'^MASTER_PORT={port} of .*process {rank} {words}') as raised:
            rendezvous.open_store(timeout_sec=1)
        assert '\n' not in str(raised.value)
