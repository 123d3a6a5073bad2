# SPDX-License-Identifier: Apache-2.0
"""Perceptual path length (StyleGAN, Sec. 4.1): change of images over short steps between random latents."""
import copy

import numpy as np
import torch

from dnnlib.progress import progress
from metrics.detectors import VGG16, Detector
from metrics.feature_stats import Features, open_detector
from metrics.formulas import perceptual_image, slerp
from metrics.metric_utils import FittingBatch, MetricOptions, latents_and_labels

EPSILON = 1e-4  # StyleGAN, Sec. 4.1
BLOCK = 16  # samples that share a seed, and their noise
LPIPS = Features(VGG16, {'resize_images': False, 'return_lpips': True})


def path_distances(
    options: MetricOptions, num_samples: int, *, space: str, full: bool, crop: bool,
) -> np.ndarray | None:
    """Squared perceptual distances [num_samples] over steps of EPSILON, divided by EPSILON^2; None except on
    rank 0.

    space: 'z' or 'w'.  full: at random positions of each path, otherwise at its beginning.
    """
    detector = open_detector(options, LPIPS)
    path = _Path(options, detector, space, full, crop)
    distances = torch.zeros([num_samples], dtype=torch.float32)
    with progress(total=num_samples, desc='Paths', unit='path', show=options.share.rank == 0) as bar:
        for block in options.share.blocks(num_samples, BLOCK):
            distances[block.start:block.stop] = path.distances(block).cpu()
            bar.update(min(len(block) * options.share.num_processes, num_samples - bar.n))
    options.share.sum_(distances, options.device)
    return distances.numpy() if options.share.rank == 0 else None


class _Path:
    """Steps along paths of a copy of the generator, since its noise is replaced."""

    def __init__(self, options: MetricOptions, detector: Detector, space: str, full: bool, crop: bool):
        self.options, self.detector, self.space = options, detector, space
        self.full, self.crop = full, crop
        self.G = copy.deepcopy(options.G).eval().requires_grad_(requires_grad=False)
        self.fitting = FittingBatch(BLOCK)

    @torch.inference_mode()
    def distances(self, block: range) -> torch.Tensor:
        """[len(block)], depending only on the first index of the block and the seed."""
        options, device = self.options, self.options.device
        z0, c, generator = latents_and_labels(self.G.z_dim, block, options.dataset, options.seed)
        z1 = torch.randn(z0.shape, generator=generator)
        t = torch.rand([len(block), 1], generator=generator) * self.full
        for name, buffer in self.G.synthesis.named_buffers():
            if name.endswith('noise_const'):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
        return self.fitting(self._step, *[x.to(device) for x in (z0, z1, c, t)])

    def _step(self, z0: torch.Tensor, z1: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        places = (t, t + EPSILON)
        if self.space == 'w':
            w0, w1 = self.G.mapping(z0, c), self.G.mapping(z1, c)
            ws = torch.cat([w0.lerp(w1, s[:, :, None]) for s in places])
        else:
            ws = self.G.mapping(torch.cat([slerp(z0, z1, s) for s in places]), torch.cat([c, c]))
        img = self.G.synthesis(ws, noise_mode='const', force_fp32=True)
        views = self.detector(perceptual_image(img, crop=self.crop), **LPIPS.options)
        before, after = views.chunk(2)
        return (before - after).square().sum(dim=1) / EPSILON ** 2
