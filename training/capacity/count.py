# SPDX-License-Identifier: Apache-2.0
"""Counts the work of tensor operations: FLOPs, bytes moved, and peak memory.

Works on the meta device, where tensors have shapes but no data.
"""
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Kind = tuple[torch.dtype, int]  # of arithmetic: dtype, feature maps; 0 for matrix products


@dataclass
class Work:
    """Sums over operations. flop: FLOPs by kind.  bytes: read and written by element-wise operations.  calls:
    number of operations.  peak: maximum of bytes allocated at once.
    """

    flop: dict[Kind, float] = field(default_factory=dict)
    bytes: float = 0
    calls: float = 0
    peak: float = 0

    def add(self, other: 'Work', factor: float = 1) -> None:
        """Add `factor` times the other work; the peak becomes the maximum of both."""
        for kind, flop in other.flop.items():
            self.flop[kind] = self.flop.get(kind, 0) + factor * flop
        self.bytes += factor * other.bytes
        self.calls += factor * other.calls
        self.peak = max(self.peak, other.peak)

    @property
    def total_flop(self) -> float:
        """FLOPs of all kinds."""
        return sum(self.flop.values())


class Counter(TorchDispatchMode):
    """Within this context, every tensor operation adds to `work`."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self._alive = 0
        self._storages: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None,
    ) -> Any:
        """Called by torch for each operation."""
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in (result if isinstance(result, (tuple, list)) else [result])
                   if isinstance(t, torch.Tensor)]
        # Views move no data.
        if outputs and not func.is_view:
            self._count(func._overloadpacket, args, kwargs or {}, result, outputs)
        for tensor in outputs:
            self._watch(tensor.untyped_storage())
        return result

    def _count(
        self, packet: Any, args: tuple, kwargs: dict, result: Any, outputs: list[torch.Tensor],
    ) -> None:
        self.work.calls += 1
        if packet in flop_registry:
            kind = outputs[0].dtype, _width_of(outputs[0])
            flop = flop_registry[packet](*args, **kwargs, out_val=result)
            self.work.flop[kind] = self.work.flop.get(kind, 0) + flop
        else:
            inputs = [t for t in args if isinstance(t, torch.Tensor)]
            self.work.bytes += sum(t.numel() * t.element_size() for t in [*inputs, *outputs])

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        self._storages.add(storage)
        self._alive += storage.nbytes()
        self.work.peak = max(self.work.peak, self._alive)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self._alive -= num_bytes


def _width_of(tensor: torch.Tensor) -> int:
    """Feature maps of a convolution, rounded up to a power of two to limit the number of kinds."""
    return 1 << max(tensor.shape[1] - 1, 0).bit_length() if tensor.ndim == 4 else 0
