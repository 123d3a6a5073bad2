# SPDX-License-Identifier: Apache-2.0
"""Batches survive what happens to their workers and say what happened to their files."""
import itertools
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from dataset_cases import encode, make_image
from PIL import Image

from dnnlib.util import UserError
from training import batches
from training.dataset import ImageFolderDataset

CPU = torch.device('cpu')


@pytest.fixture
def folder(tmp_path):
    """Ten 8x8 images."""
    for i in range(10):
        (tmp_path / f'{i}.png').write_bytes(encode(Image.fromarray(make_image(i, 8, 8))))
    return tmp_path


def read(folder, **kwargs):
    return batches.Batches(ImageFolderDataset(str(folder)), 4, CPU, **{'cache': 'off', **kwargs})


def take(stream, count):
    return [img for img, _ in itertools.islice(stream, count)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_all_ways_to_read_give_the_same_from_any_position(folder):
    expected = take(iter(read(folder, cache='ram', start=12)), 5)
    assert same(expected, take(iter(read(folder, start=12)), 5))
    assert same(expected, take(iter(read(folder, start=12, num_workers=2)), 5))
    assert same(expected, take(iter(read(folder, start=0)), 8)[3:])


@pytest.mark.parametrize('rank', [0, 1])
def test_images_on_the_device_come_in_the_same_order_mirrored_ones_included(folder, rank):
    labels = {'labels': [[f'{i}.png', i % 3] for i in range(10)]}
    (folder / 'dataset.json').write_text(json.dumps(labels))
    kwargs = {'start': 6, 'rank': rank, 'num_replicas': 2, 'cache': 'ram'}
    stream = batches.Batches(
        ImageFolderDataset(str(folder), xflip=True, use_labels=True, max_size=7), 4, CPU, **kwargs)
    expected = list(itertools.islice(stream, 9))
    stream.resident = batches.ResidentImages(stream.dataset, CPU)
    assert stream.resident.pixels.shape == (7, 3, 8, 8)
    for (img, c), (same_img, same_c) in zip(expected, itertools.islice(stream, 9), strict=True):
        assert torch.equal(img, same_img) and torch.equal(c, same_c) and c.shape == (4, 3)


GIB = 2 ** 30


@pytest.mark.parametrize('cache, size, free, chosen', [
    ('auto', 1, 60, 'gpu'), ('auto', 9, 60, 'ram'), ('auto', 3, 4, 'ram'), ('auto', 99, 60, 'off'),
    ('gpu', 30, 60, 'gpu'), ('ram', 1, 60, 'ram'), ('off', 1, 60, 'off')])
def test_where_decoded_images_stay_on_a_machine_with_a_gpu(monkeypatch, cache, size, free, chosen):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(batches, 'fits_in_ram', lambda num_bytes: num_bytes <= 10 * GIB)
    assert batches._decided(cache, size * GIB, torch.device('cuda')) == chosen


def test_what_cannot_stay_on_a_gpu_is_refused(monkeypatch, folder):
    with pytest.raises(UserError, match='--cache=gpu: the device is cpu; use --cache=ram'):
        read(folder, cache='gpu')
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (4 * GIB, 80 * GIB))
    with pytest.raises(UserError, match=r'take 5\.0 GiB, but only 4\.0 GiB'):
        batches._decided('gpu', 5 * GIB, torch.device('cuda'))


def test_two_processes_share_one_stream(folder):
    whole = take(iter(read(folder)), 2)
    parts = [take(iter(read(folder, rank=rank, num_replicas=2, start=0)), 1)[0] for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), torch.cat(whole))


def test_a_killed_worker_is_replaced_and_nothing_is_lost(folder, capsys):
    expected = take(iter(read(folder)), 12)
    stream = iter(read(folder, num_workers=2))
    found = take(stream, 2)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    assert same(expected, found + take(stream, 10))
    output = capsys.readouterr().out
    assert output.count('A data loader process died') == 1 and '\n' not in output.strip()


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no signals here')
def test_workers_that_are_stopped_are_replaced_after_a_time_and_nothing_is_lost(folder, capsys, monkeypatch):
    expected = take(iter(read(folder)), 12)
    stream = iter(read(folder, num_workers=2))
    found = take(stream, 2)
    stopped = multiprocessing.active_children()
    for worker in stopped:
        os.kill(worker.pid, signal.SIGSTOP)
    monkeypatch.setattr(batches, 'STALL_SEC', 2)
    found += take(stream, 5)  # more than what may have been sent before
    monkeypatch.undo()
    assert same(expected, found + take(stream, 5))
    output = capsys.readouterr().out
    assert 'sent nothing for 2 seconds' in output and 'A data loader process died' in output
    assert not any(worker.is_alive() for worker in stopped)


