# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files: one line and little memory, whatever the bytes; only regular files are read."""
import gzip
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from dataset_cases import encode, make_image, run_tool, write_folder, write_zip
from golden_cases import ROOT

from dnnlib.util import UserError
from training.dataset import ImageFolderDataset
from training.datasets import lsun
from training.datasets.check import check_dataset
from training.datasets.convert import convert_dataset
from training.datasets.files import ImageFiles
from training.datasets.sources import open_source
from training.datasets.transforms import TransformSettings

PNG = [encode(make_image(i)) for i in range(4)]
MEASURED = '''
import resource, sys
import dataset_tool
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    dataset_tool.main(sys.argv[1:])
finally:
    # Not ru_maxrss, which begins with that of the parent.
    print(next(int(line.split()[1]) >> 10 for line in open('/proc/self/status') if line.startswith('VmHWM')))
'''
MAX_MIB = 1024


def run_measured(source, *args):
    """(status, stderr, peak memory in MiB) of the tool in a process of its own."""
    if not os.path.exists('/proc/self/status'):
        pytest.skip('no peak memory here')
    command = [sys.executable, '-c', MEASURED, f'--source={source}', '--workers=0', *args]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return result.returncode, result.stderr, int(result.stdout.splitlines()[-1])


def dataset_zip(path, method):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for i, data in enumerate(PNG):
            archive.writestr(f'{i}.png', data)
        archive.writestr('dataset.json', json.dumps({'labels': [[f'{i}.png', i % 2] for i in range(4)]}))
    return path.read_bytes()


def damaged(data, rng):
    """The bytes with some bits flipped, numbers replaced, or the end missing."""
    data = bytearray(data)
    kind = rng.random()
    if kind < 0.6:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind < 0.8:
        del data[rng.randrange(len(data)):]
    else:
        start = rng.randrange(len(data) - 4)
        data[start:start + 4] = rng.choice([b'\xff\xff\xff\xff', bytes(4), b'\xff\xff\xff\x7f'])
    return bytes(data)


def read_all(path):
    dataset = ImageFolderDataset(path, use_labels=True)
    dataset.ledger(cond=True)
    for i in range(len(dataset)):
        dataset[i]


@pytest.mark.parametrize('method', [
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_zips_end_in_one_line(tmp_path, method):
    data, rng = dataset_zip(tmp_path / 'good.zip', method), random.Random(method)
    path, dest, settings = str(tmp_path / 'x.zip'), str(tmp_path / 'out.zip'), TransformSettings()
    refused = 0
    for _ in range(40):
        Path(path).write_bytes(damaged(data, rng))
        for read in (
            read_all, lambda p: check_dataset(p, workers=0),
            lambda p: convert_dataset(open_source(p), dest, settings, workers=0),
            lambda p: convert_dataset(open_source(p), dest, settings, workers=0, on_error='skip'),
        ):
            try:
                read(path)
            except UserError as error:
                refused += 1
                assert '\n' not in str(error)
    assert refused > 40
    assert {file.name for file in tmp_path.iterdir()} <= {'good.zip', 'x.zip', 'out.zip'}


def test_a_flipped_bit_is_named_and_can_be_skipped(tmp_path, capsys):
    path = tmp_path / 'x.zip'
    data = bytearray(dataset_zip(path, zipfile.ZIP_STORED))
    data[data.index(PNG[1]) + len(PNG[1]) // 2] ^= 1
    path.write_bytes(data)
    status, output = run_tool(capsys, path, tmp_path / 'out.zip')
    assert status == 2 and '1.png cannot be read (damaged or incomplete zip (Bad CRC-32' in output
    status, output = run_tool(capsys, path, tmp_path / 'out.zip', '--on-error=skip')
    assert status == 0 and 'Skipped 1 unreadable' in output and '1.png' in output
    assert len(ImageFolderDataset(str(tmp_path / 'out.zip'))) == 3
    status, output = run_tool(capsys, path, None, '--check')
    assert status == 2 and 'Problem: 1.png' in output


def test_an_encrypted_zip_is_called_so(tmp_path, capsys):
    path = Path(write_zip(tmp_path / 'x.zip', {'a.png': PNG[0]}))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b'PK\1\2') + 8] |= 1
    path.write_bytes(data)
    status, output = run_tool(capsys, path, tmp_path / 'out')
    assert status == 2 and 'a.png cannot be read (encrypted; unpack the zip)' in output


def test_a_wrong_size_in_a_zip_inflates_no_further(tmp_path):
    path = tmp_path / 'x.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.png', bytes(50 << 20))
    data = path.read_bytes().replace(struct.pack('<I', 50 << 20), struct.pack('<I', 1000))
    path.write_bytes(data)
    with pytest.raises(UserError, match='damaged'):
        ImageFiles(path).read('a.png')


