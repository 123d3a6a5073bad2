# SPDX-License-Identifier: Apache-2.0
"""Arrays inside pickles: any shape and plain number type, and nothing else."""
import io
import pickle

import numpy as np
import pytest

from dnnlib.util import UserError
from torch_utils.pickles import describe
from torch_utils.pickles.arrays import StoredArray


def load(value, protocol=4):
    data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol)
    return describe.load(io.BytesIO(data), 'net.pkl')


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('array', [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(1.5, np.float16), np.array([True, False]),
    np.arange(3, dtype='>i4'), np.arange(8)[::2]], ids=str)
def test_arrays_of_numbers_come_through(array, protocol):
    loaded = load([array], protocol)[0]
    assert isinstance(loaded, StoredArray) and loaded.shape == array.shape
    assert loaded.array().dtype == array.dtype and np.array_equal(loaded.array(), array)


def test_an_empty_array_comes_through():
    assert load([np.zeros([0, 3], np.int8)])[0].array().shape == (0, 3)


def test_arrays_of_python_2_come_through():
    text = (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02t'
            b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbI00\nU\x08"
            + np.array([1, 2], '<f4').tobytes() + b'tb.')
    assert load(text).array().tolist() == [1, 2]


@pytest.mark.parametrize('value', [
    np.array([{}], dtype=object), np.array(['text']), np.array(['2020-01-01'], 'M8[D]'),
    np.array([(1, 2)], [('a', 'f4'), ('b', 'f4')]), np.array([1j]), np.ma.array([1, 2]), np.recarray])
def test_arrays_of_anything_else_are_refused(value):
    with pytest.raises(UserError):
        load(value)


HEAD = b'\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R'
TYPE = b'cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R'


def test_the_parts_of_the_next_test_make_an_array():
    assert load(HEAD + b'(K\x01K\x02\x85' + TYPE + b'\x89C\x0812345678tb.').shape == (2,)


@pytest.mark.parametrize('state', [
    b'N', b')', b'(K\x01K\x03\x85' + TYPE + b'\x89C\x0812345678t', b'(K\x01K\x02\x85N\x89C\x0812345678t',
    b'(K\x01J\xff\xff\xff\xff\x85' + TYPE + b'\x89C\x0812345678t', b'(K\x01N' + TYPE + b'\x89C\x0812345678t',
    b'(K\x01(' + b'K\x01' * 40 + b't' + TYPE + b'\x89C\x041234t', b'(K\x01K\x02\x85' + TYPE + b'\x89Nt',
    b'(K\x01\x8a\x09' + b'\xff' * 8 + b'\x7f\x85' + TYPE + b'\x89C\x0812345678t'])
def test_an_array_whose_parts_disagree_is_refused(state):
    with pytest.raises(UserError, match='damaged'):
        load(HEAD + state + b'b.')


@pytest.mark.parametrize('call', [
    b'cbuiltins\nset\nK\x00\x85C\x01b\x87R', b'cnumpy\nndarray\nK\x05\x85C\x01b\x87R',
    b'cnumpy\nndarray\n)R'])
def test_only_empty_arrays_are_made_and_never_by_their_class(call):
    with pytest.raises(UserError, match='damaged'):
        load(b'cnumpy.core.multiarray\n_reconstruct\n' + call + b'.')
