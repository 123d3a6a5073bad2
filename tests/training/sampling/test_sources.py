# SPDX-License-Identifier: Apache-2.0
"""Files of ws that are damaged, hostile or special are refused in one line, at once."""
import os
import struct
import zipfile

import numpy as np
import pytest

from dnnlib.util import UserError
from training.sampling.directions import read_directions
from training.sampling.sources import read_w


def member(header):
    """An array file with a header of its own."""
    text = header.encode() + b'\n'
    return b'\x93NUMPY\x01\0' + struct.pack('<H', len(text)) + text + bytes(2048)


def shape(text):
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {text}, }}"


HEADERS = ['[' * 9000, shape('(4611686018427387904, 8, 64)'), shape('(-1, 8, 64)'), shape('(9**9, 8, 4)'),
           shape('(99999999, 8, 64)'), shape('(1, 8, 64)').replace('<f4', '|O')]


@pytest.mark.parametrize('header', HEADERS)
def test_arrays_of_any_claim_are_refused(tmp_path, header):
    path = str(tmp_path / 'w.npz')
    with zipfile.ZipFile(path, 'w') as archive:
        for name in ('w', 'method'):
            archive.writestr(f'{name}.npy', member(header))
    with pytest.raises(UserError, match=r'not an \.npz file with an array w'):
        read_w(path, 'projected-w')
    with pytest.raises(UserError, match='not a directions file'):
        read_directions(path)


def test_arrays_that_would_fill_memory_are_not_inflated(tmp_path):
    np.savez_compressed(tmp_path / 'w.npz', w=np.zeros([80 << 20, 1, 1], np.uint8))
    with pytest.raises(UserError, match=r'not an \.npz file'):
        read_w(str(tmp_path / 'w.npz'), 'projected-w')


@pytest.mark.parametrize('position', [300, -30])
def test_damaged_archives_are_refused(tmp_path, position):
    np.savez_compressed(tmp_path / 'w.npz', w=np.random.RandomState(0).randn(1, 8, 64).astype(np.float32))
    data = bytearray((tmp_path / 'w.npz').read_bytes())
    data[position] ^= 0x40
    (tmp_path / 'w.npz').write_bytes(data)
    with pytest.raises(UserError, match=r'not an \.npz file'):
        read_w(str(tmp_path / 'w.npz'), 'projected-w')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'w.npz')
    for read in (lambda path: read_w(path, 'init-w'), read_directions):
        with pytest.raises(UserError, match='not a regular file'):
            read(str(tmp_path / 'w.npz'))
