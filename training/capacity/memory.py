# SPDX-License-Identifier: Apache-2.0
"""When memory runs out: fewer pictures at a time, in more rounds of gradient accumulation."""
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

# How allocators other than that of CUDA tensors say it; they raise RuntimeError.
OUT_OF_MEMORY_TEXTS = (
    'out of memory', 'DefaultCPUAllocator', 'not enough memory', 'CUBLAS_STATUS_ALLOC_FAILED',
    'CUDNN_STATUS_ALLOC_FAILED')


def fit_to_memory(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, announce: Callable[[str], object],
) -> TrainConfig:
    """The configuration with as many pictures at a time as memory holds, at most as many as asked for.

    Runs every phase once on made-up pictures with all augmentations, and undoes it; state is as before, but
    for the groups of D's minibatch standard deviation, which must divide the new number.
    announce(line): called if anything changed. All processes must call. Raises UserError if not even one
    picture fits.
    """
    def attempt(candidate: TrainConfig) -> None:
        if candidate.D.mbstd_group_size != config.D.mbstd_group_size:
            _set_group(state.D, candidate.D.mbstd_group_size)
        rehearse(state, phases, candidate)

    return fit_batch_gpu(config, attempt, announce)


def fit_batch_gpu(
    config: TrainConfig, attempt: Callable[[TrainConfig], object], announce: Callable[[str], object],
) -> TrainConfig:
    """Halve config.batch_gpu until attempt(config) does not run out of memory on any process.

    attempt must leave everything as it was, also when it fails. Errors other than those of memory pass
    through.
    """
    fitted = config
    while not _fits_everywhere(fitted, attempt):
        smaller = next(smaller_batches(fitted), None)
        if smaller is None:
            raise UserError(_hopeless(config))
        fitted = smaller
    if fitted is not config:
        announce(_explanation(config, fitted))
    return fitted


