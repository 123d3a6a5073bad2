# SPDX-License-Identifier: Apache-2.0
"""dnnlib.progress: bars in terminals, lines elsewhere, and never a bar in a log file."""
import io
import sys

import pytest

from dnnlib import progress as module
from dnnlib.progress import progress
from dnnlib.util import Logger


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch):
    # Within a test, not in a fixture: pytest replaces the streams in between.
    stream = Terminal()
    monkeypatch.setattr(sys, 'stderr', stream)
    return stream


@pytest.fixture
def clock(monkeypatch):
    """Time stands still unless a test moves clock[0]."""
    now = [100.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    return now


def test_elsewhere_a_line_comes_at_intervals_and_at_the_end(clock, capsys):
    with progress(total=100, desc='Reading', unit='img') as bar:
        for _ in range(50):
            clock[0] += 0.5
            bar.update(2)
    assert capsys.readouterr().err.splitlines() == [
        'Reading: 40/100 img (40%), 4.0 img/s, 00:10 elapsed, ETA 00:15',
        'Reading: 80/100 img (80%), 4.0 img/s, 00:20 elapsed, ETA 00:05',
        'Reading: 100/100 img (100%), 4.0 img/s, 00:25 elapsed']


def test_a_batch_that_is_larger_than_the_rest_ends_at_the_total(capsys):
    with progress(total=20, unit='img') as bar:
        for _ in range(3):
            bar.update(8)
    assert bar.n == 20 and capsys.readouterr().err.startswith('20/20 img (100%)')
    bar.restart()
    assert bar.n == 0


def test_an_iterable_is_passed_through_and_counted(capsys):
    assert list(progress([3, 1, 2], desc='Work')) == [3, 1, 2]
    assert capsys.readouterr().err.startswith('Work: 3/3 it (100%)')


def test_generators_and_empty_work_have_no_percentage(capsys):
    assert list(progress(x for x in 'ab')) == ['a', 'b']
    assert list(progress([])) == []
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith('2 it,') and lines[1].startswith('0 it,')


def test_what_was_done_before_does_not_count_for_the_rate(clock):
    bar = progress(total=200, initial=100)
    clock[0] += 10
    bar.update(50)
    assert bar.line() == '150/200 it (75%), 5.0 it/s, 00:10 elapsed, ETA 00:10'
    bar.set_postfix_str('p 0.1')
    assert bar.line().endswith(', p 0.1')
    bar.close()


def test_looping_over_a_counter_is_refused():
    with pytest.raises(TypeError, match='total'):
        next(iter(progress(total=3)))


def test_closing_twice_reports_once(capsys):
    bar = progress(total=1)
    bar.close()
    bar.close()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_shows_a_bar_with_count_and_name(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with progress(total=4, desc='Reading', unit='img') as bar:
        bar.update(4)
        bar.set_postfix_str('p 0.1')
    assert 'Reading' in terminal.getvalue() and '4/4' in terminal.getvalue() and '\r' in terminal.getvalue()
    assert not module._active


def test_lines_are_written_above_the_bar(monkeypatch, capsys):
    terminal = use_terminal(monkeypatch)
    with progress(total=4, desc='Reading') as bar:
        shown = terminal.tell()
        bar.write('a line')
        # Cleared before, drawn again after.
        assert terminal.getvalue()[shown:].count('Reading') == 1
    assert capsys.readouterr().out == 'a line\n'


def test_bars_go_to_the_terminal_but_not_into_log_files(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with Logger(tmp_path / 'outer.txt'), Logger(tmp_path / 'inner.txt'):
        with progress(total=2, desc='Reading') as bar:
            bar.update(2)
            bar.write('a line')
        print('err', file=sys.stderr)
    assert 'Reading' in terminal.getvalue()
    for name in ('outer.txt', 'inner.txt'):
        assert (tmp_path / name).read_text() == 'a line\nerr\n'


def test_without_stderr_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', None)
    assert list(progress([1])) == [1]


def test_an_exception_inside_closes_the_bar(monkeypatch):
    use_terminal(monkeypatch)
    with pytest.raises(KeyError), progress(total=4):
        raise KeyError
    assert not module._active
