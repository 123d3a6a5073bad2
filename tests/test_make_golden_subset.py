# SPDX-License-Identifier: Apache-2.0
"""The small copy of the golden data: complete, consistent, and what the script makes."""
import json

import numpy as np
import pytest
from golden_cases import ROOT

from scripts.make_golden_subset import Choice, Subset, main, make_subset, needed_arrays, strings, without

COPY = ROOT / 'tests' / 'golden'
MAX_BYTES = 2_000_000


@pytest.fixture
def source(tmp_path):
    """A folder with one group of three cases; the first is the largest."""
    folder = tmp_path / 'full'
    folder.mkdir()
    cases = [{'name': f'c{i}', 'kind': 'a' if i < 2 else 'b', 'x': {'$tensor': f'c{i}/x'}} for i in range(3)]
    (folder / 'evil.json').write_text(json.dumps({'format': 1, 'note': 'n', 'cases': cases}))
    arrays = {f'c{i}/x': np.arange(30 - 10 * i) for i in range(3)}
    np.savez(folder / 'evil.npz', **arrays)
    return folder


def read(folder, group='evil'):
    return json.loads((folder / f'{group}.json').read_text())


def test_the_copy_is_small():
    assert sum(file.stat().st_size for file in COPY.rglob('*') if file.is_file()) < MAX_BYTES


def test_every_array_and_file_that_the_copy_mentions_is_there():
    for path in COPY.glob('*.json'):
        index = read(COPY, path.stem)
        own = COPY / f'{path.stem}.npz'
        for case in index.get('cases', []):
            arrays = COPY / case.get('npz', index.get('npz', own.name))
            keys = set(np.load(arrays).files) if arrays.exists() else set()
            missing = {value['$tensor'] for value in tensors(case)} - keys
            assert not missing, f'{path.name}: {sorted(missing)[:5]}'
            assert 'network' not in case or (COPY / 'official_pickle' / case['network']).exists()


def tensors(value):
    if isinstance(value, dict) and '$tensor' in value:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_the_cheapest_case_of_each_kind_is_taken_with_its_arrays_only(source, tmp_path):
    (tmp_path / 'new').mkdir()
    Subset(source, tmp_path / 'new').copy_group('evil', Choice(1, 'kind'))
    assert [case['name'] for case in read(tmp_path / 'new')['cases']] == ['c1', 'c2']
    assert sorted(np.load(tmp_path / 'new' / 'evil.npz').files) == ['c1/x', 'c2/x']
    assert read(tmp_path / 'new')['note'] == 'n'


def test_cases_can_be_named(source, tmp_path):
    (tmp_path / 'new').mkdir()
    Subset(source, tmp_path / 'new').copy_group('evil', Choice(names=('c0',)))
    assert [case['name'] for case in read(tmp_path / 'new')['cases']] == ['c0']


def test_an_old_copy_is_replaced_as_a_whole(source, tmp_path):
    dest = tmp_path / 'copy'
    dest.mkdir()
    (dest / 'left_over.json').write_text('{}')
    size = make_subset(source, dest)
    assert sorted(file.name for file in dest.iterdir()) == ['evil.json', 'evil.npz']
    assert size == sum(file.stat().st_size for file in dest.iterdir())


def test_an_old_copy_survives_a_source_that_cannot_be_read(source, tmp_path):
    dest = tmp_path / 'copy'
    make_subset(source, dest)
    before = sorted(file.name for file in dest.iterdir())
    (source / 'evil.json').write_text('{')
    with pytest.raises(json.JSONDecodeError):
        make_subset(source, dest)
    assert sorted(file.name for file in dest.iterdir()) == before


def test_arrays_are_found_by_name_by_case_and_by_folder():
    case = {'id': 'one', 'nets': 'small', 'inputs': ['in/x'], 'rest': 'part/y/'}
    keys = ['one/a', 'two/a', 'small/G/w', 'small/z', 'in/x', 'in/xx', 'part/y/0']
    assert needed_arrays(keys, case) == {'one/a', 'small/G/w', 'in/x', 'part/y/0'}


def test_emptying_leaves_the_original_alone():
    case = {'a': [{'grads': {'w': 'x'}, 'norm': 1}], 'b': 'y'}
    assert without(case, ('grads',)) == {'a': [{'grads': {}, 'norm': 1}], 'b': 'y'}
    assert sorted(strings(case)) == ['x', 'y']


def test_the_command_refuses_a_missing_folder(tmp_path, capsys):
    assert main([str(tmp_path / 'nothing')]) == 2
    assert 'folder' in capsys.readouterr().err
