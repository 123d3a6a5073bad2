# SPDX-License-Identifier: Apache-2.0
"""Projection: recorded numbers, pictures that are found again, batches, schedules and early ends."""
import copy
import math
import zipfile

import numpy as np
import pytest
import torch
from golden_cases import arrays, cases, golden_dir
from small_networks import small_generator

import projector
from dnnlib.image_io import to_uint8
from dnnlib.util import UserError
from legacy import load_network
from training.dataset import find_dataset
from training.datasets.images import convert_mode, decode_image
from training.projection import search
from training.projection.distance import Distance, pixel_distance, psnr
from training.projection.files import fit_target
from training.projection.search import (
    ProjectionSettings,
    Projector,
    Schedule,
    noise_maps,
    replaced_noise,
    w_statistics,
)
from training.projection.tuning import tune

NPZ = 'projector.npz'
CPU = torch.device('cpu')
SCHEDULE = ['num_steps', 'initial_learning_rate', 'initial_noise_factor', 'lr_rampdown_length',
            'lr_rampup_length', 'noise_ramp_length']


def recorded(key):
    return arrays(NPZ)[key]


def recorded_network(name):
    path = golden_dir() / 'official_pickle' / name
    if not path.is_file():
        pytest.skip(f'{path} is not in this folder of cases')
    return load_network(path).G_ema


@pytest.mark.parametrize('case', cases('projector', 'schedules'))
def test_recorded_schedule(case):
    schedule = Schedule(**{name: case[name] for name in SCHEDULE})
    steps = range(schedule.num_steps)
    np.testing.assert_allclose([schedule.learning_rate(k) for k in steps], recorded(case['lr']), rtol=1e-6)
    np.testing.assert_allclose(
        [schedule.noise_factor(k) for k in steps], recorded(case['noise_factor']), rtol=1e-6, atol=1e-12)
    assert list(search.BETAS) == case['adam']['betas']


@pytest.mark.parametrize('case', cases('projector', 'w_stats'))
def test_recorded_statistics_of_w(case, monkeypatch):
    monkeypatch.setattr(search, 'W_SAMPLES_SEED', case['seed'])
    G = recorded_network(case['network'])
    found = w_statistics(G, torch.zeros([1, G.c_dim]), case['samples'])
    np.testing.assert_allclose(found.w_avg, recorded(case['w_avg']), atol=1e-4, rtol=0)
    assert found.w_std == pytest.approx(case['w_std'], rel=1e-4)


@pytest.mark.parametrize('case', cases('projector', 'trajectories'))
def test_recorded_trajectory(case):
    G, target = recorded_network(case['network']), torch.from_numpy(recorded(case['target']))

    def features(images):
        return torch.nn.functional.avg_pool2d(images / 255, case['pool']).flatten(1)
    distance = Distance('recorded', features, lambda a, b: (a - b).square().sum(dim=-1))
    settings = {name: case[name] for name in SCHEDULE if name in case}
    schedule = Schedule(**settings)
    found = Projector(G, distance, ProjectionSettings(schedule)).project(target[None])[0]
    dist, ws = recorded(case['dist']), recorded(case['w'])
    assert (np.abs(found.distances - dist) <= 0.02 * dist + 1e-3).all()
    np.testing.assert_allclose(found.path, ws, atol=0.02, rtol=0)
    # The published call is the same.
    path = projector.project(G, target, **settings, device=CPU, distance=distance)
    assert torch.equal(path, found.path)


@pytest.fixture(scope='module')
def G():
    """A generator of 16x16 pictures in which noise is seen a little, as in trained ones."""
    found = small_generator().requires_grad_(False)
    for name, parameter in found.named_parameters():
        if name.endswith('noise_strength'):
            parameter.fill_(0.05)
    return found


def render(G, ws, noise=None):
    """uint8 [N, C, H, W] of ws [N, num_ws, w_dim]."""
    with torch.no_grad(), replaced_noise(G.synthesis, noise or {}):
        return to_uint8(G.synthesis(ws, noise_mode='const', force_fp32=True))


def own_pictures(G, *seeds):
    """Pictures of z of these seeds, uint8 [N, C, H, W], and their ws."""
    z = torch.from_numpy(np.concatenate([np.random.RandomState(seed).randn(1, 8) for seed in seeds]))
    ws = G.mapping(z, None)
    return torch.from_numpy(render(G, ws)), ws


def run(G, targets, init_ws=None, num_steps=12, distance=None, **settings):
    settings = ProjectionSettings(Schedule(num_steps), **settings)
    return Projector(G, distance or pixel_distance(), settings, w_avg_samples=500).project(targets, init_ws)


def test_a_picture_of_the_network_is_found_again(G):
    targets, ws = own_pictures(G, 5)
    found = run(G, targets, num_steps=200)[0]
    assert psnr(render(G, found.ws[None], found.noise)[0], targets[0].numpy()) > 25
    assert psnr(render(G, found.ws[None])[0], targets[0].numpy()) > 25
    assert (found.ws - ws[0]).abs().max() < 0.1 * ws.abs().max()


def test_w_plus_beats_w_on_an_emoji_that_the_network_did_not_make(G):
    with zipfile.ZipFile(find_dataset('emoji32')) as archive:
        name = next(name for name in sorted(archive.namelist()) if name.endswith('.png'))
        emoji = fit_target(convert_mode(decode_image(archive.read(name)), 'RGB'), 16, 16)
    target = emoji.transpose(2, 0, 1)[None].copy()
    results = [run(G, torch.from_numpy(target), num_steps=80, space=space)[0] for space in ('w', 'w+')]
    w, wplus = (psnr(render(G, found.ws[None], found.noise)[0], target[0]) for found in results)
    assert wplus > w + 0.5
    assert (results[0].ws == results[0].ws[:1]).all() and not (results[1].ws == results[1].ws[:1]).all()


