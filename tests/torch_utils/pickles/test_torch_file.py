# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save: both formats, every kind of tensor, and nothing that torch.load would run."""
import argparse
import collections
import io
import os
import pickle
import re
import zipfile

import pytest
import torch
from small_networks import without_end

from dnnlib.util import UserError
from torch_utils.pickles import torch_file
from torch_utils.pickles.tensors import StoredTensor

BOTH = pytest.mark.parametrize('is_zip', [True, False])


def saved(value, is_zip=True):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def refusal(data):
    with pytest.raises(UserError) as error:
        torch_file.load(data, 'x.pt')
    assert str(error.value).startswith('x.pt: ') and str(error.value).isprintable()
    return str(error.value)


@BOTH
def test_tensors_come_through_whatever_their_type_and_layout(is_zip):
    base = torch.arange(24.0).reshape(2, 3, 4)
    value = {
        'a': base, 'view': base[1, 1:], 'transposed': base.permute(2, 0, 1), 'half': base.half(),
        'bfloat': base.bfloat16(), 'int': torch.tensor(3), 'bool': torch.tensor([True, False]),
        'empty': torch.zeros(0, 3), 'parameter': torch.nn.Parameter(base.clone())}
    data = saved(value, is_zip)
    loaded = torch_file.load(data, 'x.pt')
    assert torch_file.is_torch_file(data) and list(loaded) == list(value)
    for name, tensor in value.items():
        assert isinstance(loaded[name], StoredTensor)
        again = loaded[name].tensor()
        assert again.dtype == tensor.dtype and torch.equal(again, tensor.detach()), name


@BOTH
def test_state_dicts_options_and_plain_values_come_through(is_zip):
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata  # which is pickled as an attribute of the dict
    loaded = torch_file.load(saved(
        {'g': state, 'args': argparse.Namespace(size=3, path='x'), 'step': 7,
         'o': collections.OrderedDict(a=1)}, is_zip), 'x.pt')
    assert loaded['g']['weight'].shape == (3, 2) and loaded['step'] == 7 and loaded['o'] == {'a': 1}


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('made',)


@BOTH
def test_a_hostile_file_is_refused_by_name_and_does_nothing(is_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f'asks for {os.name}.mkdir' in refusal(saved({'a': Hostile()}, is_zip))
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_truncated_files_are_refused(is_zip):
    data = saved({'a': torch.ones(3), 'b': [1, 2]}, is_zip)
    for length in range(4, len(data), 7):
        refusal(data[:length])


def rezipped(change, compression=zipfile.ZIP_STORED):
    """A saved file with other members: change(dict of name -> bytes)."""
    with zipfile.ZipFile(io.BytesIO(saved({'a': torch.ones(3)}))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def member(members, suffix):
    return next(name for name in members if name.endswith(suffix))


CHANGES = {
    'torch.save did not write': lambda m: m.pop(member(m, '/data.pkl')),
    'There is no item': lambda m: m.pop(member(m, '/data/0')),
    'with 4 bytes': lambda m: m.update({member(m, '/data/0'): b'1234'}),
    'byte order': lambda m: m.update({member(m, '/byteorder'): b'big'})}


@pytest.mark.parametrize('text', CHANGES)
def test_archives_whose_members_do_not_fit_are_refused(text):
    assert text in refusal(rezipped(CHANGES[text]))
    assert torch_file.load(rezipped(lambda m: None), 'x.pt')['a'].tensor().tolist() == [1, 1, 1]


def test_compressed_archives_are_refused():
    assert 'is compressed' in refusal(rezipped(lambda m: None, zipfile.ZIP_DEFLATED))


def test_old_files_whose_storages_disagree_are_refused():
    data = saved({'a': torch.ones(3)}, is_zip=False)
    assert 'another size' in refusal(data[:-20] + b'\x04' + data[-19:])
    assert 'unknown format' in refusal(data.replace(b'little_endianq\x02\x88', b'little_endianq\x02\x89'))


@pytest.mark.parametrize('keys', [*without_end(), [], [1]], ids=['doubled', 'cycle', 'none', 'number'])
def test_old_files_whose_list_of_storages_is_another_are_refused(keys):
    data = saved({'a': torch.ones(3)}, is_zip=False)
    changed, count = re.subn(
        rb'\x80\x02\]q.X.{4}\d+q.a\.', lambda _: pickle.dumps(keys, 2), data, flags=re.DOTALL)
    assert count == 1 and 'other storages' in refusal(changed)
