# SPDX-License-Identifier: Apache-2.0
"""The sample sheets of a run: grid size, choice of training images, and output."""
import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from dnnlib.image_io import MODES
from dnnlib.util import replace_file
from training.dataset import ImageFolderDataset

TARGET_WIDTH_PX, TARGET_HEIGHT_PX = 7680, 4320
CPU_GRID_IMAGES = 240  # on a CPU the published sheet of 1,024 small images would take as long as a tick


class SampleSheet:
    """The contact sheet of a run: training images, and fake images from fixed latents with the same labels.

    size: (columns, rows).  reals: uint8 [columns * rows, C, H, W].  z: latents [columns * rows, z_dim].
    c: labels [columns * rows, c_dim].
    """

    def __init__(self, dataset: ImageFolderDataset, z_dim: int, seed: int, device: torch.device):
        limit = CPU_GRID_IMAGES if device.type == 'cpu' else None
        self.size = grid_size(dataset.height, dataset.width, limit)
        raw_labels = [
            dataset.get_details(i).raw_label for i in range(len(dataset))] if dataset.has_labels else None
        reals, labels = zip(
            *[dataset[i] for i in grid_indices(len(dataset), self.size, raw_labels)], strict=True)
        self.reals = np.stack(reals)
        generator = torch.Generator().manual_seed(seed)
        self.z = torch.randn([len(reals), z_dim], generator=generator).to(device)
        self.c = torch.from_numpy(np.stack(labels)).to(device)

    def fakes(self, G_ema: torch.nn.Module, batch: int) -> torch.Tensor:
        """Fake images float32 [columns * rows, C, H, W] on the CPU, generated `batch` at a time."""
        with torch.inference_mode():
            return torch.cat([
                G_ema(z, c, noise_mode='const').cpu()
                for z, c in zip(self.z.split(batch), self.c.split(batch), strict=True)])


def grid_size(height: int, width: int, max_images: int | None = None) -> tuple[int, int]:
    """(columns, rows) of the sheet: about 7680x4320 pixels, but 7..32 columns and 4..32 rows.

    max_images: limits columns * rows, keeping their ratio; None for the published size.
    """
    columns = min(max(TARGET_WIDTH_PX // width, 7), 32)
    rows = min(max(TARGET_HEIGHT_PX // height, 4), 32)
    if max_images is not None and columns * rows > max_images:
        # The square root because both columns and rows shrink.
        shrink = (max_images / (columns * rows)) ** 0.5
        columns = max(int(columns * shrink), 1)
        rows = max(min(int(rows * shrink), max_images // columns), 1)
    return columns, rows


def grid_indices(
    num_images: int, grid: tuple[int, int], labels: Sequence | np.ndarray | None = None,
) -> list[int]:
    """Indices of the images in a sheet of grid = (columns, rows), row by row; the same for all runs.

    labels: classes [N] or vectors [N, ...]; each row then shows images of one label, cycling through the
    labels.
    """
    # Generator and seed as published, independent of the random seed of the run.
    random = np.random.RandomState(0)
    columns, rows = grid
    if labels is None:
        order = list(range(num_images))
        random.shuffle(order)
        return [order[i % num_images] for i in range(columns * rows)]
    groups = _groups(num_images, labels)
    for members in groups:
        random.shuffle(members)
    chosen = []
    for y in range(rows):
        # The k-th row of a label continues its previous row.
        members, start = groups[y % len(groups)], y // len(groups) * columns
        chosen += [members[(start + x) % len(members)] for x in range(columns)]
    return chosen


def _groups(num_images: int, labels: Sequence | np.ndarray) -> list[list[int]]:
    """Indices grouped by label; labels are sorted by their last element first, as published."""
    groups: dict[tuple, list[int]] = {}
    for i in range(num_images):
        key = tuple(np.asarray(labels[i]).flat[::-1])
        groups.setdefault(key, []).append(i)
    return [groups[key] for key in sorted(groups)]


def save_image_grid(
    path: str | os.PathLike, images: np.ndarray | torch.Tensor, drange: tuple[float, float],
    grid: tuple[int, int],
) -> None:
    """Write images [columns * rows, C, H, W] as one image file; drange: the values that map to 0 and 255.

    C = 1, 2, 3, 4: gray, gray with alpha, RGB, RGBA; with more channels, the first three as RGB. Written
    atomically. Raises ValueError for a wrong number of images, UserError if the file cannot be written.
    """
    sheet = PIL.Image.fromarray(tile_images(images, drange, grid))
    with replace_file(path) as temporary:
        sheet.save(temporary)


def tile_images(
    images: np.ndarray | torch.Tensor, drange: tuple[float, float], grid: tuple[int, int],
) -> np.ndarray:
    """uint8 [rows * H, columns * W] or, with channels, [rows * H, columns * W, C]: see save_image_grid."""
    array = images.detach().float().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    columns, rows = grid
    if array.ndim != 4 or len(array) != columns * rows:
        raise ValueError(f'a grid of {columns}x{rows} needs images [{columns * rows}, C, H, W], '
                         f'got {list(array.shape)}')
    # PNG supports up to four channels.
    low, high = drange
    array = (array[:, :3] if array.shape[1] not in MODES else array).astype(np.float32)
    array = np.nan_to_num((array - low) * (255 / (high - low)), nan=0.0)
    # Rounded half to even, as published; a plain cast would truncate.
    pixels = np.rint(array).clip(0, 255).astype(np.uint8)
    _, channels, height, width = pixels.shape
    pixels = pixels.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * height, columns * width, channels)
    return pixels[:, :, 0] if channels == 1 else pixels
