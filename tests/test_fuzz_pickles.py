# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files by the hundred, and that the watch over them would see what it should."""
import io
import os
import pickle

import pytest
from tensorflow_files import tensorflow_pickle

import legacy
from dnnlib.util import UserError
from scripts import fuzz_pickles, hostile_files


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def test_five_hundred_damaged_files_load_or_are_refused(empty_folder):
    files = [*fuzz_pickles.small_files(), tensorflow_pickle()]
    outcomes = fuzz_pickles.fuzz(files, 500, seed=0).outcomes
    # Afterwards, because torch imports some of its parts on first use.
    assert {fuzz_pickles.outcome(data) for data in files} == {'loaded'}
    assert sum(outcomes.values()) == 500 and min(outcomes['loaded'], outcomes['refused']) > 20, outcomes


def test_three_hundred_hostile_files_are_opened_at_little_cost(empty_folder):
    report = fuzz_pickles.attack(fuzz_pickles.small_files(), 300, seed=0)
    assert report.outcomes['refused'] > 200 and sum(report.outcomes.values()) == 300
    assert report.longest_sec < fuzz_pickles.MAX_SECONDS and report.growth_bytes < 512 << 20


def test_hostile_files_come_from_a_seed_and_are_of_all_kinds():
    def some(seed):
        generator = hostile_files.random.Random(seed)
        return [kind(generator) for kind in hostile_files.KINDS]
    assert some(1) == some(1) != some(2)
    template = b'\x80\x02' + hostile_files.code(hostile_files._network_template()) + b'.'
    # Unchanged, they would load: each is refused for its oddity alone.
    assert legacy.load_network_pkl(io.BytesIO(template)).G_ema.img_resolution == 8


def test_the_same_seed_damages_in_the_same_way():
    data = bytes(range(256)) * 4

    def some(seed):
        generator = fuzz_pickles.random.Random(seed)
        return [fuzz_pickles.mutated(data, generator) for _ in range(30)]
    assert some(1) == some(1) != some(2) and data not in some(1)


@pytest.mark.parametrize('change', fuzz_pickles.MUTATIONS)
def test_each_kind_of_damage_changes_any_file(change):
    for data in (b'x', b'a longer file' * 20):
        damaged = bytearray(data)
        generator = fuzz_pickles.random.Random(3)
        for _ in range(5):
            if damaged:
                change(damaged, generator)
        assert bytes(damaged) != data


class Hostile:
    def __reduce__(self):
        return os.listdir, ('.',)


def test_code_that_runs_is_noticed(monkeypatch):
    monkeypatch.setattr(legacy, 'load_network_pkl', pickle.load)
    with pytest.raises(AssertionError, match='something ran'):
        fuzz_pickles.outcome(pickle.dumps(Hostile()))
    with pytest.raises(fuzz_pickles.Failure) as failure:
        fuzz_pickles.fuzz([pickle.dumps(Hostile())], 50, seed=0)
    assert failure.value.data and 'file ' in str(failure.value)


def test_errors_that_are_not_clean_and_files_that_take_long_are_noticed(monkeypatch):
    def fail(file):
        raise UserError('two\nlines')
    monkeypatch.setattr(legacy, 'load_network_pkl', fail)
    with pytest.raises(AssertionError, match='several lines'):
        fuzz_pickles.outcome(b'')
    monkeypatch.setattr(fuzz_pickles, 'MAX_SECONDS', -1)
    monkeypatch.setattr(legacy, 'load_network_pkl', lambda file: None)
    with pytest.raises(AssertionError, match='it took'):
        fuzz_pickles.outcome(b'')


def test_a_process_that_grows_is_noticed(monkeypatch):
    sizes = iter([0, 2 << 30, 2 << 30])
    monkeypatch.setattr(fuzz_pickles, '_memory_bytes', lambda: next(sizes))
    with pytest.raises(fuzz_pickles.Failure, match='grew'):
        fuzz_pickles.fuzz([b'x'], 0, seed=0)


def test_the_script_says_what_it_found_and_keeps_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pkl').write_bytes(fuzz_pickles.small_files()[0])
    monkeypatch.setattr(fuzz_pickles.tempfile, 'mkdtemp', lambda: str(folder))
    folder = tmp_path / 'new'
    folder.mkdir()
    fuzz_pickles.main(['--count=5', '--made=3', '--seed=1', 'a.pkl'])
    out = capsys.readouterr().out
    assert '5 damaged files: ' in out and '3 hostile files: ' in out and '0 executed' in out
    assert not folder.exists()
    monkeypatch.chdir(tmp_path)
    folder.mkdir()
    monkeypatch.setattr(fuzz_pickles, 'outcome', lambda data: 1 / 0)
    with pytest.raises(SystemExit, match=r'ZeroDivisionError[^$]*failure\.bin'):
        fuzz_pickles.main(['--count=5', 'a.pkl'])
    assert (folder / 'failure.bin').stat().st_size > 0
