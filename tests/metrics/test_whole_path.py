# SPDX-License-Identifier: Apache-2.0
"""From images and networks to numbers, with small feature networks that stand in for the real ones."""
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from metrics_stand_in import small_dataset, write_detectors, write_images
from small_networks import small_generator

from dnnlib.util import UserError
from metrics import feature_stats, metric_main
from metrics.data_key import data_key, whole_dataset
from metrics.metric_main import calc_metric, register_row
from metrics.metric_utils import FittingBatch, MetricOptions, all_processes
from torch_utils import distributed
from training.dataset import ImageFolderDataset

CPU = torch.device('cpu')
SMALL = ('fid_small', 'kid_small', 'pr_small', 'dc_small', 'is_small', 'ppl_w', 'ppl_z')


def register_small():
    """The metrics of the paper on so few images that a test can wait for them."""
    register_row(metric_main.fid, 'fid_small', 150)
    register_row(metric_main.fid, 'fid_some', 150, 20)
    register_row(metric_main.kid, 'kid_small', 150)
    register_row(metric_main.manifold, 'pr_small', *metric_main.PRECISION_RECALL, 150)
    register_row(metric_main.manifold, 'dc_small', *metric_main.DENSITY_COVERAGE, 150)
    register_row(metric_main.inception, 'is_small', 150)
    register_row(metric_main.ppl, 'ppl_w', 40, space='w', full=False, crop=False)
    register_row(metric_main.ppl, 'ppl_z', 40, space='z', full=True, crop=True)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(metric_main, '_METRICS', dict(metric_main._METRICS))
    register_small()
    return {'G': small_generator(), 'dataset': small_dataset(tmp_path / 'data', 70), 'device': CPU,
            'detector_dir': write_detectors(tmp_path / 'detectors')}


def measure(out_dir, data_dir, detector_dir):
    """One of two processes: all small metrics, written by the first."""
    register_small()
    distributed.join('cpu')
    dataset = ImageFolderDataset(data_dir)
    results = {}
    for name in SMALL:
        results.update(calc_metric(name, G=small_generator(), dataset=dataset, device=CPU,
                                   detector_dir=detector_dir, share=all_processes()).results)
    if distributed.rank() == 0:
        with open(f'{out_dir}/results.json', 'w', encoding='utf-8') as file:
            json.dump(results, file)
    distributed.leave()


def all_results(options):
    return {key: value for name in SMALL for key, value in calc_metric(name, **options).results.items()}


def test_two_processes_find_what_one_finds_and_so_does_the_next_time(options, tmp_path, monkeypatch):
    first = all_results(options)
    assert len(first) == 10 and all(np.isfinite(value) for value in first.values())
    assert first['fid_small'] > 0 and first['ppl_w'] > 0 and first['ppl_z'] > 0
    assert all_results(options) == first, 'from cached features'
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'empty'))
    # Started afresh, each process would import PyTorch for seconds.
    monkeypatch.setattr(distributed, 'START_METHOD', 'fork')
    distributed.launch(measure, (str(tmp_path), str(tmp_path / 'data'), options['detector_dir']), 2)
    both = json.loads((tmp_path / 'results.json').read_text())
    assert both == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize(('channels', 'shape'), [(1, (16, 16)), (2, (16, 24)), (4, (24, 16))])
def test_gray_transparent_and_oblong_images_count_as_shown(options, tmp_path, channels, shape):
    own = ImageFolderDataset(write_images(tmp_path / 'own', 12, channels, shape))
    G = small_generator(img_channels=channels, img_resolution=shape)
    for name in ('fid_small', 'pr_small', 'ppl_w'):
        results = calc_metric(name, **{**options, 'G': G, 'dataset': own}).results
        assert all(np.isfinite(value) for value in results.values()), name
    (tmp_path / 'shown').mkdir()
    for path in (tmp_path / 'own').iterdir():
        image = PIL.Image.open(path).convert('RGBA')
        white = PIL.Image.new('RGBA', image.size, 'white')
        PIL.Image.alpha_composite(white, image).convert('RGB').save(tmp_path / 'shown' / path.name)
    sets = own, ImageFolderDataset(str(tmp_path / 'shown'))
    stats = [feature_stats.real_statistics(MetricOptions(**options), dataset, metric_main.MOMENTS)
             for dataset in sets]
    means = [of_set.mean_cov()[0] for of_set in stats]
    # As a viewer shows them; Pillow may round the mixture to the other side: by one of 256 levels.
    np.testing.assert_allclose(*means, atol=1 / 128 if channels in (2, 4) else 0)


