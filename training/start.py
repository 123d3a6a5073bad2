# SPDX-License-Identifier: Apache-2.0
"""What is compiled before the first step: the operators' kernels, and with --compile the networks."""
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_utils import custom_ops, nvrtc
from training.config import TrainConfig
from training.loss import StyleGAN2Loss
from training.memory import is_out_of_memory, rehearse
from training.phases import Phase
from training.state import TrainingState

# What torch.compile raises without a C++ compiler, or for code that it cannot take: subclasses of these.
COMPILE_ERRORS = (RuntimeError, OSError, ImportError)


def compile_kernels(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, device: torch.device,
) -> int:
    """Compile the kernels that training will ask for side by side; returns how many there are.

    A rehearsal with the fewest pictures shows which. On a CPU, and where no kernels can be had, nothing
    happens.
    """
    if device.type != 'cuda' or not custom_ops.is_available(device):
        return 0
    with custom_ops.noting() as wanted, torch.backends.cudnn.flags(
            enabled=True, benchmark=False, allow_tf32=config.allow_tf32):
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


def compile_networks(loss: StyleGAN2Loss, warn: Callable[[str], object]) -> None:
    """Let torch.compile make other forms of G.synthesis and D for gradients of first order.

    Path lengths and R1 differentiate twice, which compiled code cannot; they keep the networks themselves.
    Compilation happens at the first call; if it fails, warn(line) is told and the network itself is used.
    """
    loss.synthesis = Compiled(loss.G.synthesis, 'G', warn)
    loss.critic = Compiled(loss.D, 'D', warn)


class Compiled:
    """A module's compiled form, replaced by the module if that turns out to be impossible."""

    def __init__(self, module: torch.nn.Module, name: str, warn: Callable[[str], object]):
        self.module, self.name, self.warn = module, name, warn
        # Random numbers are those of the uncompiled form.
        self._run: Callable[..., Any] = torch.compile(
            module, dynamic=False, options={'fallback_random': True})

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        """As the module."""
        try:
            return self._run(*args)
        except COMPILE_ERRORS as error:
            if self._run is self.module or is_out_of_memory(error):
                raise
            self.warn(f'--compile: {self.name} cannot be compiled ({nvrtc.first_line(error)}); it goes on '
                      'uncompiled. A C++ compiler must be there, and on a GPU Triton.')
        self._run = self.module
        return self.module(*args)