@pytest.mark.parametrize('space, noise', [('w', 'fit'), ('w+', 'redraw')])
def test_a_target_does_not_feel_its_company_and_a_seed_means_one_result(G, space, noise):
    targets, _ = own_pictures(G, 1, 2, 3)
    together = run(G, targets, space=space, noise=noise)
    alone = run(G, targets[1:2], space=space, noise=noise)[0]
    torch.testing.assert_close(together[1].path, alone.path, atol=1e-3, rtol=0)
    assert (together[1].path - together[2].path).abs().max() > 0.1
    assert torch.equal(run(G, targets[1:2], space=space, noise=noise)[0].path, alone.path)
    assert not torch.equal(run(G, targets[1:2], space=space, noise=noise, seed=1)[0].path, alone.path)


def test_noise_maps_are_fitted_redrawn_or_kept(G):
    targets, _ = own_pictures(G, 1)
    saved = {name: value.clone() for name, value in noise_maps(G.synthesis).items()}
    assert run(G, targets, noise='keep')[0].noise == {}
    fitted, redrawn = (run(G, targets, noise=noise)[0].noise for noise in ('fit', 'redraw'))
    assert fitted.keys() == redrawn.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(noise_maps(G.synthesis)[name], value)
        for maps in (fitted, redrawn):
            assert maps[name].mean().abs() < 1e-5 and maps[name].square().mean().item() == pytest.approx(1)
    name = 'b16.conv1.noise_const'
    pairs = [torch.corrcoef(torch.stack([saved[name].flatten(), x[name].flatten()]))[0, 1]
             for x in (fitted, redrawn)]
    assert pairs[0] > 0.7 > 0.3 > pairs[1].abs()


def test_it_begins_where_it_is_told(G):
    targets, ws = own_pictures(G, 1, 2)
    # The learning rate of step 0 is 0.
    for space in ('w', 'w+'):
        found = run(G, targets, init_ws=ws, num_steps=1, space=space)
        assert torch.equal(torch.stack([one.ws for one in found]), ws)
    average = w_statistics(G, None, 500).w_avg
    assert torch.equal(run(G, targets, num_steps=1)[0].ws, average[0].expand(G.num_ws, -1))


def test_patience_goes_to_the_ramp_down_and_then_ends(G):
    blind = Distance('blind', lambda images: images.mean(dim=(2, 3)) * 0, lambda a, b: (a - b).sum(dim=-1))
    targets, _ = own_pictures(G, 1, 2)
    found = run(G, targets, num_steps=40, patience=3, distance=blind)
    # Nothing is better than the first step: three in vain, and three more in the ramp-down.
    assert [len(one.path) for one in found] == [7, 7] or [len(one.path) for one in found] == [6, 6]
    assert len(run(G, targets, num_steps=8, patience=100)[0].path) == 8


def test_targets_end_by_themselves(G):
    targets, _ = own_pictures(G, 1, 2)
    average = w_statistics(G, None, 500).w_avg.expand(1, G.num_ws, -1)
    # The first is found before it begins; no step makes it better.
    first = torch.from_numpy(render(G, average))
    found = run(G, torch.cat([first, targets[1:]]), noise='keep', num_steps=60, patience=6)
    assert len(found[0].path) < len(found[1].path)


def test_the_schedule_goes_down_where_it_says():
    schedule = Schedule(100)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[0] == 0 and max(rates) == pytest.approx(0.1) and schedule.rampdown_start == 75
    assert rates[75] == pytest.approx(0.1) and rates[76] < rates[75] and 0 < rates[99] < 0.001
    assert [schedule.noise_factor(step) for step in (0, 75, 99)] == [0.05, 0, 0]


def test_labels_move_the_mean_w():
    G = small_generator(c_dim=3)
    labels = torch.eye(3)
    means = [w_statistics(G, label[None], 200) for label in labels]
    assert (means[0].w_avg - means[1].w_avg).abs().max() > 0.01 and means[0].w_std > 0


def test_a_network_that_overflows_is_one_clean_message(G):
    broken = copy.deepcopy(G)
    broken.synthesis.b8.conv1.weight.fill_(math.nan)
    with pytest.raises(UserError, match='not finite'):
        run(broken, own_pictures(G, 1)[0], num_steps=3)


def test_the_published_call_checks_the_target_and_leaves_the_network_alone(G):
    before = copy.deepcopy(G.state_dict())
    target = own_pictures(G, 1)[0][0]
    path = projector.project(G, target, num_steps=3, w_avg_samples=50, device=CPU, distance=pixel_distance())
    assert path.shape == (3, G.num_ws, 8)
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    with pytest.raises(ValueError, match=r'\[3, 16, 16\]'):
        projector.project(G, target[:, :8], device=CPU, distance=pixel_distance())


def test_too_many_at_once_for_the_memory_is_one_clean_message(G, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')
    targets = own_pictures(G, 1, 2)[0]
    monkeypatch.setattr(G.synthesis.b16, 'forward', full)
    with pytest.raises(UserError, match='--batch: 2 targets'):
        run(G, targets, num_steps=3)
    with pytest.raises(UserError, match='--tune: 2 targets'):
        tune(G, torch.zeros([2, G.num_ws, 8]), targets, pixel_distance(), 3, batch=2)
