# SPDX-License-Identifier: Apache-2.0
"""--cuda-graphs: the rounds of all phases as captured CUDA graphs.

A graph holds the losses and backward passes of one round. Reduction over processes, the optimizer's step and
the averages stay outside: few kernels, which need no capture, and communication is never part of a graph.
"""
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from dnnlib.util import UserError, first_line
from torch_utils.cuda_graphs import Backend, Captures, CudaBackend, GraphedFunction
from training.config import TrainConfig
from training.loss import MicroBatch
from training.phases import Phase
from training.state import TrainingState

MEMORY_SHARE = 0.95  # of what can be had; a little always goes to fragments


def use_graphs(
    state: TrainingState, phases: Sequence[Phase], config: TrainConfig, device: torch.device,
    announce: Callable[[str], object],
) -> Captures | None:
    """Run the phases as graphs, if config.cuda_graphs and the device allow it; None if not.

    Call it after the rehearsal: --cuda-graphs=auto depends on the memory that the phases need.
    announce(line): called if auto decides against it on a GPU, or when a capture fails.  state: what phases
    change in it is restored after a graph has been tried.
    """
    if device.type != 'cuda' or config.cuda_graphs == 'off' or config.compile:
        return None
    if config.cuda_graphs == 'auto' and not _have_room(device):
        announce('No CUDA graphs: memory would not hold the activations twice, once for graphs and once '
                 'without. A smaller --batch-gpu makes room; --cuda-graphs=on tries anyway.')
        return None
    changes = functools.partial(changed_by_rounds, state)
    return capture_rounds(phases, CudaBackend(device), announce, changes)


def capture_rounds(
    phases: Sequence[Phase], backend: Backend, warn: Callable[[str], object],
    changes: Callable[[], Sequence[torch.Tensor]],
) -> Captures:
    """Run each phase's rounds through a GraphedFunction, which draws on the host before it replays.

    changes(): what rounds change besides the phase's gradients and its total loss.
    """
    captures = Captures(backend, warn)
    for phase in phases:
        phase.graphs = _Rounds(phase, captures, changes)
    return captures


def changed_by_rounds(state: TrainingState) -> list[torch.Tensor]:
    """Running means, statistics, and D's signs since the last update of p."""
    pending = [] if state.ada is None else [state.ada.pending]
    return [*state.G.buffers(), *state.D.buffers(), state.loss.pl_mean, *pending, *state.statistics.tensors()]


class _Rounds:
    """Phase.graphs: the round of a phase as a function of tensors."""

    def __init__(
        self, phase: Phase, captures: Captures, changes: Callable[[], Sequence[torch.Tensor]],
    ):
        self._run = GraphedFunction(
            lambda num_rounds, *tensors: phase.run_round(MicroBatch(*tensors), num_rounds), captures,
            lambda: [phase.gradients.buffer, phase.total_loss, *changes()])

    def __call__(self, micro: MicroBatch, num_rounds: int) -> bool:
        return self._run(num_rounds, micro.real_img, micro.real_c, micro.gen_z, micro.gen_c)


def _have_room(device: torch.device) -> bool:
    """Whether the memory that the phases need besides the networks fits twice."""
    lasting = torch.cuda.memory_allocated(device)
    passing = torch.cuda.max_memory_allocated(device) - lasting
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - lasting
    return fits_twice(passing, free)


def fits_twice(passing: int, free: int) -> bool:
    """Whether `free` bytes hold what passes (activations, gradients) in two pools."""
    return 2 * passing <= MEMORY_SHARE * free


# Noise from the generators that the other phases and --compile=0 use, so that the numbers are the same.
OPTIONS = {'fallback_random': True}


class CompiledNetwork:
    """Calls a network in compiled form; compiles it at the first call for each image shape.

    options: further settings of torch.compile.
    """

    def __init__(self, module: torch.nn.Module, **options: Any):
        self.module = module
        self._compiled = torch.compile(module, dynamic=False, **({'options': OPTIONS} | options))

    def __call__(self, *args: Any) -> torch.Tensor:
        """module(*args). Raises UserError if it cannot be compiled here."""
        # Compiled code calls no hooks, which training.guards needs at every layer.
        if self.module._forward_hooks:
            return self.module(*args)
        try:
            return self._compiled(*args)
        except TorchDynamoException as error:
            cause = getattr(error, 'inner_exception', error)  # what the compiler proper said
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from error
            raise UserError(f'--compile=1: torch.compile fails here ({first_line(cause)}); it needs a C++ '
                            'compiler, and Triton for a GPU. Or use --compile=0') from error


def compile_networks(loss: Any, **options: Any) -> None:
    """Compile the networks for losses that are differentiated only once.

    loss: StyleGAN2Loss or DCGANLoss.  options: as CompiledNetwork.
    """
    loss.compiled = {
        name: CompiledNetwork(module, **options) for name, module in loss.differentiated_once().items()}
