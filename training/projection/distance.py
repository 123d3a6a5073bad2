# SPDX-License-Identifier: Apache-2.0
"""Distances between images: perceptual (VGG16), pixel-based, and the PSNR."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib.progress import write
from metrics.detectors import VGG16, DetectorMissingError, load_detector, to_rgb

WHITE = 255.0
MAX_SIDE_PX = 256  # of the shorter side of the input of the perceptual network, as published
MIN_SIDE_PX = 4  # of the coarsest pyramid level
MAX_PSNR_DB = 100.0  # for equal images, as JSON has no infinity


@dataclass(frozen=True)
class Distance:
    """A distance of images, computed from features, so that those of targets are computed only once.

    features: opaque images [N, 1 or 3, H, W] in [0, 255] -> [N, F].  compare: [..., F], [..., F] -> [...].
    """

    name: str
    features: Callable[[torch.Tensor], torch.Tensor]
    compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, views, F] of images [N, C, H, W] in [0, 255], C from 1 to 4; differentiable."""
        return torch.stack([self.features(view) for view in opaque_views(images)], dim=1)

    def between(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The distances [N] of two batches, given as results of describe()."""
        return self.compare(a, b).mean(dim=1)


def visible(images: torch.Tensor) -> torch.Tensor:
    """Images clamped to [0, 255], as stored in a file, with a straight-through gradient.

    Networks often exceed the range where an image is white or black. This is invisible and must not count
    as a difference, but values that should be inside the range still need a gradient towards it.
    """
    return images - (images - images.clamp(0, WHITE)).detach()


def opaque_views(images: torch.Tensor) -> list[torch.Tensor]:
    """Opaque versions of [N, C, H, W] in [0, 255]: itself, or with alpha over black and over white.

    Together the two determine every visible color and transparency.
    """
    if images.shape[1] in (1, 3):
        return [images]
    images = visible(images)
    colour, alpha = images[:, :-1], images[:, -1:] / WHITE
    over_black = colour * alpha
    return [over_black, over_black + WHITE * (1 - alpha)]


def perceptual_distance(detector: Callable[..., torch.Tensor]) -> Distance:
    """Squared Euclidean distance of the LPIPS features of VGG16 (Zhang et al. 2018), as published.

    Images whose shorter side exceeds MAX_SIDE_PX are downsampled to it by area.
    """
    def features(images: torch.Tensor) -> torch.Tensor:
        return detector(to_rgb(_reduced(images)), resize_images=False, return_lpips=True)
    return Distance('vgg16', features, lambda a, b: (a - b).square().sum(dim=-1))


def _reduced(images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[2:]
    short = min(height, width)
    if short <= MAX_SIDE_PX:
        return images
    size = [round(side * MAX_SIDE_PX / short) for side in (height, width)]
    return torch.nn.functional.interpolate(images, size=size, mode='area')


def pixel_distance() -> Distance:
    """Mean absolute difference, 0 to 1, averaged over the levels of an image pyramid.

    Needs no download. Coarse levels provide gradients where edges do not overlap yet.
    """
    return Distance('pixel', _pyramid, lambda a, b: (a - b).abs().sum(dim=-1))


def _pyramid(images: torch.Tensor) -> torch.Tensor:
    """[N, F]: all levels, scaled so that the sum of absolute differences is the mean over level means."""
    levels = [visible(images) / WHITE]
    while min(levels[-1].shape[2:]) >= 2 * MIN_SIDE_PX:
        levels.append(torch.nn.functional.avg_pool2d(levels[-1], 2))
    return torch.cat([level.flatten(1) / (level[0].numel() * len(levels)) for level in levels], dim=1)


def open_distance(name: str, device: torch.device, detector_dir: str | None = None) -> Distance:
    """The distance of --distance: 'vgg16', 'pixel', or 'auto': VGG16, or pixel with a
    message if VGG16 is not available.

    Raises DetectorMissingError for 'vgg16' if it is not available.
    """
    if name == 'pixel':
        return pixel_distance()
    try:
        return perceptual_distance(load_detector(VGG16, device, detector_dir))
    except DetectorMissingError as error:
        if name == 'vgg16':
            raise DetectorMissingError(f'--distance=vgg16: {error}; or use --distance=pixel') from error
        write(f'Using --distance=pixel, which is less perceptual: {error}')
        return pixel_distance()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images [C, H, W]; at most MAX_PSNR_DB.

    Images with alpha are compared composited over black and over white.
    """
    first, second = (torch.stack(opaque_views(torch.from_numpy(x)[None].double())) for x in (a, b))
    mean_square = (first - second).square().mean().item()
    if mean_square == 0:
        return MAX_PSNR_DB
    return min(10 * math.log10(WHITE ** 2 / mean_square), MAX_PSNR_DB)
