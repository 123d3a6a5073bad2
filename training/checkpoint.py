# SPDX-License-Identifier: Apache-2.0
"""Writes files so that nobody ever sees half of one, network pickles above all."""
import contextlib
import copy
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dnnlib.util import replace_file

EXPORTED = ('G', 'D', 'G_ema', 'augment_pipe')  # networks of a snapshot, in the published order


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
    _sync_folder(Path(path).parent)


def _sync_folder(folder: Path) -> None:
    """Put the names of a folder on the disk, where the system offers it: they can get lost like contents."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class HostCopies:
    """Copies of tensors in the memory of the host, one a tensor however often it is asked for.

    The copy of a tensor on a GPU is complete only after wait(), which another thread may call. For the next
    moment call begin(): memory is used again, which is several times as fast as to ask the system for more.
    """

    def __init__(self) -> None:
        # The originals are kept, so that no other tensor gets the identity of one.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._current: set[int] = set()
        self._event: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Copies are of now. Those from before must not be in use any more."""
        self._copies = {key: pair for key, pair in self._copies.items() if key in self._current}
        self._current.clear()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor, of the same layout in memory."""
        key = id(tensor)
        if key not in self._copies:
            place = torch.empty_like(tensor.detach(), device='cpu', pin_memory=tensor.is_cuda)
            self._copies[key] = tensor, place
        copied = self._copies[key][1]
        if key not in self._current:
            self._current.add(key)
            # From a GPU in the order of its stream: the loop goes on at once.
            copied.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                self._event = self._event or torch.cuda.Event()
                self._event.record()
        return copied

    def tree(self, value: Any) -> Any:
        """The same nested dictionaries, lists and tuples with copies of their tensors."""
        if isinstance(value, torch.Tensor):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self.tree(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.tree(item) for item in value)
        return value

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module with copies of its tensors, in eval mode, without gradients and hooks."""
        tensors: dict[int, Any] = {
            id(t): torch.nn.Parameter(self(t), requires_grad=False) for t in module.parameters()}
        tensors.update({id(t): self(t) for t in module.buffers()})
        # deepcopy takes what its memo already holds for an object instead of copying that object.
        twin = copy.deepcopy(module, tensors)
        for part in twin.modules():
            for name, value in vars(part).items():
                if name.endswith('_hooks') and isinstance(value, dict):
                    value.clear()
        return twin.eval().requires_grad_(requires_grad=False)

    def wait(self) -> None:
        """Return once all copies are complete."""
        if self._event is not None:
            self._event.synchronize()


def copy_networks(
    copies: HostCopies, networks: Mapping[str, torch.nn.Module | None],
    training_set_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a network pickle holds: training_set_kwargs, then copies of G, D, G_ema and augment_pipe.

    networks: by these names; what is missing or None becomes None.
    """
    kwargs = None if training_set_kwargs is None else dict(training_set_kwargs)
    modules = {name: networks.get(name) for name in EXPORTED}
    return {'training_set_kwargs': kwargs,
            **{name: None if module is None else copies.module(module) for name, module in modules.items()}}


def write_networks(path: str | os.PathLike, snapshot: Mapping[str, Any]) -> Path:
    """Pickle what copy_networks() gave; returns the path. Raises UserError if the file cannot be written."""
    with atomic_write(path) as file:
        pickle.dump(dict(snapshot), file)
    return Path(path)


def save_network_snapshot(
    path: str | os.PathLike, *, G: torch.nn.Module | None, D: torch.nn.Module | None, G_ema: torch.nn.Module,
    augment_pipe: torch.nn.Module | None = None, training_set_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write network-snapshot-*.pkl, a pickled dict of CPU copies in eval mode without gradients.

    The given modules stay as they are. The keys, in the published order: training_set_kwargs, G, D, G_ema,
    augment_pipe. Returns the path. Raises UserError if the file cannot be written.
    """
    copies = HostCopies()
    networks = {'G': G, 'D': D, 'G_ema': G_ema, 'augment_pipe': augment_pipe}
    snapshot = copy_networks(copies, networks, training_set_kwargs)
    copies.wait()
    return write_networks(path, snapshot)
