# SPDX-License-Identifier: Apache-2.0
"""Helpers around modules and tensors: cached constants, switches of the GPU, the summary table; and what
published code imports from here.
"""
import contextlib
import ctypes
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnnlib.util import UserError

MAX_CONSTANTS = 1024
_constants: dict[tuple, torch.Tensor] = {}


def constant(
    value: Any, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """A cached tensor of fixed content, shared by all callers: do not modify it.

    value: a number, list or array, broadcast to `shape`. dtype: by default torch's default. device: by
    default the CPU. memory_format: by default contiguous.
    """
    array = np.asarray(value)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.device('cpu' if device is None else device)
    shape = None if shape is None else tuple(shape)
    # The bytes, not the object: equal values share one tensor.
    key = (array.shape, array.dtype, array.tobytes(), shape, dtype, device, memory_format)
    tensor = _constants.get(key)
    if tensor is None:
        # An inference tensor could not be used in training afterwards.
        with torch.inference_mode(mode=False):
            tensor = torch.as_tensor(array.copy(), dtype=dtype, device=device)
            tensor = tensor if shape is None else tensor.expand(shape)
            tensor = tensor.contiguous(memory_format=memory_format or torch.contiguous_format)
        # Tracers produce fake tensors, which must not outlive the trace.
        if type(tensor) is torch.Tensor and len(_constants) < MAX_CONSTANTS:
            _constants[key] = tensor
    return tensor


def set_gpu_arithmetic(cudnn_benchmark: bool, allow_tf32: bool | None) -> None:
    """Set torch's process-wide switches for speed and rounding on a GPU.

    cudnn_benchmark: let cuDNN time its algorithms.  allow_tf32: see convolutions_in_tf32(); matrix products
    use TF32 only if it is True.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = convolutions_in_tf32(allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32 is True


def convolutions_in_tf32(allow_tf32: bool | None) -> bool:
    """Whether float32 convolutions run in TF32 on a GPU: unless allow_tf32 is False. TF32 has the mantissa of
    float16, in which the highest resolutions are computed anyway.
    """
    return allow_tf32 is not False


def named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of all parameters, then of all buffers."""
    # A list: callers modify the module while they iterate.
    return [*module.named_parameters(), *module.named_buffers()]


@dataclass
class _ModuleCall:
    """One finished call of a module: its name and its tensors, finally only those of no earlier call."""

    name: str
    params: list[torch.Tensor]
    buffers: list[torch.Tensor]
    outputs: list[torch.Tensor]
    has_new_output: bool = True

    def is_redundant(self) -> bool:
        # The module only returns what a child returned, and the child already has a row.
        return not self.params and not self.buffers and not self.has_new_output

    def rows(self) -> list[list[str]]:
        """Name, parameters, buffers, output shape, dtype: one row per output."""
        counts = [str(_numel(tensors) or '-') for tensors in (self.params, self.buffers)]
        if not self.outputs:
            return [[self.name, *counts, '-', '-']]
        # As in the published tables, all rows show the shape of the first output.
        shape = str(list(self.outputs[0].shape))
        dtypes = [str(out.dtype).removeprefix('torch.') for out in self.outputs]
        # Only several outputs are numbered.
        if len(dtypes) == 1:
            return [[self.name, *counts, shape, dtypes[0]]]
        rows = [[f'{self.name}:{i}', '-', '-', shape, dtype] for i, dtype in enumerate(dtypes)]
        rows[0][1:3] = counts
        return rows


def print_module_summary(
    module: torch.nn.Module, inputs: Sequence[Any], max_nesting: int | None = 3, skip_redundant: bool = True,
) -> Any:
    """Run `module(*inputs)` and print a table of its submodules: parameters, buffers, outputs.

    Returns the outputs. One row per finished call, down to a nesting depth of `max_nesting` (None: no limit);
    each tensor is counted in the first row that has it. skip_redundant: omit calls that add no tensor. Only
    shapes matter, so everything may live on the meta device.
    """
    calls: list[_ModuleCall] = []
    with _recording(module, calls, max_nesting):
        outputs = module(*inputs)
    _keep_first_owners(calls)
    calls = [call for call in calls if not (skip_redundant and call.is_redundant())]
    rows = [[type(module).__name__, 'Parameters', 'Buffers', 'Output shape', 'Datatype'], ['---'] * 5]
    for call in calls:
        rows += call.rows()
    totals = [str(sum(_numel(getattr(call, kind)) for call in calls)) for kind in ('params', 'buffers')]
    rows += [['---'] * 5, ['Total', *totals, '-', '-']]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    print('\n'.join(['', *lines, '']))
    return outputs


@contextlib.contextmanager
def _recording(module: torch.nn.Module, calls: list[_ModuleCall], max_nesting: int | None) -> Iterator[None]:
    """Append every finished call of `module` and its submodules to `calls` within this context."""
    names = {submodule: name or '<top-level>' for name, submodule in module.named_modules()}
    # Nesting of calls, which may differ from the nesting of names.
    depth = 0

    def enter(_module: torch.nn.Module, _inputs: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(called: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
        nonlocal depth
        depth -= 1
        if max_nesting is not None and depth > max_nesting:
            return
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        tensors = [out for out in outputs if isinstance(out, torch.Tensor)]
        calls.append(_ModuleCall(names[called], list(called.parameters()), list(called.buffers()), tensors))

    handles = [submodule.register_forward_pre_hook(enter) for submodule in names]
    handles += [submodule.register_forward_hook(leave) for submodule in names]
    # Also after an error: the module must not keep our hooks.
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_first_owners(calls: list[_ModuleCall]) -> None:
    """Keep each tensor in the first call that has it; `outputs` keeps all alive, so ids are unique."""
    owned: set[int] = set()
    for call in calls:
        call.params = [t for t in call.params if id(t) not in owned]
        call.buffers = [t for t in call.buffers if id(t) not in owned]
        call.has_new_output = any(id(t) not in owned for t in call.outputs)
        owned.update(map(id, [*call.params, *call.buffers, *call.outputs]))


def _numel(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def pick_device(name: str) -> torch.device:
    """The device of --device=auto|cuda|cpu. Raises UserError if cuda is requested and there is no GPU."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError(
            '--device=cuda: PyTorch sees no CUDA device here; use --device=cpu or install a CUDA build')
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or 'the CPU' with its number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'the CPU ({torch.get_num_threads()} threads)'


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
LIMIT = 2 ** 31 - 1  # bytes, the largest int


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, let this process keep up to 2 GiB of freed memory for reuse.

    By default glibc may return large blocks to the system at once, so that every training step faults in the
    same thousands of pages again, each zeroed by the kernel.

    Returns whether it took effect: False with a GPU, or with a C library without mallopt.
    """
    if device.type != 'cpu' or not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LIMIT)) and bool(mallopt(M_TRIM_THRESHOLD, LIMIT))


# For source inside official pickles, and code written for the published system: nothing below is called here.
# nan_to_num(input, nan=0.0, posinf=None, neginf=None, *, out=None); the published name for what torch has.
nan_to_num = torch.nan_to_num


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Raise AssertionError naming the dimension unless `tensor` has this shape; None stands for any size."""
    if tensor.ndim != len(ref_shape):
        raise AssertionError(f'wrong number of dimensions: expected {ref_shape}, got {list(tensor.shape)}')
    # Sizes are tensors while torch.jit traces, which warns about comparing them.
    with suppress_tracer_warnings():
        for dim, (size, expected) in enumerate(zip(tensor.shape, ref_shape, strict=True)):
            if expected is not None and size != expected:
                raise AssertionError(f'dimension {dim}: expected {expected}, got {size}')


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Keep torch.jit's tracer from warning within this context."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', category=torch.jit.TracerWarning)
        yield


def profiled_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: calls of `fn` appear under its name in torch.profiler."""
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)
    return wrapper


def params_and_buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    """All parameters, then all buffers."""
    return [tensor for _, tensor in named_params_and_buffers(module)]


@torch.no_grad()
def copy_params_and_buffers(
    src_module: torch.nn.Module, dst_module: torch.nn.Module, require_all: bool = False,
) -> None:
    """Copy parameters and buffers into those of the same name in dst_module, which keep their requires_grad.

    Parameters and buffers share one name space. Names that src_module lacks are skipped, or raise
    AssertionError if `require_all`. Raises UserError before anything is copied if shapes differ.
    """
    src = dict(named_params_and_buffers(src_module))
    # All shapes are checked before the first tensor changes.
    pairs = []
    for name, tensor in named_params_and_buffers(dst_module):
        if name not in src:
            if require_all:
                raise AssertionError(f'{type(src_module).__name__} has no {name}')
            continue
        # copy_ would broadcast silently.
        if src[name].shape != tensor.shape:
            raise UserError(f'{name}: cannot copy {list(src[name].shape)} to {list(tensor.shape)}; the '
                            'networks must have the same size')
        pairs.append((tensor, src[name]))
    for tensor, source in pairs:
        tensor.copy_(source)


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Endless indices of a dataset in the published order (ours is in training.batches).

    One shuffled order is cycled; after each index is yielded, it is swapped with a random one among the last
    `window_size` (fraction of the dataset). All `num_replicas` processes share the order; each yields every
    num_replicas-th index, from its rank on. Raises UserError for an empty dataset or settings out of range.
    """

    def __init__(
        self, dataset: Sized, rank: int = 0, num_replicas: int = 1, shuffle: bool = True, seed: int = 0,
        window_size: float = 0.5,
    ):
        if len(dataset) == 0 or not 0 <= rank < num_replicas or not 0 <= window_size <= 1:
            raise UserError(f'{len(dataset)} images, {rank=}, {num_replicas=}, {window_size=}: a sampler '
                            'needs at least one image, 0 <= rank < num_replicas, and a window from 0 to 1')
        self.num_items, self.rank, self.num_replicas = len(dataset), rank, num_replicas
        self.shuffle, self.seed, self.window_size = shuffle, seed, window_size

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._common_order(), self.rank, None, self.num_replicas)

    def _common_order(self) -> Iterator[int]:
        order = list(range(self.num_items))
        if not self.shuffle:
            yield from itertools.cycle(order)
        draws = np.random.RandomState(self.seed)
        draws.shuffle(order)
        window = int(np.rint(self.num_items * self.window_size))
        for place in itertools.cycle(range(self.num_items)):
            yield order[place]
            # With a window below two there is nothing to swap with, and no random number is drawn.
            if window > 1:
                other = place - draws.randint(window)  # negative: counted from the end
                order[place], order[other] = order[other], order[place]