def smaller_batches(config: TrainConfig) -> Iterator[TrainConfig]:
    """The same training with about half, a quarter, ... of the pictures at a time, down to 1."""
    share, current = config.batch_size // config.num_gpus, config.batch_gpu
    while current > 1:
        # Rounds must be of equal size.
        current = max(n for n in range(1, current // 2 + 1) if share % n == 0)
        yield _with_batch_gpu(config, current)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or elsewhere."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def rehearse(state: TrainingState, phases: Sequence[Phase], config: TrainConfig) -> None:
    """Run one round of every phase at its largest, and leave everything as it was, whatever happens.

    Processes do not communicate, so that one may fail without the others waiting for it.
    """
    rng_devices = [state.loss.pl_mean.device] if state.loss.pl_mean.is_cuda else []
    with torch.random.fork_rng(rng_devices), _unchanged(state, phases):
        # The augmentation needs most memory when no picture is spared, which comes later in a run.
        if state.augment_pipe is not None:
            state.augment_pipe.p.fill_(1)
        for phase in phases:
            phase.gradients.is_local = True
            phase.run([_made_up_batch(state, config)])


@contextlib.contextmanager
def _unchanged(state: TrainingState, phases: Sequence[Phase]) -> Iterator[None]:
    """Put back afterwards whatever a phase changes. The copies are in the memory of the host."""
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
    """Restore what `_host_copy` took; what an optimizer has made since then goes."""
    for parameter in list(opt.state):
        if parameter not in saved:
            del opt.state[parameter]
            continue
        for name, value in saved[parameter].items():
            if isinstance(value, torch.Tensor):
                opt.state[parameter][name].copy_(value)
            else:
                opt.state[parameter][name] = value


def _made_up_batch(state: TrainingState, config: TrainConfig) -> MicroBatch:
    """Noise in place of pictures: [batch_gpu, C, H, W], with empty labels."""
    n, device, G = config.batch_gpu, state.loss.pl_mean.device, state.G
    img = torch.rand([n, G.img_channels, *config.data.size], device=device) * 2 - 1
    c = torch.zeros([n, G.c_dim], device=device)
    return MicroBatch(img, c, torch.randn([n, G.z_dim], device=device), c)


def _fits_everywhere(config: TrainConfig, attempt: Callable[[TrainConfig], object]) -> bool:
    """Whether the attempt succeeds on all processes."""
    failed = _fails(config, attempt)
    if failed:
        # Only now has the error, which holds the tensors of all functions it came through, gone.
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
    """Whether the flag is set on any process. All must call."""
    if distributed.world_size() == 1:
        return flag
    device = 'cuda' if torch.distributed.get_backend() == 'nccl' else 'cpu'
    return bool(distributed.all_reduce_sum(torch.tensor([float(flag)], device=device)))


def _with_batch_gpu(config: TrainConfig, batch_gpu: int) -> TrainConfig:
    group = fitting_group(config.D.mbstd_group_size, batch_gpu)
    return dataclasses.replace(
        config, batch_gpu=batch_gpu, D=dataclasses.replace(config.D, mbstd_group_size=group))


def _set_group(D: torch.nn.Module, group_size: int) -> None:
    """Change the groups of the minibatch standard deviation, and what D remembers of how it was built."""
    D.b4.mbstd.group_size = group_size
    D._init_kwargs['epilogue_kwargs'] = {**D.init_kwargs['epilogue_kwargs'], 'mbstd_group_size': group_size}


def _explanation(config: TrainConfig, fitted: TrainConfig) -> str:
    groups = [min(c.D.mbstd_group_size, c.batch_gpu) for c in (config, fitted)]
    changed = '' if groups[0] == groups[1] else (
        f' Minibatch standard deviation uses groups of {groups[1]} pictures instead of {groups[0]}.')
    return (f'Memory runs out with {config.batch_gpu} pictures at a time on each device: going on with '
            f'{fitted.batch_gpu} (--batch-gpu={fitted.batch_gpu}). A step still learns from '
            f'{config.batch_size} pictures, in more rounds.{changed}')


def _hopeless(config: TrainConfig) -> str:
    height, width = config.data.size
    full = config.precision == 'fp32' or config.D.num_fp16_res == 0
    half = ', half precision (--precision=fp16 or bf16)' if full else ''
    return (f'--batch-gpu={config.batch_gpu}: memory runs out even with one picture of {width}x{height} at a '
            f'time; use fewer feature maps (--cbase={config.G.channel_base // 2}, '
            f'--cmax={max(config.G.channel_max // 2, 1)}), smaller pictures (dataset_tool.py --width and '
            f'--height){half}, or free memory that other programs use')


def compile_kernels(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, device: torch.device,
) -> int:
    """Compile the kernels that training will ask for side by side; returns how many there are.

    A rehearsal with the fewest pictures shows which. On a CPU, and where no kernels can be had, there are
    none. From then on losses call compiled networks, if config.compile says so.
    """
    count = _obtain_kernels(state, phases, config, device)
    if config.compile:
        compile_networks(state.loss)
    return count


def _obtain_kernels(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, device: torch.device,
) -> int:
    if device.type != 'cuda' or not custom_ops.is_available(device):
        return 0
    with custom_ops.noting() as wanted, torch.backends.cudnn.flags(
            enabled=True, benchmark=False, allow_tf32=convolutions_in_tf32(config.allow_tf32)):
        try:
            rehearse(state, phases, with_few_pictures(config))
        except RuntimeError as error:
            # Then they are compiled one by one, as they come up.
            if not is_out_of_memory(error):
                raise
    return custom_ops.obtain_all(wanted, custom_ops.architecture_of(device))


def with_few_pictures(config: TrainConfig) -> TrainConfig:
    """The same training with as few pictures at a time as the minibatch standard deviation of D allows."""
    group = config.D.mbstd_group_size
    few = group if config.batch_gpu % group == 0 else config.batch_gpu
    return dataclasses.replace(config, batch_gpu=few)
