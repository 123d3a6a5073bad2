# SPDX-License-Identifier: Apache-2.0
"""Shared by all metrics: options, distribution over processes, and generated images that depend only on the
seed.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dnnlib.image_io import quantize
from dnnlib.util import UserError
from torch_utils import distributed
from training.batches import draw_labels
from training.dataset import Dataset
from training.sampling.graphs import by_graphs

BATCH = 64  # images per seed, and maximum batch size
CHUNK_ROWS = 4096  # of features that processes exchange at once


@dataclass(frozen=True)
class Share:
    """Share of the work of this process. By default all of it, even if other processes run."""

    rank: int = 0
    num_processes: int = 1

    def blocks(self, count: int, size: int = BATCH) -> Iterator[range]:
        """Every num_processes-th block of `size` of the indices below `count`."""
        for start in range(self.rank * size, count, self.num_processes * size):
            yield range(start, min(start + size, count))

    def sum_(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """`tensor`, on any device, replaced by its sum over the processes, exchanged through `device`."""
        if self.num_processes > 1:
            for rows in tensor.split(CHUNK_ROWS):
                rows.copy_(distributed.all_reduce_sum(rows.to(device, copy=True)))
        return tensor

    def from_first(self, value: Any) -> Any:
        """The plain value of rank 0."""
        return distributed.broadcast_value(value) if self.num_processes > 1 else value


def all_processes() -> Share:
    """The share of this process if all processes of the run compute the metric together."""
    return Share(distributed.rank(), distributed.world_size())


@dataclass
class FittingBatch:
    """Calls functions on batches that fit in device memory, of at most `size` rows."""

    size: int = BATCH

    def __call__(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """function(*tensors), whose rows are independent. Raises UserError if a single row does not fit."""
        done: list[torch.Tensor] = []
        position = 0
        while position < len(tensors[0]):
            rows = slice(position, position + self.size)
            try:
                done.append(function(*[tensor[rows] for tensor in tensors]))
                position += self.size
            except torch.OutOfMemoryError as error:
                self._halve(error)
        return torch.cat(done)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self.size == 1:
            raise UserError('not even one image fits in GPU memory; close other programs that use the GPU, '
                            'or use --device=cpu') from error
        self.size //= 2
        torch.cuda.empty_cache()


@dataclass
class MetricOptions:
    """Inputs of a metric.

    G: a generator in eval mode on `device`.  dataset: the training images.  seed: of latents, labels and
    choices. cache: kept by the caller between calls with the same dataset, for intermediate results of
    metrics.  detector_dir: searched first for feature networks.  share: of this process; all processes must
    call.  provenance: filled by metrics with what their results depend on.  cuda_graphs: 'auto' or 'off'.
    generate: calls G, possibly by CUDA graphs, with the same results.
    """

    G: torch.nn.Module
    dataset: Dataset
    device: torch.device
    seed: int = 0
    cache: dict[str, Any] = field(default_factory=dict)
    detector_dir: str | None = None
    share: Share = field(default_factory=Share)
    batch: FittingBatch = field(default_factory=FittingBatch)
    provenance: dict[str, str] = field(default_factory=dict)
    cuda_graphs: str = 'auto'
    generate: Callable[..., torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generate = by_graphs(self.G, self.device, self.cuda_graphs)


def block_seed(seed: int, start: int) -> int:
    """Seed of the block of samples that begins at `start`."""
    return int(np.random.SeedSequence([seed, start]).generate_state(1)[0])


def latents_and_labels(
    z_dim: int, block: range, dataset: Dataset, seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """z [n, z_dim], c [n, c_dim] of random items, and the random generator for more; they depend only on the
    first index of the block and the seed.
    """
    generator = torch.Generator().manual_seed(block_seed(seed, block.start))
    labels = draw_labels(dataset, len(block), np.random.default_rng([seed, block.start]))
    return torch.randn([len(block), z_dim], generator=generator), labels, generator


@torch.inference_mode()
def generated_block(options: MetricOptions, block: range) -> torch.Tensor:
    """uint8 [len(block), C, H, W] on the device: no truncation, random noise. Leaves global random states
    unchanged.

    float32 on a CPU, where half precision takes many times as long. If a block is split for lack of
    memory, its images get different noise.
    """
    device = options.device
    precision = {'force_fp32': True} if device.type == 'cpu' else {}
    z, c, _ = latents_and_labels(options.G.z_dim, block, options.dataset, options.seed)
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(block_seed(options.seed, block.start))
        return options.batch(
            lambda some_z, some_c: quantize(options.generate(some_z, some_c, **precision)),
            z.to(device), c.to(device))


def generate_images(
    G: torch.nn.Module, num_images: int, dataset: Dataset, device: torch.device, seed: int = 0,
) -> torch.Tensor:
    """uint8 [num_images, C, H, W] on the CPU: random latents, labels of random items of the dataset, no
    truncation.

    Depends only on the seed, and leaves global random states unchanged.
    """
    options = MetricOptions(G, dataset, device, seed)
    return torch.cat([generated_block(options, block).cpu() for block in Share().blocks(num_images)])
