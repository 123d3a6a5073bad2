# SPDX-License-Identifier: Apache-2.0
"""dataset_tool --check: reports on a dataset, says whether it can be trained on, writes nothing."""
import os

import pytest
from dataset_cases import encode, make_image, run_tool, write_folder


@pytest.fixture
def tool(capsys):
    """Runs the tool; gives the exit status and what it printed."""
    return lambda *args: run_tool(capsys, *args)


def test_check_accepts_a_good_dataset_and_writes_nothing(tmp_path, tool):
    files = {'a.png': encode(make_image(0)), 'b.png': encode(make_image(1)),
             'c.bmp': encode(make_image(1), 'bmp'),
             'dataset.json': {'labels': [['a.png', 0], ['b.png', 2], ['c.bmp', 2], ['d.png', 1]]}}
    status, output = tool(write_folder(tmp_path / 's', files), None, '--check')
    assert status == 0 and os.listdir(tmp_path) == ['s']
    for text in ['3 images', '8x8 RGB', '3 classes', '0: 1, 1: 0, 2: 2', 'class 1 has no image',
                 '1 exact duplicates: b.png = c.bmp', '1 labels have no image: d.png', 'OK']:
        assert text in output
    assert 'Not used' not in output


def test_check_counts_the_label_table_as_used(tmp_path, tool):
    files = {'a.png': encode(make_image(0)), 'dataset.json': {'labels': None}}
    status, output = tool(write_folder(tmp_path / 's', files), None, '--check', '--strict')
    assert status == 0 and 'no labels' in output and 'Not used' not in output


@pytest.mark.parametrize(('files', 'message'), [
    ({'a.png': b'junk', 'b.png': encode(make_image())}, 'a.png cannot be decoded'),
    ({'a.png': encode(make_image()), 'b.png': encode(make_image(0, 4, 8)), 'c.png': encode(make_image(1))},
     'differ: b.png'),
    ({'a.png': encode(make_image()), 'dataset.json': {'labels': []}}, 'no label, the first is a.png'),
    ({'a.png': encode(make_image()), 'dataset.json': {'labels': [['a.png', -1]]}}, 'label of a.png is -1'),
    ({'a.png': encode(make_image(0, 9, 9))}, 'one power of two'),
    ({'a.png': encode(make_image(0, 34, 34))}, 'images of 34x34'),
    ({'a.png': encode(make_image(0, 4, 4))}, 'at least 2'),
    ({'a.txt': b''}, 'no images'),
])
def test_check_refuses_what_cannot_be_trained(tmp_path, tool, files, message):
    status, output = tool(write_folder(tmp_path / 's', files), None, '--check')
    assert status == 2 and message in output and 'OK' not in output


def test_check_notes_shapes_that_others_cannot_use(tmp_path, tool):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image(0, 8, 12))})
    status, output = tool(source, None, '--check')
    assert status == 0 and 'not a square power of two' in output
