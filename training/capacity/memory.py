# SPDX-License-Identifier: Apache-2.0
"""Rehearsals of a training: they find the batch_gpu that fits into memory, and the kernels to compile."""
import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dnnlib.util import UserError
from torch_utils import custom_ops, distributed
from torch_utils.misc import convolutions_in_tf32
from training.accelerate import compile_networks
from training.config import TrainConfig, fitting_group
from training.loss import MicroBatch
from training.phases import Phase
from training.state import TrainingState

# In messages of RuntimeErrors by allocators other than that of CUDA tensors.
OUT_OF_MEMORY_TEXTS = (
    'out of memory', 'DefaultCPUAllocator', 'not enough memory', 'CUBLAS_STATUS_ALLOC_FAILED',
    'CUDNN_STATUS_ALLOC_FAILED')


def fit_to_memory(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, announce: Callable[[str], object],
) -> TrainConfig:
    """The configuration with the largest batch_gpu that fits into memory, at most config.batch_gpu.

    Runs every phase once on random images with all augmentations, and restores the state, except for the
    group size of D's minibatch standard deviation, which must divide batch_gpu.
    announce(line): called if anything changed. All processes must call. Raises UserError if not even one
    image fits.
    """
    def attempt(candidate: TrainConfig) -> None:
        if candidate.D.mbstd_group_size != config.D.mbstd_group_size:
            _set_group(state.D, candidate.D.mbstd_group_size)
        rehearse(state, phases, candidate)

    return fit_batch_gpu(config, attempt, announce)


def fit_batch_gpu(
    config: TrainConfig, attempt: Callable[[TrainConfig], object], announce: Callable[[str], object],
) -> TrainConfig:
    """Halve config.batch_gpu until attempt(config) does not run out of memory on any rank.

    attempt must restore the state, even after an error. Other errors than out of memory are raised.
    """
    fitted = config
    while not _fits_everywhere(fitted, attempt):
        smaller = next(smaller_batches(fitted), None)
        if smaller is None:
            raise UserError(_nothing_fits(config))
        fitted = smaller
    if fitted is not config:
        announce(_explanation(config, fitted))
    return fitted


