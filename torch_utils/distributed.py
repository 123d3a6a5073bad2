# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: rank, size, the few collective operations. Without a group: one process, rank 0."""
import torch
import torch.distributed as dist


def is_initialized() -> bool:
    """Whether this process belongs to a group; torch builds without distributed support never do."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process in the run, 0 .. world_size() - 1."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if is_initialized() else 1


def print0(*values: object) -> None:
    """Print on rank 0, be silent elsewhere."""
    if rank() == 0:
        print(*values, flush=True)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its sum over all processes, in place, and return it. All processes must call."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