def test_another_seed_gives_another_number(options):
    assert calc_metric('fid_small', seed=1, **options).results != calc_metric('fid_small', **options).results


def test_the_sums_are_those_of_all_features(options):
    dataset = options['dataset']
    mo = MetricOptions(**options)
    sums = feature_stats.real_statistics(mo, dataset, metric_main.MOMENTS)
    rows = feature_stats.real_statistics(mo, dataset, metric_main.POOLED).features().double().numpy()
    mean, cov = sums.mean_cov()
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(rows.T, bias=True), rtol=1e-5, atol=1e-9)


def test_cached_features_know_number_and_content_of_the_images(options, tmp_path):
    cache = tmp_path / 'cache' / 'gan-metrics'
    whole, some = [calc_metric(name, **options).results[name] for name in ('fid_small', 'fid_some')]
    assert whole != some and len(list(cache.glob('data-inception-2015-12-05-*.npz'))) == 2
    before = data_key(options['dataset'])
    options['dataset'] = small_dataset(tmp_path / 'data', 69)
    shutil.copyfile(tmp_path / 'data' / '000.png', tmp_path / 'data' / '001.png')
    assert data_key(options['dataset']) != before
    assert calc_metric('fid_small', **options).results['fid_small'] != whole
    assert len(list(cache.iterdir())) == 3 and not list(cache.glob('.*'))


def test_a_damaged_or_unwritable_cache_costs_time_only(options, tmp_path, capsys):
    first = calc_metric('fid_small', **options).results
    for path in (tmp_path / 'cache' / 'gan-metrics').iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert calc_metric('fid_small', **options).results == first
    shutil.rmtree(tmp_path / 'cache')
    (tmp_path / 'cache').write_text('in the way')
    assert calc_metric('fid_small', **options).results == first
    assert 'not cached' in capsys.readouterr().out


def test_a_folder_and_its_zip_have_one_key(tmp_path):
    dataset = small_dataset(tmp_path / 'data', 4)
    shutil.make_archive(str(tmp_path / 'x'), 'zip', tmp_path / 'data')
    assert data_key(type(dataset)(str(tmp_path / 'x.zip'))) == data_key(dataset)
    assert data_key(type(dataset)(str(tmp_path / 'x.zip'), xflip=True)) != data_key(dataset)


def test_full_metrics_see_every_image_even_if_training_saw_some(tmp_path):
    some = small_dataset(tmp_path / 'data', 9, max_size=3, xflip=True)
    some.preload(show_progress=False)
    whole, mirrored = whole_dataset(some), whole_dataset(some, keep_xflip=True)
    assert len(some) == 6 and len(whole) == 9 and len(mirrored) == 18
    plain = type(some)(str(tmp_path / 'data'))
    assert all(np.array_equal(whole[i][0], plain[i][0]) for i in range(9))
    assert np.array_equal(mirrored[9][0], plain[0][0][:, :, ::-1])


def test_a_path_length_leaves_the_generator_as_it_is(options):
    before = {name: buffer.clone() for name, buffer in options['G'].named_buffers()}
    calc_metric('ppl_w', **options)
    assert all(torch.equal(before[name], buffer) for name, buffer in options['G'].named_buffers())


def test_a_batch_is_halved_until_it_fits():
    def double(x):
        if len(x) > 3:
            raise torch.OutOfMemoryError('too many')
        return 2 * x
    fitting = FittingBatch(8)
    assert torch.equal(fitting(double, torch.arange(10)), 2 * torch.arange(10)) and fitting.size == 2
    with pytest.raises(UserError, match='not even one image'):
        FittingBatch(1)(lambda x: double(torch.zeros(4)), torch.zeros(1))
