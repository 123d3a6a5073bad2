# SPDX-License-Identifier: Apache-2.0
"""One training iteration, from the seed to the new augmentation probability: the place to start reading.

training.training_loop calls run_iteration() for each batch; below it are only Phase.run (gradient
accumulation and the optimizer step) and the methods of the loss.
"""
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from torch_utils import distributed
from torch_utils.host_draws import to_device
from training.config import TrainConfig
from training.loss import MicroBatch
from training.phases import Phase
from training.state import TrainingState, ema_beta, seed_iteration, update_ema

RUNNING_MEANS = ('w_avg', 'running_mean', 'running_var')  # suffixes of buffers that are running means


class PhaseClock:
    """Durations of phases without synchronising: on a GPU by events, which are read at the end of a tick."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == 'cuda'
        self._latest: dict[str, tuple] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body under this name; the latest time counts."""
        distributed.note_phase(name)
        start = self._now()
        yield
        self._latest[name] = (start, self._now())

    def milliseconds(self) -> dict[str, float]:
        """Name -> duration of its latest measurement; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return {name: start.elapsed_time(end) for name, (start, end) in self._latest.items()}
        return {name: (end - start) * 1000 for name, (start, end) in self._latest.items()}

    def _now(self) -> object:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def run_iteration(
    state: TrainingState, phases: Sequence[Phase], real: tuple[torch.Tensor, torch.Tensor],
    labels: Callable[[int, np.random.Generator], torch.Tensor], config: TrainConfig, clock: PhaseClock,
) -> None:
    """Train for one iteration; every random number in it follows from (config.random_seed, rank, cur_nimg).

    real: images [N, C, H, W] and labels [N, c_dim] of this process, used by all phases.  labels(n, rng):
    labels [n, c_dim] for n fake images. All processes must call.
    """
    rng = seed_iteration(config.random_seed, distributed.rank(), state.cur_nimg)
    real_img, real_c = real
    # Gmain, Greg every 4th iteration, Dmain, Dreg every 16th: each draws its own latents and labels, computes
    # its losses in rounds of batch_gpu images, then all-reduces the gradient and takes an optimizer step.
    for phase in phases:
        if not phase.is_due(state.batch_idx):
            continue
        gen_z = torch.randn([len(real_img), state.G.z_dim], device=real_img.device)
        gen_c = to_device(labels(len(real_img), rng), real_img.device)
        parts = [t.split(config.batch_gpu) for t in (real_img, real_c, gen_z, gen_c)]
        with clock.measure(phase.name):
            phase.run([MicroBatch(*rows) for rows in zip(*parts, strict=True)])
    # Running means are linear in the batches, so averaging them over processes is exact.
    if distributed.world_size() > 1:
        buffers = [*state.G.named_buffers(), *state.D.named_buffers()]
        means = [b for name, b in buffers if name.endswith(RUNNING_MEANS)]
        distributed.average([state.loss.pl_mean, *means])
    beta = ema_beta(state.cur_nimg, config.batch_size, config.ema_kimg, config.ema_rampup)
    update_ema(state.G_ema, state.G, beta)
    state.cur_nimg += config.batch_size
    state.batch_idx += 1
    if state.ada is not None and state.ada.is_due(state.batch_idx):
        state.ada.update(state.augment_pipe.p)
