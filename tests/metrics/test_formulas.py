# SPDX-License-Identifier: Apache-2.0
"""The formulas against recorded numbers, closed forms and properties that hold for any features."""
import math
import re

import numpy as np
import pytest
import torch
from golden_cases import arrays, cases

from metrics import formulas

NUMBER = r'([+-]?[\d.]+)'
FORMULA = (rf'x\[c,y,x\]=sin\({NUMBER}\*x{NUMBER}\*c\)\*cos\({NUMBER}\*y{NUMBER}\*c\) in float64, '
           'then float32')


def of_kind(kind):
    return cases('metrics', where=lambda case: case['kind'] == kind)


def moments(x):
    x = np.asarray(x, dtype=np.float64)
    return x.mean(axis=0), np.cov(x, rowvar=False, bias=True)


def gaussian(n=200, f=10, seed=0):
    return np.random.default_rng(seed).normal(size=[n, f])


@pytest.mark.parametrize('case', of_kind('features'))
def test_distances_of_recorded_features(case):
    data = arrays(case['file'])
    got = formulas.frechet_distance(*moments(data['real']), *moments(data['gen']))
    assert got == pytest.approx(case['fid_exact_float64'], rel=1e-5, abs=1e-5)
    rtol, atol = case['fid_tolerance']['rtol'], case['fid_tolerance']['atol']
    assert got == pytest.approx(case['fid'], rel=rtol, abs=atol)
    for row in case['kid']:
        kid = formulas.kernel_distance(data['real'], data['gen'], row['num_subsets'], row['max_subset_size'],
                                       np.random.RandomState(row['numpy_seed']))
        assert kid == pytest.approx(
            row['value'], rel=case['kid_tolerance']['rtol'], abs=case['kid_tolerance']['atol'])
    for row in case['precision_recall']:
        got = formulas.precision_recall(
            torch.from_numpy(data['real']), torch.from_numpy(data['gen']), row['nhood_size'])
        for value, key in zip(got, ('precision', 'recall'), strict=True):
            variants = [row[key + end] for end in ('', '_float64', '_half')]
            assert any(abs(value - variant) <= case['pr_tolerance'] for variant in variants)


