# SPDX-License-Identifier: Apache-2.0
"""Values that are written in a way of their own: durations as schedulers write them, lists of names."""
import pytest

from dnnlib.util import UserError
from training.config.values import parse_duration, parse_formats


@pytest.mark.parametrize(('text', 'seconds'), [
    ('45s', 45), ('90m', 5400), ('3h', 10800), ('1.5d', 129600), ('1d12h', 129600), ('1h30m15s', 5415),
    ('02:30:00', 9000), ('2-00:00:00', 172800), ('0-00:00:01', 1), ('100:00:00', 360000), (' 3h ', 10800)])
def test_a_duration_is_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize('text', [
    '', '3', '0h', 'h', '-3h', '3 h', '3x', '00:00:00', '1:2', '01:61:00', '1d-2', 'inf', '1e3s', '3h30'])
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(UserError, match=r'^--time-limit=.* must be a duration such as 90m'):
        parse_duration(text)


@pytest.mark.parametrize('text, expected', [('pkl', ('pkl',)), ('safetensors,pkl', ('safetensors', 'pkl'))])
def test_formats_of_snapshots_are_a_list(text, expected):
    assert parse_formats(text) == expected


@pytest.mark.parametrize('text', ['', 'onnx', 'pkl,', 'pkl,zip'])
def test_other_formats_of_snapshots_are_refused(text):
    with pytest.raises(UserError, match=r'--snapshot-format=.*pkl,safetensors'):
        parse_formats(text)
