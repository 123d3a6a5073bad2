# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: by signal, by the clock, and what stays of them."""
import os
import signal
import time

import pytest

from training.run import interrupt
from training.run.interrupt import Interrupt


@pytest.mark.parametrize('number', interrupt.SIGNALS)
def test_a_signal_asks_and_does_not_stop(number):
    with Interrupt() as watch:
        assert not watch.should_stop() and watch.reason is None
        os.kill(os.getpid(), number)
        assert watch.should_stop() and watch.reason == signal.Signals(number).name


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with pytest.raises(KeyError), Interrupt():
        assert [signal.getsignal(number) for number in interrupt.SIGNALS] != before
        raise KeyError
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_the_first_request_is_answered_at_once_unless_the_terminal_is_gone(tmp_path, monkeypatch):
    path = tmp_path / 'stderr'
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    monkeypatch.setattr(interrupt, 'STDERR', descriptor)
    for _ in range(2):
        with Interrupt() as watch:
            os.kill(os.getpid(), signal.SIGTERM)
            assert watch.reason == 'SIGTERM'
        assert path.read_bytes() == interrupt.ASKED
        # The second time, writing fails.
        monkeypatch.setattr(interrupt, 'STDERR', -1)
    os.close(descriptor)


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='no terminals here')
def test_nohup_stays_in_force(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_same_request_twice_is_one():
    # A terminal and a launcher both pass on Ctrl-C.
    with Interrupt() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.reason == 'SIGINT'


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_request_stops_at_once(number, status, monkeypatch):
    monkeypatch.setattr(interrupt, 'SAME_REQUEST_SEC', 0.0)
    monkeypatch.setattr(interrupt, 'STDERR', os.open(os.devnull, os.O_WRONLY))
    pid = os.fork()
    if pid == 0:
        with Interrupt():
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 7), (signal.SIGTERM, 143)])
def test_forked_workers_leave_ctrl_c_to_the_run_and_can_be_terminated(number, status):
    with Interrupt() as watch:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), number)
            os._exit(7 if watch.reason is None else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        assert watch.reason is None


def test_the_clock_asks_when_its_time_has_come():
    watch = Interrupt(time_limit_sec=0.02)
    assert not watch.should_stop()
    time.sleep(0.03)
    assert watch.should_stop() and watch.reason == '--time-limit'
    assert Interrupt(time_limit_sec=10, start_sec=time.monotonic() - 11).should_stop()


def test_several_processes_stop_together_one_iteration_later(monkeypatch):
    monkeypatch.setattr(interrupt.distributed, 'world_size', lambda: 2)
    others = iter([0, 1, 0, 0, 0])

    def start_max(value):
        answer = max(value, next(others))
        return lambda: answer
    monkeypatch.setattr(interrupt.distributed, 'start_max', start_max)
    watch = Interrupt()
    assert [watch.should_stop() for _ in range(3)] == [False, False, True] and watch.reason is None
    assert [watch.should_stop(also) for also in (True, False)] == [False, True] and watch.reason is None
