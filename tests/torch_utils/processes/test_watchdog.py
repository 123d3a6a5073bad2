# SPDX-License-Identifier: Apache-2.0
"""Who is found to hang, and who only works hard."""
import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip('torch without distributed', allow_module_level=True)

from torch_utils.processes.watchdog import Heartbeat, StallDetector


def judge(*moments, timeout_sec=10.0):
    """The verdict after each moment: (time, (beat, entered), ... by rank)."""
    judge = StallDetector(timeout_sec)
    return [judge.verdict({rank: Heartbeat(*pair, f'phase{rank}') for rank, pair in enumerate(pairs)}, now)
            for now, *pairs in moments]


def test_who_is_waited_for_is_named_with_its_phase_after_the_timeout():
    verdicts = judge((0, (1, 5), (1, 4)), (9, (2, 5), (2, 4)), (11, (3, 5), (3, 4)))
    assert verdicts == [
        None, None, 'process 1 has been in the phase phase1 for 10 seconds while others wait for it']


def test_the_time_before_anyone_waited_does_not_count():
    # Both computed for 100 seconds; then one was ready, a moment before the other.
    assert judge((0, (1, 4), (1, 4)), (100, (2, 4), (2, 4)), (101, (3, 5), (3, 4)), (110, (4, 5), (4, 4)),
                 (112, (5, 5), (5, 5)), (200, (6, 5), (6, 5))) == [None] * 6


def test_who_moves_is_late_but_does_not_hang():
    assert judge(*[(8 * i, (i, 50), (i, i)) for i in range(9)]) == [None] * 9


def test_who_does_not_answer_is_named():
    verdicts = judge((0, (1, 4), (1, 4)), (6, (2, 4), (1, 4)), (11, (3, 4), (1, 4)))
    assert verdicts[:2] == [None] * 2
    assert verdicts[2] == 'process 1 has not answered for 10 seconds; its last phase was phase1'


def test_the_first_process_may_be_the_one():
    assert judge((0, (1, 4), (1, 5)), (11, (2, 4), (2, 5)))[1].startswith('process 0 has been in')


def test_reports_pass_through_the_store():
    report = Heartbeat(3, 7, 'sample sheet')
    assert Heartbeat.decode(report.encode().encode()) == report