def zeros_png(side, color_type):
    """An image of one color in a small file."""
    row = bytes(1 + side * (3 if color_type == 2 else 1))
    header = struct.pack('>IIBBBBB', side, side, 8, color_type, 0, 0, 0)
    packer = zlib.compressobj(1)
    body = b''.join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(c)) + k + c + struct.pack('>I', zlib.crc32(k + c))
        for k, c in ((b'IHDR', header), (b'IDAT', body), (b'IEND', b'')))


def write_member(path, name, num_bytes, method):
    with zipfile.ZipFile(path, 'w', method) as archive:
        archive.writestr('0.png', PNG[0])
        with archive.open(name, 'w') as file:
            for _ in range(num_bytes >> 20):
                file.write(bytes(1 << 20))


@pytest.mark.parametrize('kind', ['pixels', 'chunks', 'deflate', 'bzip2', 'labels', 'mnist', 'cifar'])
def test_bombs_are_refused_in_little_memory(tmp_path, kind):
    source = tmp_path / 'x.zip'
    if kind == 'pixels':
        source = write_folder(tmp_path / 's', {'0.png': PNG[0], 'a.png': zeros_png(20_000, 0)})
    elif kind == 'chunks':
        chunk = struct.pack('>I4sI', 0, b'tIME', zlib.crc32(b'tIME'))
        source = write_folder(tmp_path / 's', {'a.png': PNG[0][:33] + chunk * 300_000 + PNG[0][33:]})
    elif kind in ('deflate', 'bzip2'):
        method = zipfile.ZIP_DEFLATED if kind == 'deflate' else zipfile.ZIP_BZIP2
        write_member(source, 'a.png', 300 << 20, method)
    elif kind == 'labels':
        write_member(source, 'dataset.json', 100 << 20, zipfile.ZIP_DEFLATED)
    else:
        source = tmp_path / ('train-images-idx3-ubyte.gz' if kind == 'mnist' else 'cifar-10-python.tar.gz')
        member = tarfile.TarInfo('cifar-10-batches-py/data_batch_1')
        member.size = 400 << 20
        header = struct.pack('>BBBBIII', 0, 0, 8, 3, 1, 400 << 10, 1 << 10)
        start = header if kind == 'mnist' else member.tobuf()
        with gzip.open(source, 'wb', 1) as file:
            file.write(start + bytes(400 << 20))
    for args in ([f'--dest={tmp_path}/out'], ['--check'])[:1 if kind in ('mnist', 'cifar') else 2]:
        status, error, peak = run_measured(source, *args)
        assert status == 2 and 'Traceback' not in error and peak < MAX_MIB, (error, peak)
    assert not (tmp_path / 'out').exists()


def test_an_image_at_the_limit_takes_less_than_a_gigabyte(tmp_path):
    source = write_folder(tmp_path / 's', {'a.png': zeros_png(10_900, 2)})
    status, error, peak = run_measured(source, f'--dest={tmp_path}/out', '--width=8', '--height=8')
    assert status == 0 and peak < MAX_MIB, (error, peak)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
