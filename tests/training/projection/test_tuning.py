# SPDX-License-Identifier: Apache-2.0
"""Pivotal tuning: images come closer, and nothing else changes."""
import torch
from small_networks import small_generator

from training.projection.distance import pixel_distance
from training.projection.tuning import tune


def error(G, ws, targets):
    with torch.no_grad():
        return ((G.synthesis(ws, noise_mode='const') + 1) * 127.5 - targets).abs().mean()


def test_tuning_brings_the_images_closer_and_leaves_g_mapping_and_noise_alone():
    G = small_generator(img_resolution=8).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ws = G.mapping(torch.randn([3, 8], generator=generator), None)
    targets = torch.randint(256, [3, 3, 8, 8], generator=generator, dtype=torch.uint8)
    before = {name: value.clone() for name, value in G.state_dict().items()}
    tuned = tune(G, ws, targets, pixel_distance(), 30, batch=2)
    assert error(tuned, ws, targets) < 0.98 * error(G, ws, targets)
    after = tuned.state_dict()
    for name, value in G.state_dict().items():
        assert torch.equal(value, before[name])
        if name.startswith('mapping.') or name.endswith(('noise_const', 'resample_filter')):
            assert torch.equal(after[name], value), name
    assert not torch.equal(after['synthesis.b8.conv1.weight'], before['synthesis.b8.conv1.weight'])
    assert not tuned.training and not any(p.requires_grad for p in tuned.parameters())
