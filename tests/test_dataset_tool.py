# SPDX-License-Identifier: Apache-2.0
"""dataset_tool as a user runs it: the published results (golden), every source, and every mistake."""
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_cases import encode, is_read_better, make_image, run_tool, source_path, write_folder, write_zip
from golden_cases import ROOT, arrays, cases
from PIL import Image

from training.dataset import ImageFolderDataset
from training.datasets.convert import SERIAL_BELOW

MNIST = ROOT.parent / 'shared' / 'data' / 'mnist10k'


@pytest.fixture
def tool(capsys):
    """Runs the tool; gives the exit status and what it printed."""
    return lambda *args: run_tool(capsys, *args)


def read_output(path):
    """{name: bytes} in the order of a zip, or sorted for a folder."""
    path = Path(path)
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes()
                for file in sorted(path.rglob('*')) if file.is_file()}
    with zipfile.ZipFile(path) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, np.asarray(image)


def assert_fair(case, name, data):
    """Modes and sizes equal; at most two levels off, as between releases of Pillow."""
    expected = case['images'][name]
    mode, pixels = pixels_of(data)
    assert (mode, *pixels.shape[1::-1]) == (expected['mode'], expected['width'], expected['height'])
    published = arrays('dataset_tool_pixels.npz')[f'{case["name"]}/{name}']
    difference = np.abs(pixels.astype(int) - published.astype(int))
    assert difference.max() <= 2 and difference.mean() <= 0.25


def destination(tmp_path, dest):
    """The --dest of a golden case."""
    if dest == 'NONEMPTY':
        return write_folder(tmp_path / 'full', {'x': b'x'})
    return str(tmp_path / dest) if dest else ''


@pytest.mark.parametrize('case', cases('dataset_tool'))
def test_conversion_is_as_published(case, tmp_path, tool):
    if case['source'].rstrip('/').endswith('_lmdb'):
        pytest.importorskip('lmdb')
    dest = destination(tmp_path, case['dest'])
    before = sorted(str(file) for file in tmp_path.rglob('*'))
    slash = '/' if case['source'].endswith('/') else ''
    status, output = tool(f'{source_path(case["source"])}{slash}', dest, *case['args'])
    if is_read_better(case['source']) or {'quirk', 'reference_exception'} & set(case):
        # The published tool stores palette indices, writes empty datasets and fails at gray crops. We read
        # true colours, refuse what is empty and crop gray; either way nothing may be half done.
        assert (status == 0) == os.path.exists(dest), output
    elif case['exit_code'] != 0:
        assert status == 2 and 'Error' in output and 'Traceback' not in output
        assert sorted(str(file) for file in tmp_path.rglob('*')) == before, 'something was left behind'
    else:
        assert status == 0, output
        files = read_output(dest)
        assert list(files) == case['listing']
        assert json.loads(files['dataset.json']) == case['dataset_json']
        for name in case['images']:
            assert_fair(case, name, files[name])


def test_palettes_become_their_colours(tmp_path, tool):
    image = Image.fromarray(make_image()).quantize(8)
    source = write_folder(tmp_path / 'src', {'a.png': encode(image), 'b.gif': encode(image, 'gif')})
    assert tool(source, tmp_path / 'out')[0] == 0
    files = read_output(tmp_path / 'out')
    for name in list(files)[:2]:
        np.testing.assert_array_equal(pixels_of(files[name])[1], np.asarray(image.convert('RGB')))


def test_gray_can_be_cropped(tmp_path, tool):
    source = write_folder(tmp_path / 'src', {'a.png': encode(make_image(0, 8, 12, 1))})
    for transform in ['center-crop', 'center-crop-wide']:
        dest = tmp_path / transform
        status, output = tool(source, dest, '--transform', transform, '--width=8', '--height=4')
        assert (status == 0) == (transform == 'center-crop-wide'), output
    assert pixels_of(read_output(dest)['00000/img00000000.png'])[0] == 'L'


def many_images(path, count=40):
    files = {f'{i % 3}/{i:03d}.png': encode(make_image(i, 12, 12)) for i in range(count)}
    return write_folder(path, files)


