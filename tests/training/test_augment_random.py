# SPDX-License-Identifier: Apache-2.0
"""Distributions of the random augmentations over thousands of draws; the bounds notice an error of 10 %."""
import contextlib
import math

import numpy as np
import pytest
import torch
from golden_cases import cases

from training.augment import AugmentPipe

U = torch.tensor([0.5, 0.0, -0.5]) / math.sqrt(0.5)  # a direction of colour without luma
W = torch.linalg.cross(torch.ones(3) / math.sqrt(3), U)
LEVELS = [0.02, 0.10, 0.25, 0.50, 0.75, 0.90, 0.98]
MAX_DISCRETE = 64  # distinct values of a transform by whole pixels or quarter turns
UNIFORM_STD = math.pi / math.sqrt(3)  # of U(-pi, pi)


def augment(images, kwargs, p=1.0):
    pipe = AugmentPipe(**kwargs)
    pipe.p.fill_(p)
    return torch.cat([pipe(part) for part in images.split(1000)])


def flat(value, num, size=1):
    """Images of one colour: a number or [channels]."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).expand(num, -1, size, size)


def smooth(num, size):
    torch.manual_seed(1)
    small = torch.randn(1, 3, 4, 4)
    return torch.nn.functional.interpolate(small, [size, size], mode='bicubic').repeat(num, 1, 1, 1)


def std(x):
    return x.square().mean().sqrt().item()


def affine_maps(kwargs, num=1500, p=1.0, size=16):
    """Output -> input at the centre of each image: Jacobian [N, 2, 2] and offset [N, 2] in pixels."""
    position = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    images = torch.stack(torch.meshgrid(position, position, indexing='xy')).expand(num, 2, size, size)
    middle = augment(images, kwargs, p)[:, :, size // 2 - 1:size // 2 + 1, size // 2 - 1:size // 2 + 1]
    dx, dy = (middle[..., 1] - middle[..., 0]).mean(2), (middle[..., 1, :] - middle[..., 0, :]).mean(2)
    return torch.stack([dx, dy], dim=2).double(), middle.mean(dim=(2, 3)).double()


def turn(kwargs):
    jacobian, _ = affine_maps(kwargs)
    return torch.atan2(jacobian[:, 1, 0], jacobian[:, 0, 0])


def chroma(kwargs, num=8000, p=1.0, size=1):
    """Change of hue [N] in radians, and of saturation [N] in octaves."""
    out = augment(flat(U / math.sqrt(2), num, size), kwargs, p)[:, :, size // 2, size // 2]
    return torch.atan2(out @ W, out @ U), (out.norm(dim=1) * math.sqrt(2)).log2()


def band_gain(kwargs, band=3, num=2000):
    """Gain of a band before normalisation [N], and the factor of the normalisation in each axis [N].

    The constant lies in band 0, the finest stripes along x in band 3; both are filtered along y as well.
    """
    constant, stripes = torch.ones(8, 8), ((-1.0) ** torch.arange(8)).expand(8, 8)
    kwargs, gains = {**kwargs, 'imgfilter_bands': np.eye(4)[band].tolist()}, []
    for pattern in (constant, stripes):
        torch.manual_seed(0)
        gains.append((augment(pattern.expand(num, 1, 8, 8), kwargs) * pattern).mean(dim=(1, 2, 3)).double())
    t = gains[0] / gains[1] if band == 0 else gains[1] / gains[0]
    return t, (gains[1] / t).sqrt()


# name: what is measured with given settings, the setting to falsify, its value, what should be measured
# (proportional to the setting).
MEASUREMENTS = {
    'xint': (lambda k: std(affine_maps(k, num=500, size=40)[1]), 'xint_max', 0.125, 5 / math.sqrt(3)),
    'scale': (lambda k: std(-affine_maps(k)[0][:, 0, 0].log2()), 'scale_std', 0.2, 0.2),
    # At p = 1 both rotations happen.
    'rotate': (lambda k: std(turn(k)), 'rotate_max', 0.2, 0.2 * UNIFORM_STD * math.sqrt(2)),
    'aniso': (lambda k: std(-affine_maps(k)[0][:, 0, 0].log2()), 'aniso_std', 0.2, 0.2),
    'xfrac': (lambda k: std(affine_maps(k)[1]), 'xfrac_std', 0.1, 1.6),
    'brightness': (lambda k: std(augment(flat([0.0] * 3, 8000), k)), 'brightness_std', 0.2, 0.2),
    'contrast': (lambda k: std(augment(flat([1.0] * 3, 8000), k)[:, 0].log2()), 'contrast_std', 0.5, 0.5),
    'hue': (lambda k: std(chroma(k)[0]), 'hue_max', 0.8, 0.8 * UNIFORM_STD),
    'saturation': (lambda k: std(chroma(k)[1]), 'saturation_std', 1.0, 1.0),
    'imgfilter': (lambda k: std(band_gain(k)[0].log2()), 'imgfilter_std', 1.0, 1.0),
    'noise': (lambda k: std(augment(flat(0.0, 8000, 4), k)), 'noise_std', 0.1, 0.1),
    # The share of holes over the middle pixel is the square of the size.
    'cutout': (lambda k: std((augment(torch.ones(4000, 1, 9, 9), k)[:, 0, 4, 4] == 0).float()),
               'cutout_size', 0.5, 0.5),
}


@pytest.mark.parametrize('name', MEASUREMENTS)
def test_spread_is_that_of_the_definition_and_an_error_of_a_tenth_shows(name):
    function, setting, value, expected = MEASUREMENTS[name]
    assert function({name: 1, setting: value}) == pytest.approx(expected, rel=0.05)
    assert function({name: 1, setting: value * 1.1}) != pytest.approx(expected, rel=0.05)


def test_scaling_is_the_same_for_both_axes_and_without_bias():
    a, b, c, d = affine_maps({'scale': 1})[0].flatten(1).T
    torch.testing.assert_close(a, d, rtol=0, atol=1e-3)
    assert a.log2().mean().abs() < 0.03 and torch.stack([b, c]).abs().max() < 1e-3


def test_anisotropy_keeps_the_area():
    a, _, _, d = affine_maps({'aniso': 1})[0].flatten(1).T
    torch.testing.assert_close(a * d, torch.ones_like(a), rtol=0, atol=2e-3)


def test_rotation_keeps_area_and_angles_and_takes_any_direction():
    a, b, c, d = affine_maps({'rotate': 1})[0].flatten(1).T
    torch.testing.assert_close(a * d - b * c, torch.ones_like(a), rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.stack([a, b]), torch.stack([d, -c]), rtol=0, atol=2e-3)
    assert torch.stack([a, c]).mean(dim=1).abs().max() < 0.08


@pytest.mark.parametrize('name', ['xfrac', 'xint'])
def test_shifts_of_both_axes_are_independent_and_change_nothing_else(name):
    jacobian, offset = affine_maps({name: 1, 'xfrac_std': 0.05})
    assert np.corrcoef(offset.T)[0, 1] == pytest.approx(0, abs=0.12)
    assert offset.mean(dim=0).abs().max() < 0.15
    still = torch.eye(2, dtype=torch.float64).expand_as(jacobian)
    torch.testing.assert_close(jacobian, still, rtol=0, atol=2e-3)


def test_shifts_by_whole_pixels_are_whole():
    _, offset = affine_maps({'xint': 1})
    torch.testing.assert_close(offset, offset.round(), rtol=0, atol=1e-3)
    assert offset.round().abs().max() == 2  # an eighth of 16


def test_quarter_turns_are_equally_likely():
    jacobian, _ = affine_maps({'rotate90': 1}, num=4000)
    quarter = (torch.atan2(jacobian[:, 1, 0], jacobian[:, 0, 0]) * 2 / math.pi).round().long() % 4
    assert (torch.bincount(quarter, minlength=4) / 4000).tolist() == pytest.approx([0.25] * 4, abs=0.024)


def test_half_of_all_images_is_flipped_and_half_inverted():
    flipped = affine_maps({'xflip': 1}, num=4000)[0][:, 0, 0] < 0
    negative = augment(flat([0.5] * 3, 4000), {'lumaflip': 1})[:, 0] < 0
    for happened in (flipped, negative):
        assert happened.float().mean().item() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize('name', [
    'scale', 'rotate', 'xfrac', 'brightness', 'saturation', 'imgfilter', 'noise', 'cutout'])
@pytest.mark.parametrize('multiplier, p', [(1, 0.5), (0.6, 0.5), (1, 1.0), (3, 0.5)])
def test_probability_is_multiplier_times_p_and_saturates(name, multiplier, p):
    settings = {name: multiplier, 'cutout_size': 2.0, 'imgfilter_bands': [0, 1, 0, 0]}
    images = torch.randn(3, 4, 4).expand(4000, 3, 4, 4)
    changed = (augment(images, settings, p) != images).flatten(1).any(dim=1)
    expected = min(multiplier * p, 1)
    assert changed.float().mean().item() == pytest.approx(expected, rel=0.099)  # four deviations or more


def test_axes_of_a_shift_come_together():
    _, offset = affine_maps({'xfrac': 1}, p=0.5)
    moved = offset.abs() > 1e-4
    assert (moved[:, 0] == moved[:, 1]).float().mean() > 0.99


def test_bands_of_the_filter_come_independently():
    changed = augment(torch.ones(2000, 1, 4, 4), {'imgfilter': 0.5})[:, 0, 0, 0] != 1
    assert changed.float().mean().item() == pytest.approx(1 - 0.5 ** 4, abs=0.03)


@pytest.mark.parametrize('band, power', [(0, 10 / 13), (3, 1 / 13)])
def test_filter_keeps_the_expected_power_of_natural_images(band, power):
    t, normalisation = band_gain({'imgfilter': 1}, band, num=200)
    total = (power * t ** 2 + 1 - power) * normalisation ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-4)


def test_moves_and_hues_keep_the_statistics_that_they_should_keep():
    images = smooth(1000, 16)
    power = images.square().mean().item()
    moved = augment(images, {'xflip': 1, 'rotate90': 1})
    assert moved.square().mean().item() == pytest.approx(power, rel=0.03)
    tinted = augment(images, {'hue': 1, 'lumaflip': 1})
    assert tinted.square().mean().item() == pytest.approx(power, rel=1e-4)
    assert tinted.mean(dim=0).abs().max() < 0.2  # luma is inverted half the time, hues go all round


def ramp(kind, kwargs, p, num, size):
    line = torch.arange(size, dtype=torch.float32) / size
    image = line.expand(size, size) if kind.endswith(('_x', 'angle')) else line[:, None].expand(size, size)
    low, high = size // 2 - 1, size // 2
    middle = augment(image.expand(num, 3, size, size), kwargs, p)[:, 0, low:high + 1, low:high + 1] * size
    dx, dy = (middle[..., 1] - middle[..., 0]).mean(1), (middle[:, 1] - middle[:, 0]).mean(1)
    if 'log2_scale' in kind:
        return -(dx if kind.endswith('_x') else dy).log2()
    return torch.atan2(dy, dx) if 'angle' in kind else (size - 1) / 2 - middle.mean(dim=(1, 2))


def grey(value, kwargs, p, num, size):
    """The first channel of the centre pixel of images that were all `value`."""
    return augment(flat([value] * 3, num, size), kwargs, p)[:, 0, size // 2, size // 2]


KINDS = {
    'changed_fraction': lambda k, p, n, size: (
        (augment(smooth(n, size), k, p) - smooth(1, size)).abs().flatten(1).amax(dim=1) > 1e-3),
    'const_value': lambda *a: grey(0.0, *a),
    'const_log2_gain': lambda *a: (grey(0.5, *a) / 0.5).log2(),
    'const_negative_fraction': lambda *a: grey(0.5, *a) < 0,
    'chroma_angle': lambda k, p, n, size: chroma(k, n, p, size)[0],
    'chroma_log2_gain': lambda k, p, n, size: chroma(k, n, p, size)[1],
    'noise_sigma': lambda k, p, n, size: (
        augment(flat([0.0] * 3, n, size), k, p).square().mean(dim=(1, 2, 3)).sqrt()),
    'zeroed_fraction': lambda k, p, n, size: (
        (augment(flat([1.0] * 3, n, size), k, p)[:, 0] == 0).float().mean(dim=(1, 2))),
}


@pytest.mark.parametrize('case', cases('augment', 'random'))
def test_recorded_distribution(case):
    kind, num, expected = case['kind'], min(case['n'], 4000), case['value']
    settings = (case['kwargs'], case['p'], num, case['size'])
    if kind not in KINDS and not kind.startswith('ramp_'):
        pytest.skip(f'a kind of measurement that is not described: {kind}')
    values = ramp(kind, *settings) if kind.startswith('ramp_') else KINDS[kind](*settings)
    if not isinstance(expected, list):  # a fraction, itself measured, so that its uncertainty adds to ours
        tolerance = 5 * math.sqrt(expected * (1 - expected) * (1 / num + 1 / case['n'])) + 0.005
        assert values.float().mean().item() == pytest.approx(expected, abs=tolerance)
        return
    check_quantiles(values.double().numpy(), expected, case['n'], is_angle='angle' in kind)


def check_quantiles(values, expected, num_recorded, is_angle=False):
    quantiles = low = high = np.quantile(values, LEVELS)
    # Where values are few (whole pixels, quarter turns), a quantile may fall on the neighbour: accept what
    # lies within the uncertainty of its level, in both samples.
    if len(np.unique(values.round(3))) <= MAX_DISCRETE:
        levels = np.array(LEVELS)
        spread = 5 * np.sqrt(levels * (1 - levels) * (1 / len(values) + 1 / num_recorded))
        low, high = (np.quantile(values, np.clip(levels + way * spread, 0, 1)) for way in (-1, 1))
    tolerance = np.full(7, 0.15 * (expected[5] - expected[1]))
    if is_angle:
        tolerance[3] = max(tolerance[3], 0.25)
    tolerance += 1e-6
    assert ((low - tolerance <= expected) & (expected <= high + tolerance)).all(), (
        f'{quantiles} instead of {expected}')


@pytest.mark.parametrize('num_low, is_right', [(3, True), (4, True), (2, False), (5, False)])
def test_quantiles_of_whole_numbers_may_fall_on_the_neighbour(num_low, is_right):
    """Half of the values are 0, half are 4: the median may be either, the quartiles may not."""
    values, recorded = np.repeat([0.0, 4.0], 2000), np.repeat([0.0, 4.0], [num_low, 7 - num_low])
    with contextlib.nullcontext() if is_right else pytest.raises(AssertionError, match='instead of'):
        check_quantiles(values, recorded, 4000)
