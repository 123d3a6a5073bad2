# SPDX-License-Identifier: Apache-2.0
"""Files that are not networks are called what they are, by every tool that opens networks."""
import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from small_networks import save_small_network

import legacy
from dnnlib.util import UserError
from training.formats import inspection, kinds
from training.formats.load import load_bytes


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name.replace('_', '.'), data)
    return stream.getvalue()


def tarred(data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as archive:
        item = tarfile.TarInfo('net.pkl')
        item.size = len(data)
        archive.addfile(item, io.BytesIO(data))
    return stream.getvalue()


def array_file(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


NET = pickle.dumps({'G': 1})
FOREIGN = {
    'an empty file': b'',
    'an HTML page': b'<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>',
    'an HTML page, ': b'\xef\xbb\xbf\r\n <HTML><body>',
    'an XML file': b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    'a Git LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 381646349\n',
    'compressed with gzip': gzip.compress(NET), 'compressed with bzip2': bz2.compress(NET),
    'compressed with xz': lzma.compress(NET), 'a tar archive': tarred(NET),
    'a 7z archive': b'7z\xbc\xaf\x27\x1c\0\4', 'a RAR archive': b'Rar!\x1a\x07\x01\0',
    'with net.pkl in it; unpack': zipped(net_pkl=NET),
    'a zip archive of images': zipped(a_png=b'x', dataset_json=b'{}'),
    'a zip archive, not': zipped(a_txt=b'x'), 'NumPy arrays': array_file(w=np.zeros(3)),
    'a PNG image': b'\x89PNG\r\n\x1a\n', 'a JPEG image': b'\xff\xd8\xff\xe0',
    'an HDF5 file': b'\x89HDF\r\n\x1a\n',
    'a JSON text': json.dumps({'error': 'not found'}).encode(), 'a text': b'Access denied: please log in.\n'}


@pytest.mark.parametrize('words', FOREIGN)
def test_a_file_that_is_no_network_is_called_what_it_is(words):
    for trust in (False, True):
        with pytest.raises(UserError, match=f'^a/b: (.* )?{words}'):
            load_bytes(FOREIGN[words], 'a/b', trust_pickle=trust)
    lines = inspection.describe(FOREIGN[words], 'a/b', load_bytes)
    assert lines[-1].startswith(inspection.REFUSED) and words in lines[-1]
    assert 'kind       pickle' not in '\n'.join(lines)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_taken_for_nothing_else(protocol):
    for value in ({'G': 1}, [1, 2], ('a b c', 1), 'some words in a line', 3):
        data = pickle.dumps(value, protocol=protocol)
        assert kinds.kind_of(data) == 'pickle' or value == 'some words in a line'


def test_inspecting_what_cannot_be_used_ends_with_status_1(tmp_path, capsys):
    (tmp_path / 'a.pkl').write_bytes(b'<html>')
    for name, status in (('a.pkl', 1), ('absent.pkl', 2)):
        with pytest.raises(SystemExit) as ended:
            legacy.main(['inspect', str(tmp_path / name)])
        assert ended.value.code == status
    assert 'an HTML page' in capsys.readouterr().out
    save_small_network(tmp_path / 'b.pkl')
    with pytest.raises(SystemExit, match='0'):
        legacy.main(['inspect', str(tmp_path / 'b.pkl')])