def test_workers_do_not_change_the_output(tmp_path, tool):
    source = many_images(tmp_path / 'src')
    for workers in [0, 2]:
        status, output = tool(source, tmp_path / f'{workers}.zip', '--width=8', '--height=8',
                              '--labels=folders', f'--workers={workers}')
        assert status == 0, output
    assert (tmp_path / '0.zip').read_bytes() == (tmp_path / '2.zip').read_bytes()


def test_an_unreadable_image_stops_the_tool_and_leaves_nothing(tmp_path, tool):
    source = many_images(tmp_path / 'src')
    Path(source, '1', '004.png').write_bytes(b'junk')
    for workers in [0, 2]:
        status, output = tool(source, tmp_path / 'out.zip', '--width=8', '--height=8',
                              f'--workers={workers}')
        assert status == 2 and '1/004.png cannot be decoded' in output and '--on-error=skip' in output
    assert sorted(os.listdir(tmp_path)) == ['src']


def test_unreadable_images_are_skipped_and_listed_on_request(tmp_path, tool):
    files = {f'{i}.png': encode(make_image(i)) for i in range(6)}
    files['1.png'], files['4.png'] = b'', files['4.png'][:60]
    source = write_zip(tmp_path / 'src.zip', files)
    status, output = tool(source, tmp_path / 'out.zip', '--on-error=skip', '--max-images=3')
    assert status == 0 and 'Skipped 1 unreadable' in output and '1.png' in output
    written = read_output(tmp_path / 'out.zip')
    assert list(written) == [f'00000/img0000000{i}.png' for i in range(3)] + ['dataset.json']
    np.testing.assert_array_equal(pixels_of(written['00000/img00000002.png'])[1], make_image(3))


def test_folders_give_classes_and_the_mapping_is_printed(tmp_path, tool):
    files = {f'{name}/a.png': encode(make_image()) for name in ['dog', 'cat', 'cow/calf']}
    source = write_folder(tmp_path / 's', files)
    status, output = tool(source, tmp_path / 'out', '--labels=folders')
    assert status == 0
    assert all(f'Class {i} = {name}' in output for i, name in enumerate(['cat', 'cow', 'dog']))
    labels = json.loads(read_output(tmp_path / 'out')['dataset.json'])['labels']
    assert [label for _, label in labels] == [0, 1, 2]


def test_csv_gives_labels(tmp_path, tool):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image()), 'd/b.png': encode(make_image())})
    (tmp_path / 'labels.csv').write_text('file,x,y\nd/b.png,1,2\na.png,0.5,3\n')
    assert tool(source, tmp_path / 'out', f'--labels={tmp_path / "labels.csv"}')[0] == 0
    dataset = ImageFolderDataset(str(tmp_path / 'out'), use_labels=True)
    assert [dataset.get_label(i).tolist() for i in range(2)] == [[0.5, 3], [1, 2]]


def test_an_image_without_a_csv_row_is_named(tmp_path, tool):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image()), 'b.png': encode(make_image())})
    (tmp_path / 'labels.csv').write_text('a.png,1\n')
    status, output = tool(source, tmp_path / 'out', f'--labels={tmp_path / "labels.csv"}')
    assert status == 2 and 'no row for b.png' in output


def test_labels_can_be_dropped(tmp_path, tool):
    files = {'a.png': encode(make_image()), 'dataset.json': {'labels': [['a.png', 1]]}}
    source = write_folder(tmp_path / 's', files)
    assert tool(source, tmp_path / 'out', '--labels=none')[0] == 0
    assert json.loads(read_output(tmp_path / 'out')['dataset.json']) == {'labels': None}


def test_any_shape_allows_what_our_networks_train_on(tmp_path, tool):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image(0, 6, 12, 4))})
    status, output = tool(source, tmp_path / 'out')
    assert status == 2 and 'not square' in output and '--any-shape' in output
    assert tool(source, tmp_path / 'out', '--any-shape')[0] == 0
    assert ImageFolderDataset(str(tmp_path / 'out')).image_shape == [4, 6, 12]


def test_even_any_shape_refuses_odd_sides(tmp_path, tool):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image(0, 7, 8))})
    status, output = tool(source, tmp_path / 'out', '--any-shape')
    assert status == 2 and 'one power of two' in output


