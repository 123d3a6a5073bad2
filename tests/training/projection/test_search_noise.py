# SPDX-License-Identifier: Apache-2.0
"""Noise maps: found, replaced and restored, and the penalty on neighbours that resemble each other."""
import pytest
import torch
from golden_cases import arrays, cases
from small_networks import small_generator

from training.projection.search import noise_maps, noise_penalty, normalize_noise_, replaced_noise, stack_maps


def recorded(key):
    return torch.from_numpy(arrays('projector.npz')[key].copy())


@pytest.mark.parametrize('case', cases('projector', 'noise_reg'))
def test_recorded_penalty_and_normalisation(case):
    maps = {key: recorded(key) for key in case['inputs']}
    assert noise_penalty(stack_maps([maps])).item() == pytest.approx(case['reg_loss'], rel=1e-4)
    for value, normalized in zip(maps.values(), case['normalized'], strict=True):
        normalize_noise_(value)
        torch.testing.assert_close(value, recorded(normalized), atol=1e-5, rtol=0)


def test_each_image_of_a_batch_has_its_own_penalty():
    torch.manual_seed(0)
    sets = [{'a': torch.randn(12, 20), 'b': torch.randn(4, 4)} for _ in range(2)]
    both = noise_penalty(stack_maps(sets))
    assert both.shape == (2,)
    torch.testing.assert_close(both, torch.cat([noise_penalty(stack_maps([one])) for one in sets]))


def test_smooth_noise_costs_more_than_white_noise():
    torch.manual_seed(0)
    white = torch.randn(32, 32)
    smooth = white + white.roll(1, 0) + white.roll(1, 1)
    normalize_noise_(smooth)
    costs = noise_penalty(stack_maps([{'x': white}, {'x': smooth}]))
    assert costs[1] > 10 * costs[0]


def test_without_maps_there_is_nothing_to_pay():
    assert noise_penalty({}).item() == 0


@pytest.mark.parametrize('size, shapes', [(16, {(4, 4), (8, 8), (16, 16)}),
                                          ((16, 24), {(4, 6), (8, 12), (16, 24)})])
def test_maps_have_names_and_shapes_of_their_levels(size, shapes):
    maps = noise_maps(small_generator(img_resolution=size).synthesis)
    assert {tuple(value.shape) for value in maps.values()} == shapes
    assert 'b8.conv0.noise_const' in maps and len(maps) == 5


@torch.no_grad()
def test_replaced_noise_is_seen_and_goes_away_even_after_an_error():
    G = small_generator()
    ws = G.mapping(torch.randn([2, 8]), None)
    before = G.synthesis(ws, noise_mode='const')
    sets = [{name: torch.randn_like(value) for name, value in noise_maps(G.synthesis).items()}
            for _ in range(2)]
    with pytest.raises(KeyError), replaced_noise(G.synthesis, stack_maps(sets)):
        batch = G.synthesis(ws, noise_mode='const')
        raise KeyError
    assert torch.equal(G.synthesis(ws, noise_mode='const'), before)
    # Each image of the batch had its own set.
    with replaced_noise(G.synthesis, sets[1]):
        alone = G.synthesis(ws, noise_mode='const')
    torch.testing.assert_close(batch[1], alone[1], atol=1e-5, rtol=0)
    assert (batch[0] - alone[0]).abs().max() > 0.01
