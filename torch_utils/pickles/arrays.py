# SPDX-License-Identifier: Apache-2.0
"""NumPy scalars and arrays inside network pickles, of plain numeric dtypes only."""
import math
from typing import Any

import numpy as np

from torch_utils.pickles.budget import Damaged
from torch_utils.pickles.machine import Buildable, Global

MAX_DIMS = 8  # also of tensors
NUMBER_CODES = ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1')


class NumberType(Buildable):
    """Stands in for numpy.dtype: one of NUMBER_CODES, never an object or a structure."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        # 'O' is refused, among others: arrays of objects contain pickles.
        if code not in NUMBER_CODES:
            # Only text is printed: formatting nested lists can take exponential time.
            raise Damaged(f'numpy values of type {code!r}' if type(code) is str else 'a nameless numpy type')
        self.code, self.order = code, '<'

    def build(self, state: Any) -> None:
        """Take (version, byte order, None, None, None, ...): no fields, no sub-arrays."""
        if type(state) is not tuple or len(state) < 5 or state[1] not in ('<', '>', '|') or any(state[2:5]):
            raise Damaged('a structured numpy type')
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return np.dtype(self.order + self.code)


class StoredArray(Buildable):
    """A description of an array: created empty, then given its content, as NumPy pickles it."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self._content: tuple[bytes, np.dtype, str] = (b'', np.dtype('f4'), 'C')

    def build(self, state: Any) -> None:
        """Take (version, shape, number type, column-major?, bytes). Raises Damaged if the sizes disagree."""
        if type(state) is not tuple or len(state) != 5:
            raise Damaged('an array of an unknown kind')
        _, shape, kind, is_column_major, data = state
        # Pickles of Python 2 have text where Python 3 has bytes.
        data = data.encode('latin1') if type(data) is str else data
        if not isinstance(kind, NumberType) or type(data) is not bytes or type(shape) is not tuple:
            raise Damaged('an array of other things than numbers')
        if len(shape) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in shape):
            raise Damaged('an array without a shape')
        # NumPy multiplies the sizes beside an empty axis, too, in 63 bits.
        if math.prod(size or 1 for size in shape) >= 1 << 60:
            raise Damaged('an array of an impossible size')
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise Damaged(f'an array of shape {list(shape)} in {len(data)} bytes')
        self.shape, self._content = shape, (data, kind.dtype, 'F' if is_column_major is True else 'C')

    def array(self) -> np.ndarray:
        """The array, a read-only view of the bytes of the file."""
        data, dtype, order = self._content
        return np.frombuffer(data, dtype).reshape(self.shape, order=order)


def numpy_scalar(kind: Any, data: Any) -> Any:
    """Stands in for numpy's scalar(): the Python number of these bytes."""
    data = data.encode('latin1') if type(data) is str else data
    if not isinstance(kind, NumberType) or type(data) is not bytes or len(data) != kind.dtype.itemsize:
        raise Damaged('a numpy number of the wrong kind or size')
    return np.frombuffer(data, kind.dtype)[0].item()


def new_array(cls: Any, shape: Any, code: Any) -> StoredArray:
    """Stands in for numpy's _reconstruct(ndarray, (0,), b'b'): an empty array, to be given its content."""
    if cls is not NDARRAY or shape != (0,):
        raise Damaged('an array that is not one')
    return StoredArray()


NDARRAY = Global()  # stands in for the class numpy.ndarray, which files name but never call


def encode(text: Any, encoding: Any) -> bytes:
    """Stands in for _codecs.encode, which pickle protocols below 3 use for bytes."""
    if type(text) is not str or encoding != 'latin1':
        raise Damaged('encoded text')
    return text.encode('latin1')


_SCALAR, _ARRAY = Global(call=numpy_scalar), Global(call=new_array)

# Globals of pickles with scalars and arrays; NumPy 2 renamed a module.
TABLE = {
    ('numpy.core.multiarray', 'scalar'): _SCALAR,
    ('numpy._core.multiarray', 'scalar'): _SCALAR,
    ('numpy.core.multiarray', '_reconstruct'): _ARRAY,
    ('numpy._core.multiarray', '_reconstruct'): _ARRAY,
    ('numpy', 'ndarray'): NDARRAY,
    ('numpy', 'dtype'): Global(call=NumberType),
    ('_codecs', 'encode'): Global(call=encode),
}
