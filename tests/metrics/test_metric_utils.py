# SPDX-License-Identifier: Apache-2.0
"""Generated images for metrics: repeatable, labelled like the dataset, without side effects."""
import numpy as np
import torch
from small_networks import small_generator

from dnnlib.image_io import quantize
from metrics.metric_utils import BATCH, generate_images

CPU = torch.device('cpu')


class Labelled:
    """Stands for a dataset of ten items; item i has the label [i]."""

    def __init__(self, label_dim=1):
        self.label_dim = label_dim

    def __len__(self):
        return 10

    def get_label(self, index):
        return np.array([index], dtype=np.float32)


class Recorder(torch.nn.Module):
    """A generator whose images are plain, of the brightness of the label; keeps what it was given."""

    z_dim = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, c, force_fp32):
        self.calls.append((z, c))
        return (c[:, :1, None, None] / 10).expand(-1, 1, 2, 2)


def test_the_same_seed_gives_the_same_images_whatever_happened_before(device):
    G = small_generator().to(device)
    first = generate_images(G, 3, Labelled(0), device)
    torch.randn(5, device=device)
    assert torch.equal(generate_images(G, 3, Labelled(0), device), first)
    assert not torch.equal(generate_images(G, 3, Labelled(0), device, seed=1), first)
    assert first.shape == (3, 3, 16, 16) and first.dtype == torch.uint8 and first.device == CPU
    assert first.float().std() > 1


def test_images_are_made_in_batches_with_labels_of_random_items():
    G = Recorder()
    images = generate_images(G, BATCH + 6, Labelled(), CPU)
    assert [len(z) for z, _ in G.calls] == [BATCH, 6]
    labels = torch.cat([c for _, c in G.calls])
    assert len(images) == len(labels) == BATCH + 6 and set(labels.flatten().tolist()) == set(range(10))
    assert torch.equal(images[:, 0, 0, 0], quantize(labels[:, 0] / 10))
    z = torch.cat([z for z, _ in G.calls])
    assert z.shape == (BATCH + 6, 3) and abs(z.mean()) < 0.3 and 0.7 < z.std() < 1.3


def test_nothing_outside_is_changed():
    G = small_generator()
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    generate_images(G, 2, Labelled(0), CPU)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in G.state_dict().items())
