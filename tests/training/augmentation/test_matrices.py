# SPDX-License-Identifier: Apache-2.0
"""Homogeneous matrices and wavelet filters."""
import numpy as np
import pytest
from golden_cases import arrays, index

from training.augmentation import matrices
from training.augmentation.matrices import LUMA_AXIS

NEUTRAL = [
    matrices.translate(np.zeros(2), 0.0), matrices.scale(np.ones(2), 1.0),
    matrices.rotate2d(np.zeros(2)), matrices.rotate3d(LUMA_AXIS, np.zeros(2)),
    matrices.stretch_along(LUMA_AXIS, np.ones(2)),
    matrices.stretch_across(LUMA_AXIS, np.ones(2)), matrices.identity(2, 3),
]


@pytest.mark.parametrize('matrices', NEUTRAL)
def test_neutral_parameters_give_the_identity_to_the_bit(matrices):
    assert (matrices == np.eye(matrices.shape[1])).all() and len(matrices) == 2


def test_each_sample_has_its_own_matrix():
    m = matrices.translate(np.array([1.0, 2.0]), 5.0)
    np.testing.assert_array_equal(m @ [10, 20, 1], [[11, 25, 1], [12, 25, 1]])
    m = matrices.scale(np.array([1.0, 2.0]), 5.0, np.array([7.0, 8.0]))
    np.testing.assert_array_equal(m @ [1, 1, 1, 1], [[1, 5, 7, 1], [2, 5, 8, 1]])


def test_rotation_in_the_plane_goes_from_x_to_y():
    np.testing.assert_allclose(matrices.rotate2d(np.pi / 2)[0] @ [1, 0, 1], [0, 1, 1], atol=1e-15)


def test_rotation_about_luma_is_right_handed_and_cycles_the_primaries():
    m = matrices.rotate3d(LUMA_AXIS, 2 * np.pi / 3)[0]
    np.testing.assert_allclose(m @ [1, 0, 0, 1], [0, 1, 0, 1], atol=1e-15)


def test_reflection_of_luma_inverts_grey_and_keeps_chroma():
    m = matrices.stretch_along(LUMA_AXIS, -1.0)[0]
    np.testing.assert_allclose(m @ [0.5, 0.5, 0.5, 1], [-0.5, -0.5, -0.5, 1], atol=1e-15)
    np.testing.assert_allclose(m @ [0.5, 0, -0.5, 1], [0.5, 0, -0.5, 1], atol=1e-15)


def test_saturation_scales_chroma_and_keeps_grey():
    m = matrices.stretch_across(LUMA_AXIS, 3.0)[0]
    np.testing.assert_allclose(m @ [1.5, 1, 0.5, 1], [2.5, 1, -0.5, 1], atol=1e-15)


def test_wavelets_are_orthonormal_low_pass_filters():
    for taps in (matrices.SYM2_LOWPASS, matrices.SYM6_LOWPASS):
        assert sum(taps) == pytest.approx(np.sqrt(2))
        autocorrelation = np.correlate(taps, taps, 'full')[len(taps) - 1::2]
        np.testing.assert_allclose(autocorrelation, np.eye(len(autocorrelation))[0], atol=1e-9)


@pytest.mark.parametrize('levels, taps', [(1, 7), (2, 19), (3, 43)])
def test_bands_add_up_to_a_unit_impulse(levels, taps):
    bank = matrices.wavelet_bank(matrices.SYM2_LOWPASS, levels)
    assert bank.shape == (levels + 1, taps)
    np.testing.assert_allclose(bank.sum(axis=0), np.eye(taps)[taps // 2], atol=1e-9)
    np.testing.assert_allclose(bank, bank[:, ::-1], atol=1e-12)  # no shift
    np.testing.assert_allclose(bank.sum(axis=1), np.eye(levels + 1)[0], atol=1e-9)  # only row 0 has the mean


def test_band_filters_are_the_recorded_ones():
    if 'buffers' not in index('augment'):
        pytest.skip('no recorded filters in this folder')
    recorded = arrays('augment.npz')[index('augment')['buffers']['Hz_fbank']]
    np.testing.assert_allclose(matrices.wavelet_bank(matrices.SYM2_LOWPASS, 3), recorded, atol=1e-6)