@pytest.mark.parametrize('name', [
    'p.png', 'p', 'dataset.json', 'zero.png', 'x.zip', 'train-images-idx3-ubyte.gz'])
def test_only_regular_files_are_opened(tmp_path, capsys, name):
    source = write_folder(tmp_path / 's', {'0.png': PNG[0]})
    path = Path(source, name)
    if name == 'zero.png':
        path.symlink_to('/dev/zero')
    else:
        os.mkfifo(path)
    source = path if name.endswith(('.zip', '.gz')) else source
    status, output = run_tool(capsys, source, tmp_path / 'out')
    if name == 'p':
        assert status == 0 and 'Not used: 1 without suffix (first: p): not readable' in output
    else:
        assert status == 2 and 'not a regular file' in output
    if name.endswith('.png'):
        assert run_tool(capsys, source, tmp_path / 'out', '--on-error=skip')[0] == 0
        with pytest.raises(UserError, match='not a regular file'):
            list(ImageFolderDataset(source))


@pytest.mark.skipif(not hasattr(os, 'symlink'), reason='no links here')
def test_links_to_folders_are_followed_once(tmp_path, capsys):
    write_folder(tmp_path / 'real', {'a.png': PNG[0], 'b.png': PNG[1]})
    source = Path(write_folder(tmp_path / 's', {'c.png': PNG[2]}))
    real = tmp_path / 'real'
    for name, target in (('linked', real), ('loop', source), ('d.png', real / 'a.png')):
        (source / name).symlink_to(target)
    assert ImageFiles(source).names == ['c.png', 'd.png', 'linked/a.png', 'linked/b.png']
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 0 and 'Not used: 1 links that lead back to a folder above (first: loop)' in output


@pytest.mark.skipif(not hasattr(os, 'symlink'), reason='no links here')
def test_a_link_to_itself_is_named_and_can_be_skipped(tmp_path, capsys):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image())})
    (tmp_path / 's' / 'self.png').symlink_to('self.png')
    (tmp_path / 's' / 'other').symlink_to('other')
    status, output = run_tool(capsys, source, tmp_path / 'o')
    assert status == 2 and 'Error: self.png cannot be read' in output
    status, output = run_tool(capsys, source, tmp_path / 'o', '--on-error=skip')
    assert status == 0 and 'Wrote 1 images' in output and '(first: other): not readable' in output


@pytest.mark.skipif(not hasattr(os, 'symlink'), reason='no links here')
def test_linked_classes_are_classes(tmp_path, capsys):
    write_folder(tmp_path / 'real', {'a.png': PNG[0]})
    (tmp_path / 's').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 's' / name).symlink_to(tmp_path / 'real')
    status, output = run_tool(capsys, tmp_path / 's', tmp_path / 'out', '--labels=folders')
    assert status == 0 and 'Class 0 = cat' in output and 'Class 1 = dog' in output


@pytest.mark.skipif(not hasattr(os, 'symlink'), reason='no links here')
def test_folders_that_link_to_one_another_are_finite(tmp_path):
    for i in range(8):
        write_folder(tmp_path / 's' / str(i), {'a.png': PNG[0]})
        for j in range(8):
            (tmp_path / 's' / str(i) / f'to{j}').symlink_to(tmp_path / 's' / str(j))
    assert 8 <= len(ImageFiles(tmp_path / 's').names) <= 8 + 64


@pytest.mark.parametrize('shape', [
    (0, 2 ** 32 - 1, 2 ** 32 - 1), (2, 0, 0), (1, 20000, 1), (2 ** 32 - 1,) * 3])
def test_impossible_mnist_is_refused(tmp_path, capsys, shape):
    images, labels = tmp_path / 'train-images-idx3-ubyte.gz', tmp_path / 'train-labels-idx1-ubyte.gz'
    images.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack('>III', *shape) + bytes(20000)))
    if 0 in shape:
        images.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack('>III', *shape)))
    labels.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + struct.pack('>I', 2) + bytes(2)))
    status, output = run_tool(capsys, images, tmp_path / 'out')
    assert status == 2 and 'not an IDX file' in output


