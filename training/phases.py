# SPDX-License-Identifier: Apache-2.0
"""The phases of an iteration: losses, trained parameters, interval."""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from torch_utils import distributed
from training.loss import MicroBatch, StyleGAN2Loss

GRADIENT_LIMIT = 1e5  # replaces infinite gradients


class FlatGradients:
    """A network's gradients in one buffer: zeroed, all-reduced and sanitised in one operation each.

    Every parameter's .grad is a view of it, so parameters that a phase does not use have zero gradients.
    is_local: skip the all-reduce, for trials on this process only.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self.parameters, self.is_local = list(parameters), False
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros([sum(sizes)], device=self.parameters[0].device)
        # Laid out in memory like the parameter, as fused optimizers expect.
        self.views = [
            part.as_strided(p.shape, p.stride(), part.storage_offset())
            for part, p in zip(self.buffer.split(sizes), self.parameters, strict=True)]

    def attach(self) -> None:
        """Zero the buffer and make it the .grad of all parameters."""
        self.buffer.zero_()
        for p, view in zip(self.parameters, self.views, strict=True):
            p.grad = view

    def add_gradient_of(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar: all at once, where backward() adds parameter by parameter."""
        found = [(view, grad) for view, grad in zip(
            self.views, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True)
            if grad is not None]
        # Tensors of other strides would keep all of them from being added together.
        for is_alike in (True, False):
            pairs = [pair for pair in found if (pair[0].stride() == pair[1].stride()) is is_alike]
            if pairs:
                torch._foreach_add_(*map(list, zip(*pairs, strict=True)))

    def require(self, *, wanted: bool) -> None:
        """Set requires_grad of all parameters."""
        for p in self.parameters:
            p.requires_grad_(wanted)

    def reduce(self) -> torch.Tensor:
        """Average over processes; replace NaN by 0 and infinities by the limit. Finite values are unchanged.

        Returns the sum before the replacement, a scalar: finite if and only if all values were (unless it
        exceeds float32).
        """
        if distributed.world_size() > 1 and not self.is_local:
            distributed.all_reduce_sum(self.buffer)
            self.buffer.div_(distributed.world_size())
        total = self.buffer.sum()  # by far the cheapest check of all values
        torch.nan_to_num(self.buffer, nan=0.0, posinf=GRADIENT_LIMIT, neginf=-GRADIENT_LIMIT, out=self.buffer)
        return total


@dataclass
class Phase:
    """One row of the table of phases.

    losses: yields per-sample losses of a MicroBatch.  interval: the phase runs in every interval-th
    iteration, with its gradient scaled by the interval to compensate (lazy regularisation, StyleGAN2,
    App. B).
    total_loss: scalar on the device, the total loss of the last run.  num_broken: int64 scalar on the device,
    the number of steps so far with a non-finite loss or gradient.
    detector: context manager around the losses and backward passes of each run, see training.guards.
    graphs: replaces run_round, with the same results, unless a detector is active; None: run eagerly.
    """

    name: str
    losses: Callable[[MicroBatch], Iterator[torch.Tensor]]
    module: torch.nn.Module
    opt: torch.optim.Optimizer
    gradients: FlatGradients
    interval: int = 1
    active: bool = field(default=False, init=False)  # whether the last run had any loss
    total_loss: torch.Tensor = field(init=False)
    num_broken: torch.Tensor = field(init=False)
    detector: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext, init=False)
    graphs: Callable[[MicroBatch, int], bool] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        device = self.gradients.buffer.device
        self.total_loss = torch.zeros([], device=device)
        self.num_broken = torch.zeros([], dtype=torch.int64, device=device)

    def is_due(self, batch_idx: int) -> bool:
        """Whether the phase runs in this iteration."""
        return batch_idx % self.interval == 0

    def run(self, rounds: Sequence[MicroBatch]) -> None:
        """Accumulate the mean gradient over all rounds and processes, and take one optimizer step."""
        self.gradients.attach()
        self.gradients.require(wanted=True)
        self.total_loss.zero_()
        is_watched = not isinstance(self.detector, contextlib.nullcontext)
        run_round = self.run_round if is_watched or self.graphs is None else self.graphs
        with self.detector:
            self.active = any([run_round(micro, len(rounds)) for micro in rounds])
        self.gradients.require(wanted=False)
        if self.active:
            # Counted on the device without synchronising; training.guards reads it at the end of a tick.
            self.num_broken += (self.total_loss + self.gradients.reduce()).isfinite().logical_not()
            self.opt.step()

    def run_round(self, micro: MicroBatch, num_rounds: int) -> bool:
        """Add the gradient of one round to that of the others. Returns whether there was any loss."""
        active = False
        for loss in self.losses(micro):
            mean = loss.mean() * (self.interval / num_rounds)
            self.gradients.add_gradient_of(mean)
            self.total_loss += mean.detach()
            active = True
        return active


def lazy_adam(
    parameters: Sequence[torch.nn.Parameter], lr: float, betas: tuple[float, float], eps: float,
    interval: int | None,
) -> torch.optim.Adam:
    """Adam with its constants corrected for `interval` main steps per extra regularisation step.

    With c = interval / (interval + 1): lr * c, beta ** c (StyleGAN2, App. B). interval None: unchanged.
    """
    c = 1.0 if interval is None else interval / (interval + 1)
    betas = (float(betas[0]) ** c, float(betas[1]) ** c)
    # One kernel for all tensors, where the device has it.
    fused = parameters[0].device.type in ('cpu', 'cuda')
    return torch.optim.Adam(parameters, lr=lr * c, betas=betas, eps=eps, fused=fused)


@dataclass(frozen=True)
class PhaseSource:
    """A network with its optimizer and regularisation interval, from which its phases are made."""

    module: torch.nn.Module
    opt: torch.optim.Optimizer
    interval: int | None


def build_phases(loss: StyleGAN2Loss, g: PhaseSource, d: PhaseSource) -> list[Phase]:
    """The phases of an iteration in order: Gmain, Greg, Dmain, Dreg; if not lazy, Gboth or Dboth."""
    table = [
        ('G', g, loss.generator_main, loss.path_length, loss.generator_both),
        ('D', d, loss.discriminator_main, loss.r1, loss.discriminator_both),
    ]
    phases = []
    for name, source, main, regularise, both in table:
        gradients = FlatGradients([p for group in source.opt.param_groups for p in group['params']])
        owner = {'module': source.module, 'opt': source.opt, 'gradients': gradients}
        if source.interval is None:
            phases.append(Phase(f'{name}both', both, **owner))
        else:
            phases.append(Phase(f'{name}main', main, **owner))
            phases.append(Phase(f'{name}reg', regularise, interval=source.interval, **owner))
    return phases
