# SPDX-License-Identifier: Apache-2.0
"""Label tables: what is accepted, and that every mistake names the file and the image."""
import json

import numpy as np
import pytest

from dnnlib.util import UserError
from training.datasets.labels import label_array, labels_from_csv, labels_from_folders, parse_label_json


def parse(labels):
    found = parse_label_json(json.dumps({'labels': labels}).encode(), 'dataset.json')
    return None if found is None else found.table


def test_classes_become_int64_in_image_order():
    labels = label_array(['a', 'b'], parse([['b', 0], ['a', 3], ['extra', 9]]), 'x')
    assert labels.dtype == np.int64 and labels.tolist() == [3, 0]


def test_vectors_become_float32():
    labels = label_array(['a', 'b'], parse([['a', [1, 0.5]], ['b', [-1, 2]]]), 'x')
    assert labels.dtype == np.float32 and labels.tolist() == [[1, 0.5], [-1, 2]]


def test_empty_vectors_are_no_labels():
    assert label_array(['a', 'b'], parse([['a', []], ['b', []]]), 'x').shape == (2, 0)


def test_null_means_no_labels():
    assert parse(None) is None


def test_backslashes_in_names_match():
    assert parse([['a\\b.png', 1], ['./c.png', 2]]) == {'a/b.png': 1, 'c.png': 2}


@pytest.mark.parametrize(('data', 'message'), [
    (b'{"labels": ', 'not valid JSON'), (b'\xff\xfe', 'not valid JSON'),
    (b'[' * 100_000, 'not valid JSON'), (b'{}', 'no key "labels"'),
    (b'[]', 'no key "labels"'), (b'{"labels": 5}', 'must be a list'), (b'{"labels": [["a"]]}', 'pair'),
    (b'{"labels": [[1, 2]]}', 'pair'), (b'{"labels": ["ab"]}', 'pair'),
])
def test_malformed_files_are_refused(data, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_label_json(data, 'my/dataset.json')
    assert str(caught.value).startswith('my/dataset.json') and '\n' not in str(caught.value)


@pytest.mark.parametrize(('labels', 'message'), [
    ([['a', 0]], '1 of 2 images have no label, the first is b'),
    ([['a', [1, 2]], ['b', [1]]], 'label of b is a vector of 1'),
    ([['a', 1], ['b', [1]]], 'label of b is a vector'),
    ([['a', 0], ['b', -1]], 'label of b is -1'),
    ([['a', 0], ['b', 0.5]], r'label of b is 0.5.*\[0.5\]'),
    ([['a', 0], ['b', 'cat']], 'label of b is "cat"'),
    ([['a', 0], ['b', None]], 'label of b is null'),
    ([['a', 0], ['b', True]], 'label of b is true'),
    ([['a', 0], ['b', 10 ** 9]], 'label of b is 1000000000; .* at most 1000000'),
    ([['a', 0], ['b', 10 ** 30]], 'at most 1000000'),
    ([['a', [0]], ['b', [[1]]]], 'label of b'),
    ([['a', [0]], ['b', [float('nan')]]], 'label of b'),
])
def test_labels_that_do_not_match_name_the_image(labels, message):
    with pytest.raises(UserError, match=message):
        label_array(['a', 'b'], parse(labels), 'dataset.json')


def test_first_folders_are_classes_in_sorted_order():
    labels = labels_from_folders(['dog/1.png', 'cat/x/2.png', 'dog/3.png'], 'src')
    assert labels.class_names == ('cat', 'dog')
    assert labels.table == {'dog/1.png': 1, 'cat/x/2.png': 0, 'dog/3.png': 1}


def test_an_image_outside_class_folders_is_named():
    with pytest.raises(UserError, match=r'loose\.png is in no class folder'):
        labels_from_folders(['dog/1.png', 'loose.png'], 'src')


@pytest.mark.parametrize(('text', 'table'), [
    ('a.png,1\nb.png,0\n', {'a.png': 1, 'b.png': 0}),
    ('file,class\na.png,1\n\nd\\b.png,2\n', {'a.png': 1, 'd/b.png': 2}),
    ('\ufeffname,x,y\na.png,1,2.5\nb.png,0,-1\n', {'a.png': [1, 2.5], 'b.png': [0, -1]}),
    ('a.png,1\nb.png,0.5\n', {'a.png': [1], 'b.png': [0.5]}),
    ('"with, comma.png",4\n', {'with, comma.png': 4}),
])
def test_csv_rows_give_classes_or_vectors(text, table):
    assert labels_from_csv(text.encode(), 'x').table == table


@pytest.mark.parametrize(('text', 'message'), [
    ('a.png,1\nb.png,cat\n', 'line 2'), ('a.png,1\nb.png\n', 'line 2'), ('a.png,nan\nb.png,nan\n', 'line 1'),
])
def test_csv_mistakes_name_the_line(text, message):
    with pytest.raises(UserError, match=message):
        labels_from_csv(text.encode(), 'x')