def test_mixed_modes_can_be_made_alike(tmp_path, tool):
    source = write_folder(tmp_path / 's', {f'{n}.png': encode(make_image(n, 8, 8, n)) for n in (1, 2, 3, 4)})
    status, output = tool(source, tmp_path / 'out')
    assert status == 2 and '2.png' in output and '--mode=RGB' in output
    assert tool(source, tmp_path / 'out', '--mode=RGB')[0] == 0
    assert ImageFolderDataset(str(tmp_path / 'out')).image_shape == [3, 8, 8]


def test_stretching_is_mentioned(tmp_path, tool):
    files = {'a.png': encode(make_image(0, 16, 32)), 'b.png': encode(make_image(0, 32, 32))}
    source = write_folder(tmp_path / 's', files)
    size = ['--width=8', '--height=8']
    assert 'changed the proportions of 1;' in tool(source, tmp_path / 'a', *size)[1]
    assert 'proportions' not in tool(source, tmp_path / 'b', *size, '--transform=center-crop')[1]


def test_enlarging_is_mentioned(tmp_path, tool):
    files = {'a.png': encode(make_image(0, 16, 32)), 'b.png': encode(make_image(0, 7, 32))}
    source = write_folder(tmp_path / 's', files)
    crop = ['--transform=center-crop', '--width=8', '--height=8']
    assert 'Enlarged 1 that are smaller than the output, which blurs them (first: b.png).' in tool(
        source, tmp_path / 'a', *crop)[1]
    assert 'Enlarged' not in tool(source, tmp_path / 'b', *crop[:1], '--width=4', '--height=4')[1]


def test_a_late_misfit_is_found_before_the_work(tmp_path, tool):
    files = {f'{i:03d}.png': encode(make_image(0)) for i in range(20)}
    files['999.png'] = encode(make_image(0, 8, 9))
    status, output = tool(write_folder(tmp_path / 's', files), tmp_path / 'out')
    assert status == 2 and '999.png is 9x8' in output and 'Converting' not in output


def test_both_spellings_of_max_images_work(tmp_path, tool):
    source = many_images(tmp_path / 'src', 5)
    for option in ['--max-images=2', '--max_images=2']:
        assert tool(source, tmp_path / option, option, '--width=8', '--height=8')[0] == 0
        assert len(read_output(tmp_path / option)) == 3


@pytest.mark.parametrize(('args', 'message'), [
    (['--max-images=0'], 'x>=1'), (['--width=-3'], '1<=x<=16384'), (['--height=99999'], '1<=x<=16384'),
    (['--labels=folder'], 'expected auto, folders, none'),
    (['--transform=center-crop'], 'needs both --width and --height'), (['--resize-filter=cubic'], 'cubic'),
    (['--transform=center-crop-wide', '--width=4', '--height=8'], 'must not exceed'),
    (['--labels=none.csv'], 'cannot be read'), (['--labels=folders'], 'no class folder'),
])
def test_bad_options_are_refused(tmp_path, tool, args, message):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image())})
    status, output = tool(source, tmp_path / 'out', *args)
    assert status == 2 and message in output and not (tmp_path / 'out').exists()


def test_labels_that_training_would_refuse_are_announced(tmp_path, tool):
    for label, is_bad in ((-1, True), (True, True), (10 ** 9, True), (1, False)):
        labels = json.dumps({'labels': [['a.png', label]]}).encode()
        source = write_folder(tmp_path / f's{label}', {'a.png': encode(make_image()), 'dataset.json': labels})
        status, output = tool(source, tmp_path / f'{label}.zip')
        assert status == 0 and ('--cond=1 will refuse them' in output) == is_bad, output


def test_bad_destinations_are_refused(tmp_path, tool):
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image())})
    write_folder(tmp_path / 'dir.zip', {'x': b''})
    for dest, message in [('s/a.png', 'is a file'), ('s/a.png/out', 'cannot be written'),
                          ('dir.zip', 'is a folder'), ('s/a.png/out.zip', 'cannot be written')]:
        status, output = tool(source, tmp_path / dest)
        assert status == 2 and message in output, output
    assert tool(source, None)[0] == 2


def test_an_existing_zip_is_replaced_only_on_success(tmp_path, tool):
    good = write_folder(tmp_path / 'good', {'a.png': encode(make_image())})
    bad = write_folder(tmp_path / 'bad', {'a.png': encode(make_image())[:70]})
    (tmp_path / 'out.zip').write_bytes(b'old')
    assert tool(bad, tmp_path / 'out.zip')[0] == 2
    assert (tmp_path / 'out.zip').read_bytes() == b'old'
    assert tool(good, tmp_path / 'out.zip')[0] == 0
    assert len(read_output(tmp_path / 'out.zip')) == 2