def smaller_batches(config: TrainConfig) -> Iterator[TrainConfig]:
    """The same training with about half, a quarter, ... of batch_gpu, down to 1."""
    share, current = config.batch_size // config.num_gpus, config.batch_gpu
    while current > 1:
        # All passes must have the same size.
        current = max(n for n in range(1, current // 2 + 1) if share % n == 0)
        yield _with_batch_gpu(config, current)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, on GPU or CPU."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def rehearse(state: TrainingState, phases: Sequence[Phase], config: TrainConfig) -> None:
    """Run one pass of every phase at its peak memory, and restore the state, even after an error.

    No communication between ranks, so that one may fail without stalling the others.
    """
    rng_devices = [state.loss.pl_mean.device] if state.loss.pl_mean.is_cuda else []
    with torch.random.fork_rng(rng_devices), _unchanged(state, phases):
        # At p = 1 augmentation needs the most memory; in training, p may rise later.
        if state.augment_pipe is not None:
            state.augment_pipe.p.fill_(1)
        for phase in phases:
            phase.gradients.is_local = True
            phase.run([_random_batch(state, config)])


@contextlib.contextmanager
def _unchanged(state: TrainingState, phases: Sequence[Phase]) -> Iterator[None]:
    """Restore everything that a phase changes from copies in host memory."""
    tensors = [*_tensors_of(state.G), *_tensors_of(state.D), state.loss.pl_mean]
    tensors += [state.augment_pipe.p] if state.augment_pipe is not None else []
    tensors += [state.ada.pending] if state.ada is not None else []
    tensors += [tensor for phase in phases for tensor in (phase.num_broken, phase.total_loss)]
    saved = [(tensor, tensor.detach().to('cpu', copy=True)) for tensor in tensors]
    moments = [(opt, _host_copy(opt)) for opt in (state.G_opt, state.D_opt)]
    report, state.loss.report = state.loss.report, lambda name, values: values
    try:
        yield
    finally:
        state.loss.report = report
        with torch.no_grad():
            for tensor, values in saved:
                tensor.copy_(values)
            for opt, values in moments:
                _put_back(opt, values)
        for phase in phases:
            phase.gradients.is_local = False
            phase.gradients.require(wanted=False)


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _host_copy(opt: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    return {parameter: {name: value.to('cpu', copy=True) if isinstance(value, torch.Tensor) else value
                        for name, value in values.items()} for parameter, values in opt.state.items()}


def _put_back(opt: torch.optim.Optimizer, saved: dict[torch.Tensor, dict[str, Any]]) -> None:
    """Restore the copies of `_host_copy`; delete optimizer state that was created later."""
    for parameter in list(opt.state):
        if parameter not in saved:
            del opt.state[parameter]
            continue
        for name, value in saved[parameter].items():
            if isinstance(value, torch.Tensor):
                opt.state[parameter][name].copy_(value)
            else:
                opt.state[parameter][name] = value


def _random_batch(state: TrainingState, config: TrainConfig) -> MicroBatch:
    """Noise as images [batch_gpu, C, H, W], with zero labels."""
    n, device, G = config.batch_gpu, state.loss.pl_mean.device, state.G
    img = torch.rand([n, G.img_channels, *config.data.size], device=device) * 2 - 1
    c = torch.zeros([n, G.c_dim], device=device)
    return MicroBatch(img, c, torch.randn([n, G.z_dim], device=device), c)


def _fits_everywhere(config: TrainConfig, attempt: Callable[[TrainConfig], object]) -> bool:
    """Whether the attempt succeeds on all ranks."""
    failed = _fails(config, attempt)
    if failed:
        # The traceback kept tensors alive until here.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return not any_process(failed)


def _fails(config: TrainConfig, attempt: Callable[[TrainConfig], object]) -> bool:
    try:
        attempt(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any rank. All ranks must call."""
    if distributed.world_size() == 1:
        return flag
    device = 'cuda' if torch.distributed.get_backend() == 'nccl' else 'cpu'
    return bool(distributed.all_reduce_sum(torch.tensor([float(flag)], device=device)))


def _with_batch_gpu(config: TrainConfig, batch_gpu: int) -> TrainConfig:
    group = fitting_group(config.D.mbstd_group_size, batch_gpu)
    return dataclasses.replace(
        config, batch_gpu=batch_gpu, D=dataclasses.replace(config.D, mbstd_group_size=group))


def _set_group(D: torch.nn.Module, group_size: int) -> None:
    """Change the group size of the minibatch standard deviation, and the init_kwargs of D accordingly."""
    D.b4.mbstd.group_size = group_size
    D._init_kwargs['epilogue_kwargs'] = {**D.init_kwargs['epilogue_kwargs'], 'mbstd_group_size': group_size}


def _explanation(config: TrainConfig, fitted: TrainConfig) -> str:
    groups = [min(c.D.mbstd_group_size, c.batch_gpu) for c in (config, fitted)]
    changed = '' if groups[0] == groups[1] else (
        f' Minibatch standard deviation uses groups of {groups[1]} images instead of {groups[0]}.')
    return (f'Out of memory with --batch-gpu={config.batch_gpu}: continuing with '
            f'--batch-gpu={fitted.batch_gpu}. The total batch size is still {config.batch_size}, by gradient '
            f'accumulation.{changed}')


def _nothing_fits(config: TrainConfig) -> str:
    height, width = config.data.size
    full = config.precision == 'fp32' or config.D.num_fp16_res == 0
    half = ', half precision (--precision=fp16 or bf16)' if full else ''
    return (f'--batch-gpu={config.batch_gpu}: out of memory even with one {width}x{height} image per pass; '
            f'use fewer feature maps (--cbase={config.G.channel_base // 2}, '
            f'--cmax={max(config.G.channel_max // 2, 1)}), smaller images (dataset_tool.py --width and '
            f'--height){half}, or free memory that other processes use')


def compile_kernels(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, device: torch.device,
) -> None:
    """Compile the kernels that training needs, in parallel; a rehearsal with few images determines them.

    None on CPU and where kernels are not available. Then, with config.compile, the loss calls networks
    compiled by torch.compile.
    """
    if device.type == 'cuda' and custom_ops.is_available(device):
        with custom_ops.noting() as wanted, torch.backends.cudnn.flags(
                enabled=True, benchmark=False, allow_tf32=convolutions_in_tf32(config.allow_tf32)):
            try:
                rehearse(state, phases, with_few_images(config))
            except RuntimeError as error:
                # The remaining kernels are compiled at their first call.
                if not is_out_of_memory(error):
                    raise
        custom_ops.obtain_all(wanted, custom_ops.architecture_of(device))
    if config.compile:
        compile_networks(state.loss)


def with_few_images(config: TrainConfig) -> TrainConfig:
    """The same training with the smallest batch_gpu that fills a group of minibatch standard deviation."""
    group = config.D.mbstd_group_size
    few = group if config.batch_gpu % group == 0 else config.batch_gpu
    return dataclasses.replace(config, batch_gpu=few)
