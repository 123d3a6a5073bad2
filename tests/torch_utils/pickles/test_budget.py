# SPDX-License-Identifier: Apache-2.0
"""The budget of one file: whatever a small file repeats, it costs little memory and time."""
import resource
import sys
import time

import hostile_files
import pytest

from dnnlib.util import UserError
from torch_utils.pickles import budget
from torch_utils.pickles.budget import Budget, Damaged
from training.formats.load import load_bytes

MAX_GROWTH_BYTES, MAX_SECONDS = 1 << 30, 10
BOMBS = {
    'texts become bytes': hostile_files.repeated_states,
    'new dicts of one list': hostile_files.repeated_dicts,
    'called dicts of one list': lambda: hostile_files.repeated_dicts(opcode=b'R'),
    'storages of the same bytes': hostile_files.repeated_storages,
    'an array of many names': hostile_files.repeated_array,
    'overlapping members': hostile_files.overlapping_members}


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


@pytest.mark.parametrize('bomb', BOMBS)
def test_a_small_file_cannot_cost_much(bomb):
    data = BOMBS[bomb]()
    assert len(data) < 9 << 20
    before, start = peak_bytes(), time.thread_time()
    with pytest.raises(UserError, match=r'memory|operations|of which the file holds') as error:
        load_bytes(data, 'x')
    assert time.thread_time() - start < MAX_SECONDS and '\n' not in str(error.value)
    assert peak_bytes() - before < MAX_GROWTH_BYTES


def test_what_is_charged_grows_with_the_file_and_ends_at_free_memory(monkeypatch):
    small, large = Budget(0), Budget(10 << 20)
    assert large.bytes_left - small.bytes_left == budget.BYTES_PER_BYTE * (10 << 20)
    monkeypatch.setattr(budget, '_free_bytes', lambda: budget.BASE_BYTES + 5)
    assert Budget(1 << 40).bytes_left == budget.BASE_BYTES + 5
    small.charge(small.bytes_left)
    with pytest.raises(Damaged, match='memory'):
        small.charge(1)


def test_arguments_are_charged_with_their_items():
    def charged(*values):
        limits = Budget(0)
        before = limits.bytes_left
        limits.charge_values(values)
        return before - limits.bytes_left
    assert charged('abc', b'de', 7, None) == 5
    assert charged(('abc', b'de', [1, 2])) == 3 * budget.ELEMENT_BYTES + 5
    assert charged({1: 2}, {3}) == 2 * budget.ELEMENT_BYTES


def test_operations_and_seconds_end(monkeypatch):
    limits = Budget(0)
    limits.operations_left = 1
    limits.operate('x')
    with pytest.raises(Damaged, match='operations'):
        limits.operate()
    slow = Budget(0)
    monkeypatch.setattr(budget.time, 'thread_time', lambda: slow._deadline_sec + 1)
    with pytest.raises(Damaged, match='too long'):
        for _ in range(budget.OPERATIONS_PER_LOOK + 1):
            slow.operate()
