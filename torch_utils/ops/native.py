# SPDX-License-Identifier: Apache-2.0
"""Shared by the *_cuda modules: element types, vector widths, layouts, and kernels by their macros."""
import functools
from collections.abc import Sequence

import torch

from torch_utils import custom_ops
from torch_utils.ops._registry import memory_format_of

THREADS = 256  # of every block
VECTOR_BYTES = 16  # the widest access of a thread
MAX_BLOCKS = 2 ** 31 - 1  # along x
MAX_OFFSET = 2 ** 31 - 1  # within a sample, in elements: offsets of 32 bits halve the arithmetic of addresses
TYPE_NAMES = {
    torch.float32: 'float', torch.float16: 'half_t', torch.bfloat16: 'bfloat16_t', torch.float64: 'double'}


@functools.cache
def kernel(source: str, entry: str, **macros: int | str) -> custom_ops.Kernel:
    """The kernel of csrc/`source` with these macros; the same arguments give the same object."""
    return custom_ops.Kernel(source, entry, tuple(sorted((k, str(v)) for k, v in macros.items())))


def launch(
    kernel: custom_ops.Kernel, blocks: int, args: Sequence[torch.Tensor | int | float | None],
    device: torch.device, block: tuple[int, int, int] = (THREADS, 1, 1),
) -> None:
    """Run `blocks` blocks on the current stream of `device`. Raises ValueError beyond what a grid holds."""
    if blocks > MAX_BLOCKS:
        raise ValueError(f'{kernel.entry} needs {blocks} blocks; the maximum is {MAX_BLOCKS}')
    custom_ops.launch(kernel, (blocks, 1, 1), block, args, device)


def blocks_for(work: int, per_block: int = THREADS) -> int:
    """Number of blocks for `work` items."""
    return -(-work // per_block)


def supports(*tensors: torch.Tensor | None) -> bool:
    """Whether all tensors have one element type that the kernels support, and are not empty."""
    given = [t for t in tensors if t is not None]
    return given[0].dtype in TYPE_NAMES and given[0].numel() > 0 and all(
        t.dtype == given[0].dtype and t.device == given[0].device for t in given)


def vector_width(run: int, *tensors: torch.Tensor | None) -> int:
    """Elements per memory access: divides `run`, at most 16 bytes, all addresses aligned to it."""
    given = [t for t in tensors if t is not None]
    size = given[0].element_size()
    width = VECTOR_BYTES // size
    while width > 1 and (run % width or any(t.data_ptr() % (width * size) for t in given)):
        width //= 2
    return width


def has_short_offsets(*tensors: torch.Tensor) -> bool:
    """Whether 32-bit offsets suffice within every sample of the tensors [N, ...]."""
    return all(t.numel() <= MAX_OFFSET * t.shape[0] for t in tensors)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether kernels treat x [N, C, H, W] as NHWC."""
    return memory_format_of(x) is torch.channels_last


def dense(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with the strides of `like`, copied if necessary; same shape. Strides of single rows do not matter."""
    steps = zip(x.shape, x.stride(), like.stride(), strict=True)
    return x if all(size <= 1 or a == b for size, a, b in steps) else torch.empty_like(like).copy_(x)


def packed(x: torch.Tensor, *like: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] without gaps, in the memory format of `like`, by default its own."""
    return x.contiguous(memory_format=memory_format_of(*(like or (x,))))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32
