# SPDX-License-Identifier: Apache-2.0
"""Tensors inside network pickles, read without torch.load: a storage is itself stored as pickles."""
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.pickles.arrays import MAX_DIMS
from torch_utils.pickles.budget import Budget, Damaged
from torch_utils.pickles.machine import Machine

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's non-zip format
PROTOCOL = 1001  # second pickle
MAX_SIZE = 1 << 62  # of an axis, a stride, and all axes but the empty ones together; torch counts in 63 bits
MAX_COPIES = 4  # of stored bytes, over all tensors of a network
MAX_HEADER_OPCODES = 200  # per pickle of a storage; about 30 are usual

_DTYPES = {
    'FloatStorage': torch.float32, 'DoubleStorage': torch.float64, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool}
STORAGE_TYPES = {
    (module, name): dtype for module in ('torch', 'torch.cuda') for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Storage:
    """Little-endian bytes of numel elements."""

    data: memoryview
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A description of a tensor: a view that lies within its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def tensor(self) -> torch.Tensor:
        """The tensor on the CPU, in its own memory; with the stored strides if they leave no gaps."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        # Only its own part: many tensors may share one storage.
        length = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        part = self.storage.data[self.offset * self.dtype.itemsize:][:length * self.dtype.itemsize]
        # A bytearray, because torch requires writable memory.
        view = torch.frombuffer(bytearray(part), dtype=self.dtype).as_strided(self.shape, self.stride)
        return view if self.numel == length else view.clone()


def make_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU. Raises Damaged if a small file would fill the memory with copies."""
    # Counted by memory: one storage can be declared many times.
    owners = {id(owner): owner for owner in (tensor.storage.data.obj for tensor in stored.values())}
    available = sum(len(owner) for owner in owners.values())
    size = sum(tensor.numel * tensor.dtype.itemsize for tensor in stored.values())
    if size > MAX_COPIES * available:
        raise Damaged(f'tensors of {size} bytes made of {available}')
    return {name: tensor.tensor() for name, tensor in stored.items()}


def read_header(file: io.BytesIO, what: str, budget: Budget) -> Machine:
    """Read the three small pickles at the start of torch's non-zip format; the machine for the next one.

    Raises Damaged, naming `what` is read, for an unknown format.
    """
    # The machine reads exactly to the end of each pickle, so the next one starts where it stopped.
    plain = Machine(file, {}, budget=budget, max_opcodes=MAX_HEADER_OPCODES)
    header = [plain.load() for _ in range(3)]
    is_known = header[:2] == [MAGIC, PROTOCOL] and type(header[2]) is dict
    if not is_known or header[2].get('little_endian') is not True:
        raise Damaged(f'{what} of an unknown format')
    return plain


def load_storage(data: Any, budget: Budget) -> Storage:
    """Stands in for torch.storage._load_from_bytes, which would run a second, unrestricted pickle.

    data: one storage as torch.save writes it without zip: five pickles, a count, the elements. Raises Damaged
    or Refused.
    """
    if type(data) is not bytes:
        raise Damaged('a storage that is not bytes')
    file = io.BytesIO(data)
    plain = read_header(file, 'a storage', budget)
    declared = Machine(file, STORAGE_TYPES, Declared, budget, MAX_HEADER_OPCODES).load()
    keys = plain.load()
    if not isinstance(declared, Declared) or keys != [declared.key]:
        raise Damaged('bytes that hold not one storage')
    numel = int.from_bytes(file.read(8), 'little')
    start = file.tell()
    size = numel * declared.dtype.itemsize
    if numel != declared.numel or len(data) - start != size:
        raise Damaged(f'a storage of {declared.numel} elements with {len(data) - start} bytes')
    # A view: one storage may be referenced many times, and most never become tensors.
    return Storage(memoryview(data)[start:], declared.dtype, numel)


class Declared:
    """The persistent id of a storage: ('storage', type, key, device, number of elements[, None])."""

    def __init__(self, pid: Any):
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != 'storage' or any(pid[5:]):
            raise Damaged('a storage that is part of another')
        self.dtype, self.key, self.numel = pid[1], pid[2], pid[4]
        if not isinstance(self.dtype, torch.dtype) or type(self.key) is not str or not _is_count(self.numel):
            raise Damaged('a storage of an unknown kind')


def rebuild_tensor(*arguments: Any) -> StoredTensor:
    """Stands in for torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks).

    Raises Damaged if the view exceeds its storage (torch would silently enlarge it) or repeats elements.
    """
    if len(arguments) not in (6, 7) or any(arguments[5:]):
        raise Damaged('a tensor with hooks or metadata')
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage) or not _are_counts((offset,)):
        raise Damaged('a tensor without a storage')
    if not _are_counts(shape) or not _are_counts(stride) or len(shape) != len(stride):
        raise Damaged('a tensor without a shape')
    if max((*shape, *stride, math.prod(size or 1 for size in shape))) > MAX_SIZE:
        raise Damaged('a tensor of an impossible size')
    numel = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if numel else 0
    if numel > storage.numel or (numel and last >= storage.numel):
        raise Damaged(f'a tensor of shape {list(shape)} in a storage of {storage.numel} elements')
    return StoredTensor(storage, offset, shape, stride)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: Any) -> bool:
    return type(values) is tuple and len(values) <= MAX_DIMS and all(map(_is_count, values))
