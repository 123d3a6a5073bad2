# SPDX-License-Identifier: Apache-2.0
"""Sliced Wasserstein distance: values by hand, what it sees and what not, repeatability, speed."""
import math
import time

import pytest
import torch
import torch.nn.functional as F

from metrics.sliced_wasserstein import SlicedWasserstein, laplacian_pyramid


def smooth_images(count, channels=3, height=32, width=32, seed=0):
    """Smooth random images with some fine detail, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand([count, channels, 4, 4], generator=generator)
    coarse = F.interpolate(coarse, (height, width), mode='bicubic')
    fine = 0.1 * torch.randn([count, channels, height, width], generator=generator)
    return ((coarse + fine) * 255).clamp(0, 255).to(torch.uint8)


def blurred(images, side=3):
    padded = F.pad(images.float(), [side // 2] * 4, mode='reflect')
    return F.avg_pool2d(padded, side, 1).to(torch.uint8)


@pytest.fixture(scope='module')
def reference():
    return SlicedWasserstein(smooth_images(128), 128)


def test_a_second_sample_of_the_same_images_is_near_and_other_images_are_far(reference):
    same = reference.distance(smooth_images(128))['swd']
    fresh = reference.distance(smooth_images(128, seed=1))['swd']
    noise = reference.distance(torch.randint(256, [128, 3, 32, 32], dtype=torch.uint8))['swd']
    assert same < 30 and fresh < 45 and noise > 1.5 * fresh


def test_it_grows_with_blur_mostly_in_the_fine_level(reference):
    sharp = reference.distance(smooth_images(128, seed=1))
    weak, strong = (reference.distance(blurred(smooth_images(128, seed=1), side)) for side in (3, 5))
    assert sharp['swd'] < weak['swd'] < strong['swd']
    assert strong['swd_32'] - sharp['swd_32'] > 2 * (strong['swd_16'] - sharp['swd_16'])


def test_it_grows_when_modes_are_dropped(reference):
    few = smooth_images(128, seed=1)[:4].repeat(32, 1, 1, 1)
    assert reference.distance(few)['swd'] > 1.5 * reference.distance(smooth_images(128, seed=1))['swd']


def test_it_sees_colours_that_go_together_differently(reference):
    gray = smooth_images(128, seed=1)[:, :1].expand(-1, 3, -1, -1)
    assert reference.distance(gray)['swd'] > 2 * reference.distance(smooth_images(128, seed=1))['swd']


def test_one_shift_and_contrast_of_all_images_is_normalised_away_as_in_the_paper(reference):
    images = smooth_images(128, seed=1)
    changed = (images.float() * 0.5 + 40).round().to(torch.uint8)
    assert abs(reference.distance(changed)['swd'] - reference.distance(images)['swd']) < 3


def test_plain_images_have_the_value_of_the_definition():
    # Real: half the images dark, half bright, so +-1 when normalised. Fake: a quarter bright, so sqrt(3)
    # and -1/sqrt(3). Sorted values then differ by 1 - 1/sqrt(3), 1 + 1/sqrt(3) and sqrt(3) - 1 for a half, a
    # quarter and a quarter, times the absolute sum of a random unit vector of 49 numbers, sqrt(2 / pi) on
    # average.
    def plain(*values):
        return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 16, 16)
    result = SlicedWasserstein(plain(50, 50, 150, 150)).distance(plain(0, 0, 0, 200))
    root = 1 / math.sqrt(3)
    gap = 0.5 * (1 - root) + 0.25 * (1 + root) + 0.25 * (3 * root - 1)
    assert set(result) == {'swd', 'swd_16'}
    assert result['swd'] == pytest.approx(1000 * gap * math.sqrt(2 / math.pi), rel=0.15)


def test_images_without_any_contrast_are_at_distance_zero():
    gray = torch.full([8, 3, 16, 16], 128, dtype=torch.uint8)
    assert SlicedWasserstein(gray).distance(gray)['swd'] == 0


def test_the_same_seed_gives_the_same_number_and_global_randomness_stays_untouched():
    real, fake = smooth_images(40), smooth_images(40, seed=1)
    state = torch.get_rng_state()
    first, again, other = (SlicedWasserstein(real, 40, seed).distance(fake) for seed in (0, 0, 1))
    assert first == again != other
    assert first['swd'] == pytest.approx(other['swd'], rel=0.3)
    assert torch.equal(state, torch.get_rng_state())


def test_asking_again_does_not_change_the_answer(reference):
    fake = smooth_images(128, seed=1)
    first = reference.distance(fake)
    reference.distance(smooth_images(128, seed=2))
    assert reference.distance(fake) == first


def test_the_order_of_images_matters_only_as_another_sample_would(reference):
    fake = smooth_images(128, seed=1)
    assert reference.distance(fake.flip(0))['swd'] == pytest.approx(reference.distance(fake)['swd'], abs=8)


@pytest.mark.parametrize(('channels', 'height', 'width', 'levels'), [
    (1, 16, 16, ['16']), (4, 64, 32, ['64', '32']), (2, 48, 80, ['48', '24']), (3, 7, 9, ['7']),
    (3, 128, 128, ['128', '64', '32', '16'])])
def test_any_shape_and_number_of_channels(channels, height, width, levels):
    real, fake = (smooth_images(12, channels, height, width, seed) for seed in (0, 1))
    result = SlicedWasserstein(real).distance(fake)
    assert list(result) == ['swd'] + [f'swd_{level}' for level in levels]
    assert result['swd'] == pytest.approx(sum(result[f'swd_{level}'] for level in levels) / len(levels))
    assert all(math.isfinite(value) and value > 0 for value in result.values())


def test_the_pyramid_adds_up_to_the_image_and_a_flat_one_has_no_details():
    fine, rest = laplacian_pyramid(torch.full([1, 2, 32, 32], 0.7))
    assert fine.abs().max() < 1e-5 and rest.shape == (1, 2, 16, 16) and (rest - 0.7).abs().max() < 1e-5
    ramp = torch.arange(32.).expand(1, 1, 32, 32)
    assert laplacian_pyramid(ramp)[0][..., 8:24].abs().max() < 1e-4  # linear: predicted from the coarse level


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='at least 7 pixels'):
        SlicedWasserstein(smooth_images(4, height=6, width=32))
    with pytest.raises(ValueError, match=r'expected images \[4, 3, 16, 16\], got \[4, 1, 16, 16\]'):
        SlicedWasserstein(smooth_images(4, 3, 16, 16)).distance(smooth_images(4, 1, 16, 16))


def test_a_distance_of_a_thousand_small_images_takes_a_few_seconds_at_most():
    reference = SlicedWasserstein(smooth_images(1024), 1024)
    start = time.process_time()
    reference.distance(smooth_images(1024, seed=1))
    assert time.process_time() - start < 10  # of all cores together, with room for a busy machine
