# SPDX-License-Identifier: Apache-2.0
"""Labels are never lost: names that differ in form match, and what matches nothing is an error."""
import json
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_cases import encode, make_image, run_tool, write_folder, write_zip

from dnnlib.util import UserError
from training.capacity.dry_run import open_dataset
from training.config import TrainConfig, resolve
from training.dataset import ImageFolderDataset
from training.datasets.labels import (
    LabelError,
    class_names_of,
    labels_from_csv,
    labels_from_folders,
    match_labels,
    parse_label_json,
)

PNG = [encode(make_image(i)) for i in range(3)]
NFC, NFD = (unicodedata.normalize(form, 'caf\u00e9.png') for form in ('NFC', 'NFD'))


def folder(tmp_path, rows, names=('p0.png', 'p1.png', 'p2.png'), table='dataset.json', **more):
    files = {name: PNG[i] for i, name in enumerate(names)}
    return write_folder(tmp_path / 'source', files | {table: {'labels': rows, **more}})


def written_labels(path):
    data = json.loads(Path(path, 'dataset.json').read_text(encoding='utf-8'))
    return None if data['labels'] is None else [label for _, label in data['labels']], data.get('class_names')


@pytest.mark.parametrize(('names', 'rows'), [
    (['p0.png', 'p1.png'], ['P0.PNG', 'P1.png']), (['A/p0.png', 'b/p1.png'], ['a/p0.png', 'B/p1.png']),
    (['p0.png', 'p1.png'], ['/home/me/set/p0.png', 'C:\\data\\p1.png']), (['p0.png', 'p1.png'], ['p0', 'p1']),
    (['cat/0.png', 'dog/0.png'], ['/x/cat/0.jpg', '/x/dog/0.jpg']),
    (['pics/p0.png', 'pics/p1.png'], ['p0.png', 'p1.png']), ([NFD, 'b.png'], [NFC, 'b.png']),
    ([NFC, 'b.png'], [NFD, 'B.png']), (['a\u00e4.png', 'b.png'], ['A\u00c4.PNG', 'b']),
])
def test_names_that_differ_in_form_match(tmp_path, capsys, names, rows):
    source = folder(tmp_path, [[row, i] for i, row in enumerate(rows)], names)
    expected = [i for _, i in sorted(zip(names, range(2), strict=True))]
    dataset = ImageFolderDataset(source, use_labels=True)
    assert [int(dataset.get_details(i).raw_label) for i in range(2)] == expected
    assert run_tool(capsys, source, tmp_path / 'out')[0] == 0
    assert sorted(written_labels(tmp_path / 'out')[0]) == [0, 1]


@pytest.mark.parametrize('codec', ['cp932', 'gbk', 'utf-8', 'euc_kr', 'cp1252'])
def test_names_in_a_code_page_match(tmp_path, codec):
    name = {'cp932': '\u732b', 'gbk': '\u4e2d\u6587', 'utf-8': '\u732b\u00e9', 'euc_kr': '\uace0\uc591',
            'cp1252': 'caf\u00e9'}[codec] + '.png'
    raw = name.encode(codec)
    files = {'X' * len(raw): PNG[0], 'dataset.json': {'labels': [[name, 3]]}}
    path = write_zip(tmp_path / 'x.zip', files)
    data = Path(path).read_bytes().replace(b'X' * len(raw), raw)
    Path(path).write_bytes(data)
    dataset = ImageFolderDataset(path, use_labels=True)
    assert dataset.get_details(0).raw_label == 3


def test_bytes_of_no_encoding_on_the_disk_match(tmp_path):
    source = folder(tmp_path, [['caf\u00e9.png', 5]], ['caf\udce9.png'])
    assert ImageFolderDataset(source, use_labels=True).get_details(0).raw_label == 5


@pytest.mark.parametrize(('names', 'rows', 'message'), [
    (['p0.png', 'p1.png'], ['x.png', 'y.png'], 'none of 2 labels matches an image, the first is x.png'),
    (['p0.png', 'p1.png'], ['p0.png', 'y.png'], '1 of 2 labels match no image, the first is y.png; an image '
                                               'without label is p1.png'),
    (['a/0.png', 'b/0.png'], ['0.png', 'x'], 'none of 2 labels'),  # ambiguous
    (['p.png', 'p.jpg'], ['p', 'q'], 'none of 2 labels'),
])
def test_labels_that_match_nothing_are_an_error(tmp_path, capsys, names, rows, message):
    source = folder(tmp_path, [[row, 0] for row in rows], names)
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 2 and message in output and not (tmp_path / 'out').exists()
    with pytest.raises(LabelError):
        ImageFolderDataset(source, use_labels=True).get_label(0)
    assert run_tool(capsys, source, tmp_path / 'out', '--labels=none')[0] == 0
    assert 'cannot be used' in open_dataset(source, cond=False)[1]


