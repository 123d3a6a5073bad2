# SPDX-License-Identifier: Apache-2.0
"""How pictures get onto the device: batch by batch beside the computation, or all of them once."""
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from dnnlib.progress import progress
from torch_utils.host_draws import to_device
from training.dataset import Dataset

GPU_SHARE = 0.1  # of a GPU's memory that cache='auto' may take,
FREE_SHARE = 0.5  # and of what is free of it
CHUNK = 1024  # pictures moved at once
Pair = tuple[torch.Tensor, torch.Tensor]


def fits_on_gpu(num_bytes: int, free: int, total: int) -> bool:
    """Whether a decoded dataset is small beside the memory of a GPU, all in bytes."""
    return num_bytes <= min(GPU_SHARE * total, FREE_SHARE * free)


class Upload:
    """Moves batches to the device. To a GPU it does so on a stream of its own, from page-locked memory, while
    the GPU still works on what came before; nobody waits but the work that needs the batch.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The same tensors on the device."""
        if self._stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            moved = [to_device(tensor, self.device) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(current)
        return moved


class ResidentPictures:
    """All pictures of a preloaded dataset in the memory of a device.

    pixels: uint8 [number of raw pictures, C, H, W].  Raises torch.OutOfMemoryError if they do not fit.
    """

    def __init__(self, dataset: Dataset, device: torch.device, show_progress: bool = True):
        self.dataset, self.device = dataset, device
        source = dataset.decoded()
        self.pixels = torch.empty(source.shape, dtype=torch.uint8, device=device)
        with progress(total=len(source), desc='To the GPU', unit='img', show=show_progress) as bar:
            for start in range(0, len(source), CHUNK):
                part = torch.from_numpy(source[start:start + CHUNK])
                self.pixels[start:start + CHUNK].copy_(part)
                bar.update(len(part))

    def batches(self, order: Iterator[int], size: int) -> Iterator[Pair]:
        """(pixels uint8 [size, C, H, W], labels [size, c_dim]) of the items in that order, on the device."""
        while True:
            items = np.fromiter(itertools.islice(order, size), dtype=np.int64, count=size)
            rows, is_mirrored = (to_device(torch.from_numpy(array), self.device)
                                 for array in self.dataset.rows_of(items))
            pixels = self.pixels.index_select(0, rows)
            labels = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in items]))
            yield (torch.where(is_mirrored[:, None, None, None], pixels.flip(3), pixels),
                   to_device(labels, self.device))
