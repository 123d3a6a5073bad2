# SPDX-License-Identifier: Apache-2.0
"""Sliced Wasserstein distance between patches of a Laplacian pyramid (Karras et al. 2018, Sec. 5). Needs no
download.

Each level of the pyramid holds the details of one scale. Patches of all images are normalised channel by
channel and projected on random directions; along each, the distance of two sets is that of their sorted
values.
"""
import numpy as np
import torch
import torch.nn.functional as F

from dnnlib.util import UserError
from torch_utils.ops import upfirdn2d

PATCH_SIDE = 7
PATCHES_PER_IMAGE = 64  # paper: 128, of 16,384 images
MIN_SIDE = 16  # the coarsest level
NUM_DIRECTIONS = 128
PYRAMID_FILTER = (1, 4, 6, 4, 1)
REPORT_SCALE = 1000


class SlicedWasserstein:
    """Distances of sets of images to one set, whose descriptors are computed once.

    real: uint8 [N, C, H, W].  num_images: images used of each set, the same number of both.  seed: of the
    choice of images, patches and directions; the same seed gives the same number.
    Raises UserError if a side is below the patch size.
    """

    def __init__(self, real: np.ndarray | torch.Tensor, num_images: int = 1024, seed: int = 0):
        real = torch.as_tensor(real)
        if min(real.shape[2:]) < PATCH_SIDE:
            raise UserError(f'--metrics=swd: images must be at least {PATCH_SIDE} pixels on a side, not '
                            f'{real.shape[3]}x{real.shape[2]}; omit it')
        self.seed, self.num_images = seed, min(num_images, len(real))
        self.shape = real.shape[1:]
        chosen = torch.randperm(len(real), generator=self._generator(0))[:self.num_images]
        self._real = [self._project(level, i) for i, level in enumerate(self._descriptors(real[chosen], 1))]

    def distance(self, fake: torch.Tensor) -> dict[str, float]:
        """Distances to uint8 images [num_images, C, H, W]: 'swd' and, for each level, 'swd_<height of the
        level>'.

        In units of 1/1000 of the standard deviation of a patch value. Raises ValueError for another shape.
        """
        if fake.shape != (self.num_images, *self.shape):
            raise ValueError(f'expected images {[self.num_images, *self.shape]}, got {list(fake.shape)}')
        results = {}
        for i, level in enumerate(self._descriptors(fake, 2)):
            height = max(self.shape[1] >> i, 1)
            gap = np.abs(self._project(level, i) - self._real[i]).mean()
            results[f'swd_{height}'] = float(gap) * REPORT_SCALE
        return {'swd': float(np.mean(list(results.values()))), **results}

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, stream]).generate_state(1)[0]))

    def _descriptors(self, images: torch.Tensor, stream: int) -> list[torch.Tensor]:
        """Normalised patches of every level, float32 [N * PATCHES_PER_IMAGE, C * 49]."""
        generator = self._generator(stream)
        return [_normalised_patches(level, generator) for level in laplacian_pyramid(images.float())]

    def _project(self, patches: torch.Tensor, level: int) -> np.ndarray:
        """Sorted values along each direction, [NUM_DIRECTIONS, N * PATCHES_PER_IMAGE]."""
        directions = torch.randn([NUM_DIRECTIONS, patches.shape[1]], generator=self._generator(100 + level))
        values = F.normalize(directions) @ patches.t()
        return np.sort(values.numpy(), axis=1)  # NumPy sorts several times faster than torch


def laplacian_pyramid(x: torch.Tensor) -> list[torch.Tensor]:
    """Details of x [N, C, H, W] at each scale, finest first; the last level is what remains, of at least 16
    pixels.
    """
    f = upfirdn2d.setup_filter(PYRAMID_FILTER)
    levels = []
    while min(x.shape[2:]) >= 2 * MIN_SIDE and x.shape[2] % 2 == x.shape[3] % 2 == 0:
        smaller = upfirdn2d.upfirdn2d(F.pad(x, [2] * 4, mode='reflect'), f, down=2)
        larger = upfirdn2d.upfirdn2d(F.pad(smaller, [1] * 4, mode='reflect'), f, up=2, gain=4)
        levels.append(x - larger)
        x = smaller
    return [*levels, x]


def _normalised_patches(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random 7x7 patches of x [N, C, H, W], each channel with mean 0 and deviation 1 over all of them."""
    n, _, h, w = x.shape
    rows = torch.randint(h - PATCH_SIDE + 1, [n, PATCHES_PER_IMAGE], generator=generator)
    columns = torch.randint(w - PATCH_SIDE + 1, [n, PATCHES_PER_IMAGE], generator=generator)
    windows = x.unfold(2, PATCH_SIDE, 1).unfold(3, PATCH_SIDE, 1)  # a view [N, C, H', W', 7, 7]
    patches = windows[torch.arange(n)[:, None], :, rows, columns].flatten(0, 1)  # [N * P, C, 7, 7]
    mean = patches.mean(dim=[0, 2, 3], keepdim=True)
    deviation = patches.std(dim=[0, 2, 3], keepdim=True).clamp(min=1e-8)
    return ((patches - mean) / deviation).flatten(1)
