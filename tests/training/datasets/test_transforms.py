# SPDX-License-Identifier: Apache-2.0
"""Crops, sizes and shape rules beyond the golden cases; the predicted shape is always the real one."""
import itertools

import numpy as np
import pytest
from dataset_cases import make_image

from dnnlib.util import UserError
from training.datasets.transforms import ShapeRule, TransformSettings, nearest_power

SHAPES = [(5, 7, 3), (16, 16, 1), (9, 30, 4), (31, 8, 2), (12, 16, 3)]


@pytest.mark.parametrize(('transform', 'mode'), list(itertools.product(
    [None, 'center-crop', 'center-crop-wide'], [None, 'L', 'RGB', 'RGBA'])))
def test_the_shape_is_predicted(transform, mode):
    settings = TransformSettings(transform, 8, 6, mode=mode)
    for seed, shape in enumerate(SHAPES):
        pixels = settings.apply(make_image(seed, *shape))
        assert settings.output_shape(shape) == (None if pixels is None else pixels.shape)


def test_one_side_alone_leaves_the_other():
    assert TransformSettings(width=4).apply(make_image(0, 10, 8)).shape == (10, 4, 3)
    assert TransformSettings(height=4).apply(make_image(0, 10, 8)).shape == (4, 8, 3)


def test_an_untouched_image_is_exact():
    for settings in [TransformSettings(), TransformSettings(width=8, height=8),
                     TransformSettings('center-crop', 8, 8)]:
        np.testing.assert_array_equal(settings.apply(make_image()), make_image())


@pytest.mark.parametrize(('height', 'width', 'top', 'left'), [(8, 5, 1, 0), (5, 8, 0, 1), (6, 5, 0, 0)])
def test_the_crop_is_centred(height, width, top, left):
    pixels = make_image(0, height, width)
    cropped = TransformSettings('center-crop', 5, 5).apply(pixels)
    np.testing.assert_array_equal(cropped, pixels[top:top + 5, left:left + 5])


def test_the_wide_band_lies_in_a_black_square():
    wide = TransformSettings('center-crop-wide', 8, 4).apply(np.full([4, 8, 3], 9, dtype=np.uint8))
    assert wide.shape == (8, 8, 3) and wide[2:6].min() == 9 and wide[:2].max() == wide[6:].max() == 0


@pytest.mark.parametrize(('transform', 'shape', 'is_enlarging'), [
    (None, (16, 16, 3), False), (None, (15, 40, 3), True), ('center-crop', (16, 40, 3), False),
    ('center-crop', (40, 15, 3), True), ('center-crop-wide', (40, 16, 3), False),
])
def test_enlarging_is_known_from_what_the_crop_keeps(transform, shape, is_enlarging):
    assert TransformSettings(transform, width=16, height=16).is_enlarging(shape) == is_enlarging


@pytest.mark.parametrize(('shape', 'is_stretching'), [
    ((32, 32, 3), False), ((32, 64, 3), True), ((64, 32, 3), True), ((33, 32, 3), False),
    ((333, 332, 3), False),
])
def test_stretching_is_more_than_rounding(shape, is_stretching):
    assert TransformSettings(width=16, height=16).is_stretching(shape) == is_stretching


@pytest.mark.parametrize(('shape', 'any_shape', 'message'), [
    ((8, 16, 3), False, 'not square'), ((24, 24, 3), False, r'power of two.*--width=16'),
    ((8, 8, 4), False, 'channels'), ((8, 8, 2), False, 'channels'), ((8, 8, 1), False, None),
    ((1, 1, 3), False, None),
    ((8, 12, 4), True, None), ((9, 12, 3), True, 'one power of two'),
    ((2, 2, 3), True, '--width=6 --height=6'), ((34, 34, 3), True, '--width=32 --height=32'),
    ((250, 250, 3), True, '--width=256 --height=256'), ((1000, 1000, 1), True, '--width=1024 --height=1024'),
    ((4, 4, 3), True, 'one power of two'),
    ((8, 8, 2), True, None),
])
def test_first_shapes_that_fit(shape, any_shape, message):
    rule = ShapeRule(any_shape=any_shape)
    if message is None:
        rule.check('a.png', shape)
        with pytest.raises(UserError, match=r'b\.png is .* but a\.png is .* same shape'):
            rule.check('b.png', (shape[0] * 2, shape[1] * 2, shape[2]))
    else:
        with pytest.raises(UserError, match=message):
            rule.check('a.png', shape)


@pytest.mark.parametrize(('size', 'power'), [(1, 1), (3, 2), (24, 16), (25, 32), (100, 128), (1000, 1024)])
def test_nearest_power_of_two(size, power):
    assert nearest_power(size) == power
