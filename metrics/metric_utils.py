# SPDX-License-Identifier: Apache-2.0
"""What metrics share: generated pictures, the same ones for the same seed."""
import torch

from training.batches import draw_labels_with
from training.dataset import Dataset

BATCH = 64


def to_uint8(img: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as uint8, rounded as everywhere in this project."""
    return (img * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def generate_images(
    G: torch.nn.Module, num_images: int, dataset: Dataset, device: torch.device, seed: int = 0,
) -> torch.Tensor:
    """uint8 [num_images, C, H, W] on the CPU: random latents, labels of random items of the dataset, no
    truncation.

    Depends on seed only, not on the state of any generator, and leaves none changed.
    """
    latents = torch.Generator().manual_seed(seed)
    labels = draw_labels_with(dataset, num_images, seed)
    z = torch.randn([num_images, G.z_dim], generator=latents)
    cuda = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        parts = [to_uint8(G(a.to(
            device), b.to(device))).cpu() for a, b in zip(z.split(BATCH), labels.split(BATCH), strict=True)]
    return torch.cat(parts)
