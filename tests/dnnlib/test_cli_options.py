# SPDX-License-Identifier: Apache-2.0
"""Options that scripts share: lists of numbers."""

import click
import pytest

from dnnlib import cli_options


@pytest.mark.parametrize('text, numbers', [
    ('7', [7]), ('0-3', [0, 1, 2, 3]), ('5-2', []), ('3,1,3', [3, 1, 3]), (' 1 , 2 ', [1, 2]), ('4-4', [4]),
    ('4294967295', [4294967295]), ('1,3-5', [1, 3, 4, 5]), ('0-1, 7', [0, 1, 7]), ('0' * 99 + '1', [1])])
def test_ranges_and_lists_are_read(text, numbers):
    assert list(cli_options.NumberList().convert(text, None, None)) == numbers


def test_a_long_range_takes_no_memory():
    assert len(cli_options.NumberList().convert('0-4294967295', None, None)) == 2 ** 32


@pytest.mark.parametrize('text', ['', 'x', '1,x', '3,1-', '-1', '1 2', '0:4', '1-', '1--2', '1.5', '1,',
                                  '0x10', '\u0661'])
def test_anything_else_is_a_usage_error(text):
    with pytest.raises(click.BadParameter, match='neither a range'):
        cli_options.NumberList().convert(text, None, None)


@pytest.mark.parametrize('text', ['8', '0-8', '9-1', '1,8', '1,2-8', '9' * 5000])
def test_numbers_beyond_the_limit_are_a_usage_error(text):
    with pytest.raises(click.BadParameter, match='from 0 to 7'):
        cli_options.NumberList(maximum=7).convert(text, None, None)
