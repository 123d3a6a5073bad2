# SPDX-License-Identifier: Apache-2.0
"""Endless batches of training pictures from any position of the stream, out of memory or through workers."""
import os
from collections.abc import Iterator

import numpy as np
import torch

from training.dataset import Dataset, SeekableSampler

RAM_SHARE = 0.25  # of the machine's memory that cache='auto' may take


def fits_in_ram(num_bytes: int) -> bool:
    """Whether a decoded dataset of this size is small beside the memory of the machine."""
    try:
        total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):  # not a POSIX system: only what is small anywhere
        total = 2 ** 31
    return num_bytes <= RAM_SHARE * total


class Batches:
    """Real pictures and labels for one process, as float32 in [-1, 1] on `device`.

    Iterating yields (img [batch, C, H, W], c [batch, c_dim]); what comes at which position of the stream
    depends on (seed, position) only.  batch: pictures of this process in each step.  cache: 'ram', 'off' or
    'auto'.
    """

    def __init__(  # noqa: PLR0913 (the layout of a run)
        self, dataset: Dataset, batch: int, device: torch.device, *, start: int = 0, seed: int = 0,
        rank: int = 0, num_replicas: int = 1, cache: str = 'auto', num_workers: int = 0,
    ):
        self.dataset, self.batch, self.device, self.num_workers = dataset, batch, device, num_workers
        self.sampler = SeekableSampler(
            len(dataset), seed=seed, start=start, rank=rank, num_replicas=num_replicas)
        self.in_ram = cache == 'ram' or (cache == 'auto' and fits_in_ram(dataset.num_bytes))
        if self.in_ram:
            dataset.preload()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pixels, labels in self._from_ram() if self.in_ram else self._from_workers():
            img = pixels.to(self.device, non_blocking=True).to(torch.float32) / 127.5 - 1
            yield img, labels.to(self.device, non_blocking=True)

    def _from_ram(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = iter(self.sampler)
        while True:
            pixels, labels = zip(*[self.dataset[next(order)] for _ in range(self.batch)], strict=True)
            yield torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels))

    def _from_workers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        workers = {'num_workers': self.num_workers, 'prefetch_factor': 2} if self.num_workers else {}
        yield from torch.utils.data.DataLoader(
            self.dataset, sampler=self.sampler, batch_size=self.batch, pin_memory=self.device.type == 'cuda',
            **workers)


def draw_labels(dataset: Dataset, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Labels of uniformly random items [count, c_dim] float32: the labels of generated pictures."""
    if dataset.label_dim == 0:
        return torch.zeros([count, 0])
    return torch.from_numpy(
        np.stack([dataset.get_label(int(i)) for i in rng.integers(len(dataset), size=count)]))