def test_an_empty_folder_may_be_the_destination(tmp_path, tool):
    (tmp_path / 'out').mkdir()
    source = write_folder(tmp_path / 's', {'a.png': encode(make_image())})
    assert tool(source, tmp_path / 'out')[0] == 0
    assert len(read_output(tmp_path / 'out')) == 2


def write_idx(path, pixels):
    header = bytes([0, 0, 8, pixels.ndim]) + np.array(pixels.shape, dtype='>u4').tobytes()
    path.write_bytes(gzip.compress(header + pixels.tobytes()))


def test_mnist_of_any_length_is_read(tmp_path, tool):
    digits = make_image(0, 5 * 28, 28, 1).reshape(5, 28, 28)
    write_idx(tmp_path / 'train-images-idx3-ubyte.gz', digits)
    write_idx(tmp_path / 'train-labels-idx1-ubyte.gz', np.uint8([3, 1, 4, 1, 5]))
    assert tool(tmp_path / 'train-images-idx3-ubyte.gz', tmp_path / 'out')[0] == 0
    dataset = ImageFolderDataset(str(tmp_path / 'out'), use_labels=True)
    np.testing.assert_array_equal(dataset[4][0], np.pad(digits[4], 2)[None])
    assert dataset.get_details(2).raw_label == 4


@pytest.mark.parametrize('damage', ['labels missing', 'labels short', 'truncated', 'no gzip', 'other magic'])
def test_damaged_mnist_is_refused(tmp_path, tool, damage):
    images, labels = tmp_path / 'train-images-idx3-ubyte.gz', tmp_path / 'train-labels-idx1-ubyte.gz'
    write_idx(images, np.zeros([3, 28, 28], dtype=np.uint8))
    if damage != 'labels missing':
        write_idx(labels, np.zeros(2 if damage == 'labels short' else 3, dtype=np.uint8))
    if damage == 'truncated':
        images.write_bytes(images.read_bytes()[:-20])
    if damage == 'no gzip':
        images.write_bytes(b'hello')
    if damage == 'other magic':
        write_idx(images, np.zeros([3, 28], dtype=np.uint8))
    status, output = tool(images, tmp_path / 'out')
    assert status == 2 and 'ubyte.gz' in output and not (tmp_path / 'out').exists()


@pytest.mark.skipif(not MNIST.is_dir(), reason='no real MNIST beside the checkout')
def test_real_mnist_becomes_a_dataset(tmp_path, tool):
    count = SERIAL_BELOW - 1
    assert tool(MNIST / 'train-images-idx3-ubyte.gz', tmp_path / 'm.zip',
                '--max-images', count)[0] == 0
    dataset = ImageFolderDataset(str(tmp_path / 'm.zip'), resolution=32, use_labels=True)
    assert len(dataset) == count and dataset.label_dim == 10 and dataset[0][0].max() > 250


def write_cifar(path, batches):
    with tarfile.open(path, 'w:gz') as archive:
        for i, data in enumerate(batches, start=1):
            member = tarfile.TarInfo(f'cifar-10-batches-py/data_batch_{i}')
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def cifar_batch(seed, count=2):
    return {'data': make_image(seed, count, 3072, 1)[:, :, 0], 'labels': [seed] * count}


def test_cifar_of_any_length_is_read(tmp_path, tool):
    batches = [pickle.dumps(cifar_batch(i), protocol=2) for i in range(5)]
    source = write_cifar(tmp_path / 'cifar-10-python.tar.gz', batches)
    assert tool(source, tmp_path / 'out')[0] == 0
    dataset = ImageFolderDataset(str(tmp_path / 'out'), use_labels=True)
    np.testing.assert_array_equal(dataset[7][0], cifar_batch(3)['data'][1].reshape(3, 32, 32))
    assert len(dataset) == 10 and dataset.get_details(7).raw_label == 3


