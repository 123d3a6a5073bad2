# SPDX-License-Identifier: Apache-2.0
"""Labels in words, and that every kind of label trains."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
from metrics_stand_in import write_detectors
from small_networks import last_snapshot

from legacy import load_network
from training import training_loop
from training.capacity import dry_run
from training.capacity.dry_run import describe_labels, ignored_labels_notice, label_kind, notes
from training.config import DatasetInfo, resolve
from training.dataset import ImageFolderDataset
from training.report import sheet

KINDS = {
    'class numbers': [0, 2, 2, 1, 0, 2],
    'one-hot': [[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]],
    'multi-hot': [[1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]],
    'floats': [[0.5, -2.0], [0.25, 1.0], [0, 0], [0, 0], [0, 0], [1, 0]],
}


def write(folder, labels, count=None):
    """A folder of 8x8 images, the first of them with these labels."""
    folder.mkdir(exist_ok=True)
    for i in range(len(labels) if count is None else count):
        pixels = np.random.default_rng(i).integers(0, 256, [8, 8, 3], dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f'{i}.png')
    pairs = [[f'{i}.png', label] for i, label in enumerate(labels)]
    (folder / 'dataset.json').write_text(json.dumps({'labels': pairs or None}))
    return str(folder)


def describe(folder, labels, **kwargs):
    return describe_labels(ImageFolderDataset(write(folder, labels), use_labels=True, **kwargs))


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_is_told_from_the_others(kind, tmp_path):
    labels = np.array(KINDS[kind], dtype=np.int64 if kind == 'class numbers' else np.float32)
    assert label_kind(labels) == kind
    first = describe(tmp_path, KINDS[kind])[0]
    classes = f'Labels: 3 classes, given as {kind}'
    assert first.startswith('Labels: vectors of 2 numbers, -2 to 1' if kind == 'floats' else classes)


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_trains(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, 'CPU_GRID_IMAGES', 4)
    labels = KINDS[kind]
    path = write(tmp_path / 'data', labels)
    length = 2 if kind == 'floats' else 3
    info = DatasetInfo(path, len(labels), 8, 8, 3, has_labels=True, label_dim=length)
    config = resolve({'outdir': 'unused', 'data': path, 'cfg': 'demo', 'batch': 2, 'cbase': 16, 'cmax': 4,
                      'device': 'cpu', 'metrics': 'none', 'workers': 0, 'cond': True}, info)
    run_dir = tmp_path / 'run'
    run_dir.mkdir()
    training_loop.train(dataclasses.replace(config, run_dir=str(run_dir), total_kimg=0.004))
    G = load_network(last_snapshot(run_dir)).G
    assert G.c_dim == length and all(p.isfinite().all() for p in G.parameters())


def test_images_per_class_are_counted_without_mirror_images(tmp_path):
    for kind, expected in (('class numbers', '0: 2, 1: 1, 2: 3'), ('multi-hot', '0: 2, 1: 2, 2: 4')):
        lines = describe(tmp_path, KINDS[kind], xflip=True)
        assert lines[1] == f'Images per class: {expected}'
    assert lines[-1].startswith('1 images belong to no class')


def test_many_classes_are_cut_short_and_missing_ones_named(tmp_path):
    lines = describe(tmp_path, [0, 1, 19])
    assert lines[0] == 'Labels: 20 classes, given as class numbers'
    assert lines[1].endswith('11: 0, and 8 more')
    assert lines[2].startswith('17 classes have no images, the first is 2')


def test_a_class_that_is_much_larger_than_another_is_said(tmp_path):
    assert 'The largest class has 11 times as many' in describe(tmp_path / 'a', [0] * 11 + [1])[-1]
    assert len(describe(tmp_path / 'b', [0] * 10 + [1])) == 2


def test_no_labels_and_unusable_ones_are_a_line_each(tmp_path):
    dataset = ImageFolderDataset(write(tmp_path / 'a', [], count=2), use_labels=True)
    assert describe_labels(dataset) == ['Labels: none'] and ignored_labels_notice(dataset) is None
    dataset = ImageFolderDataset(write(tmp_path / 'b', [0], count=3), use_labels=True)
    (line,) = describe_labels(dataset)
    assert line.startswith('Labels: cannot be used: ')
    assert '2 of 3 images have no label, the first is 1.png' in line
    assert 'cannot be used' in ignored_labels_notice(dataset)


def test_labels_that_are_not_used_get_a_frame(tmp_path):
    dataset = ImageFolderDataset(write(tmp_path, KINDS['class numbers']), use_labels=True)
    lines = ignored_labels_notice(dataset).splitlines()
    assert len({len(line) for line in lines}) == 1 and set(lines[0]) == {'*'}
    assert '--cond=1' in '\n'.join(lines) and 'Labels: 3 classes' in '\n'.join(lines)


@pytest.mark.parametrize('preset, words', [
    ('dcgan', 'choose another --cfg than dcgan'), ('demo', 'add --cond=1')])
def test_nothing_is_advised_that_the_preset_refuses(tmp_path, preset, words):
    dataset = ImageFolderDataset(write(tmp_path, KINDS['class numbers']), use_labels=True)
    notice = ' '.join(line.strip('* ') for line in ignored_labels_notice(dataset, preset).splitlines())
    assert words in notice


def test_missing_feature_networks_are_one_note_and_found_ones_none(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    flags = {'outdir': 'o', 'data': 'x.zip', 'cfg': 'demo', 'device': 'cpu',
             'metrics': 'fid50k_full,pr50k3_full,swd'}
    monkeypatch.setattr(dry_run, '_busy_cores', lambda: None)
    dataset = DatasetInfo('x.zip', 10, 16, 16)
    config = resolve(flags, dataset)
    (note,) = notes(config, dataset, is_estimated=True)
    assert note.startswith('fid50k_full, pr50k3_full: inception-2015-12-05.pt and vgg16.pt not found')
    for change in ({'detector_dir': write_detectors(tmp_path / 'detectors')}, {'metrics': ('swd',)}):
        assert notes(dataclasses.replace(config, **change), dataset, is_estimated=True) == []
