# SPDX-License-Identifier: Apache-2.0
"""Tensors in network pickles: read as torch wrote them, or refused; never a second pickle run."""
import io
import os
import pickle
import pickletools

import pytest
import torch

from torch_utils.pickles import describe
from torch_utils.pickles.budget import Budget, Damaged, Refused
from torch_utils.pickles.tensors import Storage, StoredTensor, load_storage, make_tensors, rebuild_tensor

STORAGE = Storage(memoryview(bytes(48)), torch.float32, 12)


def read_storage(data):
    return load_storage(data, Budget(1000))


def storage_bytes(tensor):
    """What torch puts into a pickle for the memory of a tensor."""
    arguments = [argument for _, argument, _ in pickletools.genops(pickle.dumps(tensor, protocol=4))]
    return next(argument for argument in arguments if isinstance(argument, bytes))


def round_trip(value, protocol=4):
    return describe.load(io.BytesIO(pickle.dumps(value, protocol=protocol)))


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_a_tensor_comes_back_equal(dtype, protocol):
    tensor = (torch.randn(2, 3, 5) * 3).to(dtype)
    stored = round_trip({'x': tensor}, protocol)['x']
    assert (stored.shape, stored.dtype, stored.numel) == ((2, 3, 5), dtype, 30)
    assert torch.equal(stored.tensor(), tensor)


@pytest.mark.parametrize('tensor', [
    torch.tensor(3.5), torch.empty(0), torch.empty(3, 0, 2), torch.arange(12.)[2:7], torch.arange(12.)[::3],
    torch.randn(3, 4).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)])
def test_views_and_layouts_come_back(tensor):
    loaded = round_trip(tensor).tensor()
    assert torch.equal(loaded, tensor)
    if tensor.numel() == tensor.untyped_storage().nbytes() // 4:
        assert loaded.stride() == tensor.stride()


def test_few_numbers_cannot_become_many_tensors():
    again = Storage(memoryview(STORAGE.data.obj), torch.float32, 12)
    tensors = [StoredTensor(storage, 0, (12,), (1,)) for storage in (STORAGE, again) * 3]
    assert len(make_tensors(dict(enumerate(tensors[:4])))) == 4 and make_tensors({}) == {}
    with pytest.raises(Damaged, match='240 bytes made of 48'):
        make_tensors(dict(enumerate(tensors[:5])))


def test_a_parameter_is_read_as_its_tensor_without_sharing_memory():
    parameter = torch.nn.Parameter(torch.randn(3))
    stored = round_trip(parameter)
    first, second = stored.tensor(), stored.tensor()
    first.zero_()
    assert torch.equal(second, parameter.detach())


def test_a_storage_of_a_gpu_is_read_on_the_cpu():
    data = storage_bytes(torch.arange(3.)).replace(b'X\x03\0\0\0cpu', b'X\x06\0\0\0cuda:3')
    assert b'cuda:3' in data
    assert read_storage(data).numel == 3


def test_parameters_with_hooks_or_attributes_are_refused():
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = 'x'
    with pytest.raises(describe.UserError, match='_rebuild_parameter_with_state'):
        round_trip(parameter)


@pytest.mark.parametrize('offset, shape, stride', [
    (0, (13,), (1,)), (1, (12,), (1,)), (12, (1,), (1,)), (-1, (3,), (1,)), (0, (3,), (-1,)),
    (0, (-3,), (1,)), (None, (3,), (1,)), (0, (1,) * 9, (1,) * 9),
    (0, (3, 4), (5, 1)), (0, (100,), (0,)), (0, (2, 3), (1,)), (0, [3], [1]), (0, (2.0,), (1,)),
    (0, (True,), (1,)), (2 ** 70, (1,), (1,)), (0, (2 ** 40, 2 ** 40), (0, 0))])
def test_a_view_that_leaves_its_storage_is_refused(offset, shape, stride):
    with pytest.raises(Damaged, match='a tensor'):
        rebuild_tensor(STORAGE, offset, shape, stride, False, {})


def test_the_largest_view_that_fits_is_accepted():
    assert rebuild_tensor(STORAGE, 0, (3, 4), (4, 1), False, {}).tensor().shape == (3, 4)
    assert rebuild_tensor(STORAGE, 11, (1,), (5,), True, {}, None).numel == 1


@pytest.mark.parametrize('arguments', [
    (STORAGE, 0, (3,), (1,), False, {'hook': 1}), (STORAGE, 0, (3,), (1,), False, {}, {'meta': 1}),
    (STORAGE, 0, (3,), (1,)), ('storage', 0, (3,), (1,), False, {})])
def test_hooks_metadata_and_other_things_are_refused(arguments):
    with pytest.raises(Damaged, match='a tensor'):
        rebuild_tensor(*arguments)


class Hidden:
    """Pickles as a call that makes a folder."""

    def __reduce__(self):
        return os.mkdir, ('EXECUTED',)


def test_a_second_pickle_hidden_in_a_storage_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({'x': Hidden()}, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match='mkdir'):
        read_storage(buffer.getvalue())
    zipped = io.BytesIO()
    torch.save({'x': Hidden()}, zipped)
    with pytest.raises(Damaged):
        read_storage(zipped.getvalue())
    assert list(tmp_path.iterdir()) == []


def test_a_storage_must_hold_exactly_the_declared_elements():
    data = storage_bytes(torch.arange(4.))
    assert read_storage(data).numel == 4
    more = data.replace(b'K\x04', b'K\x05')
    for wrong in (data[:-1], data + b'\0', data[:-24], data[:30], b'', b'abc', 7, more):
        with pytest.raises(Damaged):
            read_storage(wrong)


def test_other_objects_in_the_place_of_a_storage_are_refused():
    buffer = io.BytesIO()
    torch.save({'x': 1}, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(Damaged):
        read_storage(buffer.getvalue())


def test_a_storage_written_big_endian_is_refused():
    head, key, tail = storage_bytes(torch.arange(4.)).partition(b'little_endian')
    data = head + key + tail.replace(b'\x88', b'\x89', 1)
    with pytest.raises(Damaged, match='unknown format'):
        read_storage(data)