class Hostile:
    """Calls a function when it is unpickled by the ordinary unpickler."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('damage', [
    'hostile', 'pointer', 'four batches', 'truncated', 'no tar', 'floats', 'no labels', 'table of labels'])
def test_damaged_or_hostile_cifar_is_refused_and_runs_nothing(tmp_path, tool, damage):
    batches = [cifar_batch(i) for i in range(5)]
    if damage == 'hostile':
        batches[2] = {'data': Hostile(os.mkdir, str(tmp_path / 'marker')), 'labels': []}
    if damage == 'pointer':
        batches[2]['data'] = Hostile(np.ndarray, (1,), 'O', b'12345678')
    if damage == 'table of labels':
        batches[1]['labels'] = np.zeros([2, 1], dtype=np.int64)
    if damage == 'floats':
        batches[0]['data'] = batches[0]['data'].astype(np.float32)
    if damage == 'no labels':
        del batches[4]['labels']
    dumped = [pickle.dumps(batch, protocol=2) for batch in batches]
    if damage == 'four batches':
        dumped.pop()
    source = write_cifar(tmp_path / 'cifar-10-python.tar.gz', dumped)
    if damage == 'truncated':
        source.write_bytes(source.read_bytes()[:3000])
    if damage == 'no tar':
        source.write_bytes(b'hello')
    status, output = tool(source, tmp_path / 'out')
    assert status == 2 and 'not the CIFAR-10 archive' in output
    assert os.listdir(tmp_path) == [source.name]


def test_damaged_lsun_entries_are_skipped_and_named(tmp_path, tool):
    lmdb = pytest.importorskip('lmdb')
    turned = Image.Exif()
    turned[0x0112] = 3
    entries = {b'k0': encode(make_image(0)), b'k1': b'junk', b'k2': encode(make_image(2, 8, 8, 1)),
               b'k3': encode(make_image(3, 8, 8, 4)), b'k4': encode(make_image(4), exif=turned)}
    with lmdb.open(str(tmp_path / 'x_lmdb')) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    status, output = tool(f'{tmp_path}/x_lmdb/', tmp_path / 'out')
    assert status == 0 and 'key k1 cannot be decoded' in output
    dataset = ImageFolderDataset(str(tmp_path / 'out'))
    assert len(dataset) == 4 and dataset.image_shape == [3, 8, 8]
    np.testing.assert_array_equal(dataset[1][0], make_image(2, 8, 8, 1).transpose(2, 0, 1).repeat(3, 0))
    np.testing.assert_array_equal(dataset[2][0], make_image(3, 8, 8, 4)[:, :, :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(dataset[3][0], make_image(4)[::-1, ::-1].transpose(2, 0, 1))


def test_a_refused_lsun_database_can_be_read_again_by_the_same_process(tmp_path, tool):
    lmdb = pytest.importorskip('lmdb')
    with lmdb.open(str(tmp_path / 'x_lmdb')) as database, database.begin(write=True) as transaction:
        transaction.put(b'k', encode(make_image(0, 8, 12)))
    status, output = tool(tmp_path / 'x_lmdb', tmp_path / 'out')
    assert status == 2 and 'not square' in output
    assert tool(tmp_path / 'x_lmdb', tmp_path / 'out', '--width=8', '--height=8')[0] == 0


def test_a_folder_that_is_no_database_is_refused(tmp_path, tool):
    pytest.importorskip('lmdb')
    (tmp_path / 'x_lmdb').mkdir()
    status, output = tool(tmp_path / 'x_lmdb', tmp_path / 'out')
    assert status == 2 and 'not an LMDB database' in output and os.listdir(tmp_path / 'x_lmdb') == []


def test_resolution_is_another_spelling_of_width_and_height(tmp_path, capsys):
    source = write_folder(tmp_path / 'in', {'a.png': encode(make_image(height=64, width=64))})
    status, _ = run_tool(capsys, source, tmp_path / 'out.zip', '--resolution=32x16', '--any-shape')
    assert status == 0 and ImageFolderDataset(str(tmp_path / 'out.zip')).image_shape == [3, 16, 32]
    refused = (('--width=32', '--resolution excludes --width'), ('--resolution=0x8', 'is not a size'))
    for more, words in refused:
        status, output = run_tool(capsys, source, tmp_path / 'b.zip', '--resolution=32x32', more)
        assert status == 2 and words in output and not (tmp_path / 'b.zip').exists()