def test_exact_names_come_first_and_further_rows_are_kept():
    table = {'a.png': 1, 'A.PNG': 2, 'gone.png': 3}
    assert match_labels(['a.png', 'A.PNG'], table, 'x') == table


def test_the_first_image_without_label_is_named(tmp_path, capsys):
    source = folder(tmp_path, [['p0.png', 0], ['p1.png', 1]])
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 0 and 'No labels written: 1 images have none, the first is p2.png' in output
    assert run_tool(capsys, source, tmp_path / 'strict', '--strict')[0] == 2


def test_a_table_one_folder_down_is_used_relative_to_it(tmp_path, capsys):
    files = {'pics/a.png': PNG[0], 'pics/b.png': PNG[1],
             'pics/dataset.json': {'labels': [['a.png', 1], ['b.png', 0]]}}
    for source in (write_folder(tmp_path / 'f', files), write_zip(tmp_path / 'z.zip', files)):
        dataset = ImageFolderDataset(source, use_labels=True)
        assert [int(dataset.get_details(i).raw_label) for i in range(2)] == [1, 0]
        status, output = run_tool(capsys, source, tmp_path / f'{Path(source).name}-out')
        assert status == 0 and 'Labels: pics/dataset.json, relative to its folder' in output


@pytest.mark.parametrize('table', ['Dataset.json', 'DATASET.JSON', 'sub/Dataset.json'])
def test_other_spellings_of_the_table_are_used(tmp_path, table):
    prefix = 'sub/' if '/' in table else ''
    source = folder(tmp_path, [['p0.png', 4]], [f'{prefix}p0.png'], table)
    assert ImageFolderDataset(source, use_labels=True).get_details(0).raw_label == 4


def test_several_tables_are_refused(tmp_path, capsys):
    table = {'labels': [['a.png', 0]]}
    files = {'x/a.png': PNG[0], 'x/dataset.json': table, 'y/dataset.json': table}
    source = write_folder(tmp_path / 's', files)
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 2 and '2 label tables, x/dataset.json, y/dataset.json' in output


def test_two_labels_for_one_file_are_an_error(tmp_path, capsys):
    source = folder(tmp_path, [['p0.png', 0], ['./p0.png', 1], ['p1.png', 0], ['p2.png', 0]])
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 2 and 'two labels for p0.png, 0 and 1' in output
    with pytest.raises(UserError, match='line 2: two labels for a'):
        labels_from_csv(b'a.png,0\na.png,1\n', 'x')


@pytest.mark.parametrize('data', [
    b'p0.png;0\np1.png;1\n', b'name;class\np0.png;0\np1.png;1\n', b'p0.png\t0\np1.png\t1\n',
    'name,class\np0.png,0\np1.png,1\n'.encode('utf-16'), 'p0.png\t0\r\np1.png\t1\r\n'.encode('utf-16'),
    b'sep=;\r\np0.png;0\r\np1.png;1\r\n', b'name|class\np0.png|0\np1.png|1\n',
    b'\xef\xbb\xbfname,class\r\np0.png, 0\r\np1.png, 1\r\n'])
def test_csv_of_any_separator_and_encoding_is_read(data):
    assert labels_from_csv(data, 'x').table == {'p0.png': 0, 'p1.png': 1}


def test_decimal_commas_stand_beside_other_separators():
    table = labels_from_csv(b'a.png;0,5;1\nb.png;2,25;3\n', 'x').table
    assert table == {'a.png': [0.5, 1], 'b.png': [2.25, 3]}


@pytest.mark.parametrize('data', [
    b'image,class\nb.png,dog\na.png,cat\n', b'b.png;dog\na.png;cat\n', b'id,kind\nb,dog\na,cat\n'])
def test_words_in_a_csv_are_class_names(data):
    labels = labels_from_csv(data, 'x')
    assert labels.class_names == ('cat', 'dog') and sorted(labels.table.values()) == [0, 1]


@pytest.mark.parametrize('data', [b'a.png,1\nb.png,cat\n', b'a.png,cat\nb.png,1\n', b'a.png,x,y\nb.png,x,z\n',
                                  'a.png,1\n'.encode('utf-16-le'), b'a.png,caf\xe9\n',
                                  b'a.png,' + b'9' * 400 + b'\n'])
def test_other_tables_are_refused(data):
    with pytest.raises(UserError, match=r'^--labels'):
        labels_from_csv(data, '--labels=x.csv')