def test_a_death_is_noticed_at_the_next_batch_and_not_in_between(folder):
    stream = iter(read(folder, num_workers=1))
    next(stream)
    handler = signal.getsignal(signal.SIGCHLD)
    assert not getattr(handler, '__module__', '').startswith('torch.utils.data')


def test_workers_that_keep_dying_end_the_run_in_one_line(folder, monkeypatch):
    def die(self, position):
        raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed. ')
        yield
    monkeypatch.setattr(batches.Batches, '_load', die)
    with pytest.raises(UserError, match=r'--workers=2: workers die repeatedly \(.* Killed\)'):
        next(iter(read(folder, num_workers=2)))


def test_other_errors_are_not_taken_for_dead_workers(folder, monkeypatch):
    def fail(self, position):
        raise RuntimeError('something else')
        yield
    monkeypatch.setattr(batches.Batches, '_load', fail)
    with pytest.raises(RuntimeError, match='something else'):
        next(iter(read(folder, num_workers=1)))


@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize('damage', ['corrupt', 'gone', 'resized'])
def test_an_image_spoilt_after_the_start_is_named_in_one_line(folder, num_workers, damage):
    stream = iter(read(folder, num_workers=num_workers))
    next(stream)
    path = folder / '7.png'
    if damage == 'gone':
        path.unlink()
    elif damage == 'resized':
        path.write_bytes(encode(Image.fromarray(make_image(0, 16, 8))))
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xff
        path.write_bytes(data)
    with pytest.raises(UserError, match=r'--data: .*7\.png') as caught:
        take(stream, 20)
    assert '\n' not in str(caught.value)


def test_labels_come_along_with_their_images(folder):
    labels = [[f'{i}.png', i % 3] for i in range(10)]
    (folder / 'dataset.json').write_text(json.dumps({'labels': labels}))
    dataset = ImageFolderDataset(str(folder), use_labels=True)
    for workers in (0, 1):
        img, c = next(iter(batches.Batches(dataset, 10, CPU, cache='off', num_workers=workers)))
        for i in range(10):
            found = (img - torch.from_numpy(dataset[i][0]) / 127.5 + 1).abs().flatten(1).amax(1).argmin()
            np.testing.assert_array_equal(c[found], dataset[i][1])


def test_made_up_labels_are_drawn_from_those_of_the_dataset(folder):
    dataset = ImageFolderDataset(str(folder))
    assert batches.draw_labels(dataset, 3, np.random.default_rng(0)).shape == (3, 0)


def test_only_datasets_that_are_small_for_the_machine_go_into_memory():
    assert batches.fits_in_ram(0) and not batches.fits_in_ram(10 ** 15)


@pytest.mark.parametrize('workers', [0, 2])
def test_processes_share_the_stream_without_overlap_whatever_reads_it(workers):
    class Numbers(torch.utils.data.Dataset):
        num_bytes = 0

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return np.full([1, 1, 1], index, dtype=np.uint8), np.zeros([0], dtype=np.float32)

    def stream(rank, size, count):
        found = iter(batches.Batches(Numbers(), 2, torch.device('cpu'), seed=1, rank=rank, num_replicas=size,
                                     cache='off', num_workers=workers))
        return [round(float(x + 1) * 127.5) for _ in range(count) for x in next(found)[0].flatten()]
    alone = stream(0, 1, 12)
    parts = [stream(rank, 3, 4) for rank in range(3)]
    # Two epochs, each of which shows every image once.
    assert [x for row in zip(*parts, strict=True) for x in row] == alone
    assert sorted(alone[:12]) == sorted(alone[12:]) == list(range(12))


def test_one_of_several_processes_shows_what_is_read(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(
        ImageFolderDataset, 'preload', lambda self, show_progress: shown.append(show_progress))
    for rank in (0, 1):
        read(folder, cache='ram', rank=rank, num_replicas=2)
    assert shown == [True, False]
