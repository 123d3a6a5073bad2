# SPDX-License-Identifier: Apache-2.0
"""What is compiled before the first step: the kernels of the operators, side by side; then networks."""
import dataclasses
from collections.abc import Sequence

import torch

from torch_utils import custom_ops
from torch_utils.misc import convolutions_in_tf32
from training.capacity.memory import is_out_of_memory, rehearse
from training.compiled import compile_networks
from training.config import TrainConfig
from training.phases import Phase
from training.state import TrainingState


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
