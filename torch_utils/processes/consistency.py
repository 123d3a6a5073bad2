# SPDX-License-Identifier: Apache-2.0
"""Checks that all processes of a run have the same state, by one checksum per tensor."""
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dnnlib.util import UserError
from torch_utils import distributed

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def named_tensors(tree: Any, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of the tensors in nested dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from named_tensors(item, f'{name}.{key}' if name else str(key))
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from named_tensors(item, f'{name}.{index}')


@torch.no_grad()
def checksums(tensors: list[torch.Tensor]) -> torch.Tensor:
    """int64 [number of tensors] on the CPU: the sum of each tensor's bits, read as integers.

    One pass, without a copy. Detects every change of a single element, and nearly all others.
    """
    sums: dict[torch.device, list[torch.Tensor]] = {}
    order = []
    for tensor in tensors:
        row = sums.setdefault(tensor.device, [])
        order.append((tensor.device, len(row)))
        row.append(tensor.view(BITS[tensor.element_size()]).sum(dtype=torch.int64))
    # One synchronization per device.
    found = {device: torch.stack(row).cpu() for device, row in sums.items()}
    return torch.stack([found[device][i] for device, i in order])


def check_agreement(state: Mapping[str, Any]) -> None:
    """Raise UserError on all processes unless each tensor of the state is bitwise equal on all of them.

    All processes must call, with the same names.
    """
    if distributed.world_size() == 1:
        return
    names, tensors = zip(*named_tensors(state), strict=True)
    table = torch.stack(distributed.gather_values(checksums(list(tensors))))  # [process, tensor]
    # The majority counts as correct; of two processes, rank 0.
    usual = table.mode(dim=0).values if len(table) > 2 else table[0]
    wrong = (table != usual).nonzero()
    if len(wrong):
        rank, index = min(wrong.tolist(), key=lambda pair: pair[1])
        raise UserError(
            f'{names[index]} differs on process {rank}, probably a fault of a GPU or link; nothing was '
            'saved; --resume=latest resumes from the previous snapshot')
