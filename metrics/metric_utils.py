# SPDX-License-Identifier: Apache-2.0
"""What metrics share: generated pictures, the same ones for the same seed."""
import numpy as np
import torch

from dnnlib.image_io import quantize
from training.batches import draw_labels
from training.dataset import Dataset

BATCH = 64


@torch.inference_mode()
def generate_images(
    G: torch.nn.Module, num_images: int, dataset: Dataset, device: torch.device, seed: int = 0,
) -> torch.Tensor:
    """uint8 [num_images, C, H, W] on the CPU: random latents, labels of random items of the dataset, no
    truncation.

    Depends on seed only, not on the state of any generator, and leaves none changed.
    """
    latents = torch.Generator().manual_seed(seed)
    labels = draw_labels(dataset, num_images, np.random.default_rng(seed))
    z = torch.randn([num_images, G.z_dim], generator=latents)
    cuda = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        parts = [quantize(G(some_z.to(device), some_c.to(device))).cpu()
                 for some_z, some_c in zip(z.split(BATCH), labels.split(BATCH), strict=True)]
    return torch.cat(parts)