@pytest.mark.parametrize('kind', ['link', 'sparse', 'many'])
def test_odd_members_of_cifar_are_refused(tmp_path, capsys, kind):
    path = tmp_path / 'cifar-10-python.tar.gz'
    with tarfile.open(path, 'w:gz') as archive:
        for i in range(100 if kind == 'many' else 1):
            member = tarfile.TarInfo(f'x{i}' if kind == 'many' else 'cifar-10-batches-py/data_batch_1')
            if kind == 'link':
                member.type, member.linkname = tarfile.LNKTYPE, member.name
            archive.addfile(member, io.BytesIO())
    if kind == 'sparse':
        data = bytearray(gzip.decompress(path.read_bytes()))
        data[156:157] = b'S'
        data[148:156] = b'        '
        data[148:156] = f'{sum(data[:512]):06o}\0 '.encode()
        path.write_bytes(gzip.compress(bytes(data)))
    status, output = run_tool(capsys, path, tmp_path / 'out')
    assert status == 2 and 'not the CIFAR-10 archive' in output and 'has no place in it' in output


def lmdb_folder(path, count=30):
    lmdb = pytest.importorskip('lmdb')
    with lmdb.open(str(path)) as database, database.begin(write=True) as transaction:
        for i in range(count):
            transaction.put(f'k{i:02d}'.encode(), PNG[i % 4])
    return path


def test_damaged_lmdb_ends_in_one_line(tmp_path, capsys):
    data = (lmdb_folder(tmp_path / 'x_lmdb') / 'data.mdb').read_bytes()
    rng = random.Random(0)
    for kind in ('cut', 'pages', 'count'):
        changed = bytearray(data)
        if kind == 'cut':
            del changed[8192:]
        elif kind == 'pages':
            for _ in range(200):
                changed[rng.randrange(8192, len(data))] = rng.randrange(256)
        else:
            # The number of entries of the main tree, in one of two pages.
            changed = changed.replace(struct.pack('<Q', 30), struct.pack('<Q', 3 * 10 ** 16))
        (tmp_path / 'x_lmdb' / 'data.mdb').write_bytes(changed)
        status, output = run_tool(capsys, tmp_path / 'x_lmdb', tmp_path / 'out')
        assert 'Traceback' not in output and (status == 0) == (tmp_path / 'out').exists(), output
        if kind != 'pages':
            assert status == 2 and 'not an LMDB database, or damaged' in output, output
        assert not [name for name in os.listdir(tmp_path) if 'partial' in name]


def dies(path, sender):
    sender.send(5)
    os.kill(os.getpid(), signal.SIGKILL)


def never_ends(path, sender):
    sender.send(2)
    for _ in range(3):
        sender.send([(b'k', PNG[0])])
    sender.send(None)


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no such signal here')
@pytest.mark.parametrize(('reader', 'message'), [
    (dies, 'reading it ends with SIGKILL'), (never_ends, 'more than its 2 entries')])
def test_a_crash_of_the_database_is_survived(tmp_path, monkeypatch, reader, message):
    source = lsun.LmdbSource(str(lmdb_folder(tmp_path / 'x_lmdb')))
    source._length = 2

    class Forked:
        """As multiprocessing, but of functions that a spawned process cannot import."""

        @staticmethod
        def get_context(_):
            import multiprocessing
            return multiprocessing.get_context('fork')

    monkeypatch.setattr(lsun, 'multiprocessing', Forked)
    monkeypatch.setattr(lsun, '_send', reader)
    with pytest.raises(UserError, match=message):
        list(source)


def test_a_dataset_path_that_is_no_text_works(tmp_path, capsys):
    source = write_folder(tmp_path / 'caf\udce9', {'a.png': PNG[0]})
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 0, output
    np.testing.assert_array_equal(ImageFolderDataset(source)[0][0], make_image(0).transpose(2, 0, 1))
