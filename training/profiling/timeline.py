# SPDX-License-Identifier: Apache-2.0
"""Each iteration's time by its parts: copy to the device, kernels, copy back."""
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from training.iteration import PhaseClock
from training.profiling.record import ProfiledRun

PARTS = ('H2D', 'Kern', 'D2H')


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one iteration. h2d, d2h: copies between host and device.  total: with what is between
    the parts.
    """

    h2d: float
    kern: float
    d2h: float
    total: float

    def __str__(self) -> str:
        return (f'H2D {self.h2d:8.3f} ms | Kern {self.kern:9.3f} ms | D2H {self.d2h:8.3f} ms | '
                f'Tot {self.total:9.3f} ms')


class _Stopwatch:
    """Moments on the time line of the device: events on a GPU, else the clock of the host."""

    def __init__(self, device: torch.device):
        self.device, self.moments = device, []
        self._on_gpu = device.type == 'cuda'

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def milliseconds(self, first: int, last: int) -> float:
        """Between two moments; waits for the device."""
        start, end = self.moments[first], self.moments[last]
        if self._on_gpu:
            end.synchronize()
            return start.elapsed_time(end)
        return (end - start) * 1000


def time_steps(run: ProfiledRun, num_steps: int) -> Iterator[StepTime]:
    """Time iterations one by one, each as it comes in a training: regularisation where it is due.

    To the device go the pictures and labels of a batch; back come the losses and the pictures that were
    generated last.
    """
    clock = PhaseClock(run.device)
    with _last_output(run) as generated:
        for _ in range(num_steps):
            batch = run.pixels()
            back = torch.empty([0])
            watch = _Stopwatch(run.device)
            watch.mark()
            # copy: on a CPU, where nothing need be moved, as much memory is copied all the same.
            real = tuple(t.to(run.device, non_blocking=True, copy=True) for t in batch)
            watch.mark()
            run.step(real, clock)
            losses = torch.stack([phase.total_loss for phase in run.phases])
            watch.mark()
            back = [t.to('cpu', copy=True) for t in (losses, *generated)]
            watch.mark()
            del back
            yield StepTime(*[watch.milliseconds(i, i + 1) for i in range(3)], watch.milliseconds(0, 3))


def timeline_header(run: ProfiledRun, name: str, num_steps: int, device_name: str) -> str:
    """What is measured: network, resolution, batch, steps, learning rates, and on what."""
    config = run.config
    height, width = config.data.size
    clock = ('CUDA events' if run.device.type == 'cuda' else
             'the clock of the host; H2D and D2H copy as much memory within the host')
    return '\n'.join([
        f'Step timer: {name}, resolution {width}x{height}, batch {config.batch_size}, steps {num_steps}, '
        f'learning rates G {config.G_opt.lr:g}, D {config.D_opt.lr:g}',
        f'Device: {device_name}; times by {clock}.'])


def timeline_line(index: int, step: StepTime) -> str:
    """'Iter 0 | H2D ... ms | Kern ... ms | D2H ... ms | Tot ... ms'."""
    return f'Iter {index} | {step}'


def timeline_summary(steps: list[StepTime]) -> str:
    """Medians without the first iteration, which makes what the others use again."""
    counted = steps[1:] or steps
    middle = StepTime(*[median(getattr(step, name) for step in counted)
                        for name in ('h2d', 'kern', 'd2h', 'total')])
    return f'Median | {middle}'


@contextlib.contextmanager
def _last_output(run: ProfiledRun) -> Iterator[list[torch.Tensor]]:
    """A list that holds the pictures generated last, while the context lasts."""
    generated: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        generated[:] = [output.detach()]

    # Losses call the parts of a generator; whatever else there is calls the whole.
    hook = getattr(run.state.G, 'synthesis', run.state.G).register_forward_hook(keep)
    try:
        yield generated
    finally:
        hook.remove()
