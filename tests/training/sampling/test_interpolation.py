# SPDX-License-Identifier: Apache-2.0
"""Walks: positions of frames, curves through keys, and arcs."""
import numpy as np
import pytest
import torch

from training.sampling.interpolation import interpolate, positions, slerp

KINDS = ['linear', 'cubic', 'slerp']


def keys(count=5):
    return torch.from_numpy(np.random.RandomState(1).randn(count, 2, 6))


def test_positions_end_at_the_last_key_or_just_before_the_first():
    assert positions(3, 2).tolist() == [0, 0.5, 1, 1.5, 2]
    assert positions(3, 2, is_loop=True).tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_easing_is_slow_at_the_keys_and_passes_through_them():
    eased = positions(3, 10, is_eased=True)
    assert eased[[0, 10, 20]].tolist() == [0, 1, 2]
    speed = np.diff(eased)
    assert (speed > 0).all() and speed[0] < 0.3 * speed[5] and speed[9] < 0.3 * speed[5]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('is_loop', [False, True])
def test_every_kind_passes_through_the_keys(kind, is_loop):
    points = keys()
    for i in range(5):
        assert torch.equal(interpolate(points, i, kind, is_loop), points[i])
        if i < 4:
            assert torch.allclose(interpolate(points, i + 1 - 1e-9, kind, is_loop), points[i + 1], atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_the_step_from_the_last_frame_of_a_loop_to_the_first_is_like_the_others(kind):
    path = torch.stack([interpolate(keys(), p, kind, True) for p in positions(5, 40, is_loop=True)])
    steps = (path.roll(-1, 0) - path).flatten(1).norm(dim=1)
    # The way between two keys may be long: the seam is compared with the step before it.
    assert 0.8 * steps[-2] < steps[-1] < 1.2 * steps[-2]
    assert steps.max() < 0.1 * path.flatten(1).norm(dim=1).max()


def test_cubic_has_no_bend_at_keys_where_linear_has():
    def bend(kind):
        path = torch.stack([interpolate(keys(), p, kind, True) for p in (0.999, 1, 1.001)])
        return (path[2] - 2 * path[1] + path[0]).norm() / (path[2] - path[0]).norm()
    assert bend('cubic') < 0.02 < 0.2 < bend('linear')


def test_cubic_keys_on_a_line_give_a_line():
    line = torch.arange(4.0).reshape(4, 1)
    assert interpolate(line, 2.25, 'cubic').item() == pytest.approx(2.25)
    assert interpolate(line, 0.25, 'cubic').item() == pytest.approx(0.25)


def test_slerp_turns_evenly_and_blends_lengths():
    a, b = torch.tensor([1.0, 0]), torch.tensor([0.0, 3])
    third = slerp(a, b, 1 / 3)
    assert third.norm().item() == pytest.approx(1 + 2 / 3, rel=1e-5)
    assert torch.atan2(third[1], third[0]).item() == pytest.approx(np.pi / 6, rel=1e-5)


def test_slerp_of_equal_opposite_and_empty_vectors_is_finite():
    a = torch.tensor([[1.0, 2], [1.0, 2], [0.0, 0]])
    b = torch.tensor([[1.0, 2], [-1.0, -2], [0.0, 1]])
    middle = slerp(a, b, 0.5)
    assert torch.allclose(middle[:2], torch.tensor([[1.0, 2], [0, 0]]), atol=1e-5) and middle.isfinite().all()
