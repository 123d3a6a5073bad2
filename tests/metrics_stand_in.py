# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the two feature networks, of the same form and a thousandth of the size, and small datasets.

They are no Inception and no VGG16: numbers made with them mean nothing outside the tests.
"""
import numpy as np
import torch

from dnnlib.image_io import save_png
from metrics.detectors import INCEPTION, VGG16
from training.dataset import ImageFolderDataset


class StandInInception(torch.nn.Module):
    """Random features of images resized to 8x8: 6 of them, or 5 class probabilities."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer('weight', torch.randn([6, 192], generator=generator) / 14)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = torch.nn.functional.interpolate((img.to(torch.float32) - 128) / 128, [8, 8], mode='bilinear')
        features = torch.nn.functional.linear(x.flatten(1), self.weight)
        return features if return_features else torch.softmax(features[:, :5], 1)


class StandInVgg(torch.nn.Module):
    """Random features of images, resized or not."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.register_buffer('weight', torch.randn([4, 3, 3, 3], generator=generator) / 5)

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_features: bool = False,
                return_lpips: bool = False):
        x = img.to(torch.float32) / 255
        if resize_images:
            x = torch.nn.functional.interpolate(x, [6, 6], mode='bilinear')
        return torch.nn.functional.conv2d(x, self.weight).flatten(1)


def write_detectors(folder):
    """Save both as TorchScript under the names of the real ones; the folder as text."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(StandInInception()).save(str(folder / INCEPTION))
    torch.jit.script(StandInVgg()).save(str(folder / VGG16))
    return str(folder)


def write_images(folder, count=30, channels=3, shape=(16, 16), seed=0):
    """A folder of random images; its path as text."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        save_png(folder / f'{i:03d}.png', rng.integers(256, size=[channels, *shape], dtype=np.uint8))
    return str(folder)


def small_dataset(folder, count=30, **kwargs):
    return ImageFolderDataset(write_images(folder, count), **kwargs)
