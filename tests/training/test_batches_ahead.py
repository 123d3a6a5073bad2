# SPDX-License-Identifier: Apache-2.0
"""Batches that are taken early tell early that there are no more."""
import pytest

from dnnlib.util import UserError
from training.batches import AHEAD, Lookahead


def batches(count):
    yield from range(count)
    raise UserError('--data: is gone')


@pytest.mark.parametrize('ahead', [0, AHEAD])
def test_no_batch_is_lost_and_then_the_error_comes(ahead):
    lookahead = Lookahead(batches(5), ahead)
    assert [lookahead.take() for _ in range(5)] == list(range(5))
    for _ in range(2):
        with pytest.raises(UserError, match='is gone'):
            lookahead.take()


@pytest.mark.parametrize('ahead', [0, 1, 2])
def test_the_end_is_known_so_many_batches_before_it_matters(ahead):
    lookahead = Lookahead(batches(5), ahead)
    known = []
    for _ in range(5):
        lookahead.take()
        known.append(lookahead.error is not None)
    assert known == [False] * (5 - ahead) + [True] * ahead