@pytest.mark.parametrize('case', of_kind('inception_score'))
def test_inception_scores_of_recorded_probabilities(case):
    for row in case['results']:
        if not math.isfinite(float(row['mean'])):
            continue  # the published score of a probability of 0
        got = formulas.inception_score(arrays(case['file'])['probs'][:row['num_gen']], row['num_splits'])
        assert got == pytest.approx((row['mean'], row['std']), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize('case', of_kind('ppl_rejection'))
def test_path_lengths_of_recorded_distances(case):
    distances = arrays(case['file'])['dist'][:case['num_samples']]
    low, high = formulas.path_length_limits(distances)
    assert (low, high) == (case['lo'], case['hi'])
    assert ((distances >= low) & (distances <= high)).sum() == case['kept']
    assert formulas.path_length(distances) == pytest.approx(case['ppl'], rel=1e-5)


@pytest.mark.parametrize('case', of_kind('slerp'))
def test_spherical_interpolation_as_recorded(case):
    data = {key: torch.from_numpy(value) for key, value in arrays(case['file']).items()}
    got = formulas.slerp(data['a'], data['b'], data['t'][:, None])
    torch.testing.assert_close(got, data['out'], atol=1e-5, rtol=0)


@pytest.mark.parametrize('case', of_kind('ppl_image'))
def test_the_image_for_the_perceptual_network_as_recorded(case):
    size = case['img_resolution']
    c, y, x = np.ogrid[:case['img_channels'], :size, :size]
    formula = re.fullmatch(FORMULA, case['input_formula'])
    if formula is None:
        pytest.skip(f'an unknown formula: {case["input_formula"]}')
    along_x, phase_x, along_y, phase_y = map(float, formula.groups())
    waves = np.sin(along_x * x + phase_x * c) * np.cos(along_y * y + phase_y * c)
    img = torch.from_numpy(waves).float()[None]
    got = formulas.perceptual_image(img, crop=case['crop']).expand(-1, 3, -1, -1)[0]
    assert list(got.shape) == case['out_shape']
    torch.testing.assert_close(
        got, torch.from_numpy(arrays(case['file'])['image']).float(), atol=0.02, rtol=0)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    mean1, mean2, s1, s2 = np.zeros(4), np.full(4, 2.0), np.array([1., 4, 9, 0]), np.array([4., 4, 1, 1])
    expected = 16 + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert formulas.frechet_distance(mean1, np.diag(s1), mean2, np.diag(s2)) == pytest.approx(expected)


@pytest.mark.parametrize('n', [3, 50, 400], ids=['of rank 2', 'nearly singular', 'regular'])
def test_a_set_is_at_no_distance_from_itself_whatever_the_rank(n):
    mean, cov = moments(gaussian(n, 50) * np.logspace(0, -6, 50))
    assert formulas.frechet_distance(mean, cov, mean, cov) <= 1e-6 * np.trace(cov)


def test_the_frechet_distance_is_symmetric_and_agrees_with_a_matrix_square_root():
    linalg = pytest.importorskip('scipy.linalg')
    a, b = moments(gaussian()), moments(gaussian(seed=1) @ np.diag(np.arange(1, 11)) + 1)
    root = linalg.sqrtm(a[1] @ b[1]).real
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root)
    assert formulas.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-9)
    assert formulas.frechet_distance(*b, *a) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_is_around_zero_for_one_source_and_above_for_two():
    values = [formulas.kernel_distance(gaussian(seed=i), gaussian(seed=100 + i), 1, 1000,
                                       np.random.RandomState(0)) for i in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 40 ** 0.5 and min(values) < 0
    shifted = formulas.kernel_distance(gaussian(), gaussian(seed=1) + 1, 5, 100, np.random.RandomState(0))
    assert shifted > 10 * np.std(values)
    with pytest.raises(ValueError, match='at least 2'):
        formulas.kernel_distance(gaussian(1), gaussian(), 1, 10, np.random.RandomState(0))


def test_a_set_covers_itself_and_a_distant_one_not_at_all(monkeypatch):
    x = torch.from_numpy(gaussian())
    assert formulas.precision_recall(x, x) == (1, 1) == (formulas.density_coverage(x, x)[1], 1)
    assert formulas.precision_recall(x, x + 100) == (0, 0) == formulas.density_coverage(x, x + 100)
    y = torch.from_numpy(gaussian(150, seed=3)) * 0.8
    whole = formulas.precision_recall(x, y), formulas.density_coverage(x, y)
    monkeypatch.setattr(formulas, 'BLOCK_ROWS', 7)
    monkeypatch.setattr(formulas, 'BLOCK_COLUMNS', 11)
    assert whole == (formulas.precision_recall(x, y), formulas.density_coverage(x, y)), 'whatever the batches'
    with pytest.raises(ValueError, match='more than 3 samples'):
        formulas.precision_recall(x[:3], x)


def test_density_and_coverage_are_those_of_the_definition():
    real, fake = torch.from_numpy(gaussian(40, 3)), torch.from_numpy(gaussian(30, 3, seed=1))
    own = torch.cdist(real, real).sort(dim=1).values[:, 3]
    within = torch.cdist(fake, real) <= own
    assert formulas.density_coverage(real, fake) == pytest.approx(
        (within.sum().item() / 90, within.any(dim=0).double().mean().item()))


def test_classes_of_probability_zero_leave_the_score_a_number():
    assert formulas.inception_score(np.eye(4)[np.arange(40) % 4], 1) == pytest.approx((4, 0))
    with pytest.raises(ValueError, match='10 splits'):
        formulas.inception_score(np.eye(4))


def test_interpolation_between_equal_directions_stays_there():
    a = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(formulas.slerp(a, a, torch.tensor([[0.5]])), a / 5)


def test_images_of_any_shape_are_cropped_by_their_own_sides():
    assert formulas.perceptual_image(torch.zeros([1, 1, 64, 32]), crop=True).shape == (1, 1, 32, 16)
    assert formulas.perceptual_image(torch.ones([1, 1, 64, 32]), crop=False).unique().tolist() == [255]
