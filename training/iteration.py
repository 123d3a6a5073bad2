# SPDX-License-Identifier: Apache-2.0
"""One training iteration: what every phase sees, in which order, and how long it takes."""
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from torch_utils import distributed
from torch_utils.host_draws import to_device
from training.config import TrainConfig
from training.loss import MicroBatch
from training.phases import Phase, PhaseSource
from training.state import TrainingState
from training.systems.table import make_phases


class PhaseClock:
    """Durations of phases without waiting for the device: on a GPU by events that are read at the end of a
    tick.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == 'cuda'
        self._latest: dict[str, tuple] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time what happens within this context under a name; the latest time counts."""
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


def phases_of(state: TrainingState, config: TrainConfig) -> list[Phase]:
    """The phases of a run; they share the state's networks, optimizers and loss."""
    return make_phases(
        config, state.loss, PhaseSource(state.G, state.G_opt, config.G_reg_interval),
        PhaseSource(state.D, state.D_opt, config.D_reg_interval))


def run_iteration(
    state: TrainingState, phases: Sequence[Phase], real: tuple[torch.Tensor, torch.Tensor],
    labels: Callable[[int], torch.Tensor], config: TrainConfig, clock: PhaseClock,
) -> None:
    """Run the phases that are due, each with latents and labels of its own, then update the averaged
    generator.

    real: pictures and labels of this process, seen by every phase.  labels(n): labels for n generated
    pictures.
    """
    real_img, real_c = real
    for phase in phases:
        if not phase.is_due(state.batch_idx):
            continue
        gen_z = torch.randn([len(real_img), state.G.z_dim], device=real_img.device)
        gen_c = to_device(labels(len(real_img)), real_img.device)
        parts = [t.split(config.batch_gpu) for t in (real_img, real_c, gen_z, gen_c)]
        with clock.measure(phase.name):
            phase.run([MicroBatch(*rows) for rows in zip(*parts, strict=True)])
    state.advance(config)
