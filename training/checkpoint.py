# SPDX-License-Identifier: Apache-2.0
"""Writes network pickles so that nobody ever sees half a file."""
import contextlib
import copy
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dnnlib.util import replace_file


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the place of `path` once it is complete and on the disk.

    On any failure `path` stays as it was and nothing is left beside it. Raises UserError naming `path` if
    the folder cannot be written to or the disk is full.
    """
    with replace_file(path) as temporary:
        with open(temporary, 'xb') as file:
            yield file
            file.flush()
            # Without this a power cut after the renaming may leave an empty file under the final name.
            os.fsync(file.fileno())


def save_network_snapshot(
    path: str | os.PathLike, *, G: torch.nn.Module | None, D: torch.nn.Module | None, G_ema: torch.nn.Module,
    augment_pipe: torch.nn.Module | None = None, training_set_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write network-snapshot-*.pkl, a pickled dict of CPU copies in eval mode without gradients.

    The given modules stay as they are. The keys, in the published order: training_set_kwargs, G, D, G_ema,
    augment_pipe. Returns the path. Raises UserError if the file cannot be written.
    """
    snapshot: dict[str, Any] = {
        'training_set_kwargs': None if training_set_kwargs is None else dict(training_set_kwargs)}
    for name, module in (('G', G), ('D', D), ('G_ema', G_ema), ('augment_pipe', augment_pipe)):
        snapshot[name] = None if module is None else cpu_copy(module)
    with atomic_write(path) as file:
        pickle.dump(snapshot, file)
    return Path(path)


def cpu_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU in eval mode, without gradients and hooks; the device needs no second copy."""
    tensors = {id(t): torch.nn.Parameter(_on_cpu(t), requires_grad=False) for t in module.parameters()}
    tensors.update({id(t): _on_cpu(t) for t in module.buffers()})
    # deepcopy takes what its memo already holds for an object instead of copying that object.
    twin = copy.deepcopy(module, tensors)
    for part in twin.modules():
        for name, value in vars(part).items():
            if name.endswith('_hooks') and isinstance(value, dict):
                value.clear()
    return twin.eval().requires_grad_(requires_grad=False)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(device='cpu', copy=True)