def test_words_in_dataset_json_are_class_names_and_travel(tmp_path, capsys):
    source = folder(tmp_path, [['p0.png', 'dog'], ['p1.png', 'cat'], ['p2.png', 'dog']])
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 0 and 'Class 0 = cat' in output
    assert written_labels(tmp_path / 'out') == ([1, 0, 1], ['cat', 'dog'])
    for path in (source, str(tmp_path / 'out')):
        dataset = ImageFolderDataset(path, use_labels=True)
        assert dataset.class_names == ['cat', 'dog'] and dataset.label_dim == 2
    # A second conversion keeps them.
    assert run_tool(capsys, tmp_path / 'out', tmp_path / 'again')[0] == 0
    assert written_labels(tmp_path / 'again')[1] == ['cat', 'dog']


def test_class_names_reach_the_options_of_a_run(tmp_path):
    source = folder(tmp_path, [['p0.png', 'dog'], ['p1.png', 'cat'], ['p2.png', 'dog']])
    flags = {'outdir': 'x', 'data': source, 'cfg': 'demo', 'device': 'cpu'}
    for cond, names in ((True, ['cat', 'dog']), (False, None)):
        options = resolve(flags | {'cond': cond}, open_dataset(source, cond)[0]).to_options()
        assert class_names_of(options['training_set_kwargs']) == names
        assert TrainConfig.from_options(json.loads(json.dumps(options))).to_options() == options
        kwargs = {k: v for k, v in options['training_set_kwargs'].items() if k != 'class_name'}
        assert ImageFolderDataset(**kwargs).class_names == names


@pytest.mark.parametrize('options', [None, {}, {'class_names': 5}, {'class_names': [1]}, {'class_names': []}])
def test_options_without_class_names_give_none(options):
    assert class_names_of(options) is None


@pytest.mark.parametrize(('content', 'message'), [
    ({'class_names': 'cat'}, 'must be a list of words'), ({'class_names': ['cat']}, 'class 1 has no name'),
    ({'labels': [['a', 'cow']], 'class_names': ['cat']}, 'does not list')])
def test_class_names_must_fit(content, message):
    data = json.dumps({'labels': [['a', 0], ['b', 1]]} | content).encode()
    with pytest.raises(LabelError, match=message):
        parse_label_json(data, 'x')


def test_numbers_in_quotes_are_numbers():
    data = json.dumps({'labels': [['a', '10'], ['b', '2']]}).encode()
    labels = parse_label_json(data, 'x')
    assert labels.table == {'a': 10, 'b': 2} and labels.class_names is None


def test_class_folders_lie_below_a_single_folder():
    labels = labels_from_folders(['all/set/cat/1.png', 'all/set/dog/x/2.png'], 'src')
    assert labels.class_names == ('cat', 'dog') and list(labels.table.values()) == [0, 1]
    assert labels_from_folders(['cat/1.png', 'cat/2.png'], 'src').class_names == ('cat',)


def test_numbered_folders_are_their_number():
    names = [f'{i}/x.png' for i in range(12)]
    assert labels_from_folders(names, 'src').table == {name: i for i, name in enumerate(names)}


def test_backslashes_in_a_zip_are_folders(tmp_path, capsys):
    table = {'labels': [['cat/c.png', 0], ['dog/d.png', 1]]}
    files = {'cat/a.png': PNG[0], 'dog/b.png': PNG[1], 'dataset.json': table}
    path = Path(write_zip(tmp_path / 'x.zip', files))
    data = path.read_bytes()
    for slash, backslash in ((b'cat/a.png', b'cat\\c.png'), (b'dog/b.png', b'dog\\d.png')):
        data = data.replace(slash, backslash)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert 'cat\\c.png' in archive.namelist()
    dataset = ImageFolderDataset(str(path), use_labels=True)
    assert [int(dataset.get_details(i).raw_label) for i in range(2)] == [0, 1]
    np.testing.assert_array_equal(dataset[1][0], make_image(1).transpose(2, 0, 1))
    status, output = run_tool(capsys, path, tmp_path / 'out', '--labels=folders')
    assert status == 0 and 'Class 1 = dog' in output


@pytest.mark.parametrize('label', [10 ** 400, [10 ** 400], [1e39], [-1e39], 1e308, '9' * 500])
def test_numbers_beyond_all_bounds_are_refused(tmp_path, capsys, label):
    source = folder(tmp_path, [['p0.png', label]], ['p0.png'])
    status, output = run_tool(capsys, source, None, '--check')
    is_word = isinstance(label, str)
    assert (status == 0) == is_word and 'Traceback' not in output
    assert is_word or 'label of p0.png' in output
    assert open_dataset(source, cond=False)[0].num_images == 1


def test_nothing_but_brackets_is_no_table():
    with pytest.raises(UserError, match='brackets'):
        parse_label_json(b'{"labels":[' + b'[],' * 10_000 + b'[]]}', 'x')
