# SPDX-License-Identifier: Apache-2.0
"""Timeline of iterations: copy to the device, kernels, copy back."""
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
    """Milliseconds of one iteration. h2d, d2h: copies between host and device.  total: includes gaps between
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
    """Timestamps: CUDA events on a GPU, else the host clock."""

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
        """Between two timestamps; waits for the device."""
        start, end = self.moments[first], self.moments[last]
        if self._on_gpu:
            end.synchronize()
            return start.elapsed_time(end)
        return (end - start) * 1000


def time_steps(run: ProfiledRun, num_steps: int) -> Iterator[StepTime]:
    """Time iterations one by one, as in training, with lazy regularisation where it is due.

    Copied to the device: images and labels of a batch; copied back: the losses and the last generated
    images.
    """
    clock = PhaseClock(run.device)
    with _last_output(run) as generated:
        for _ in range(num_steps):
            batch = run.pixels()
            back = torch.empty([0])
            watch = _Stopwatch(run.device)
            watch.mark()
            # copy=True: copies the same amount of memory also on a CPU.
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
    """The settings: network, resolution, batch, steps, learning rates, and device."""
    config = run.config
    height, width = config.data.size
    clock = ('CUDA events' if run.device.type == 'cuda' else
             'the host clock; H2D and D2H are copies of the same size within host memory')
    return '\n'.join([
        f'Step timer: {name}, resolution {width}x{height}, batch {config.batch_size}, steps {num_steps}, '
        f'learning rates G {config.G_opt.lr:g}, D {config.D_opt.lr:g}',
        f'Device: {device_name}; times by {clock}.'])


def timeline_line(index: int, step: StepTime) -> str:
    """'Iter 0 | H2D ... ms | Kern ... ms | D2H ... ms | Tot ... ms'."""
    return f'Iter {index} | {step}'


def timeline_summary(steps: list[StepTime]) -> str:
    """Medians without the first iteration, which includes one-time setup."""
    counted = steps[1:] or steps
    middle = StepTime(*[median(getattr(step, name) for step in counted)
                        for name in ('h2d', 'kern', 'd2h', 'total')])
    return f'Median | {middle}'


@contextlib.contextmanager
def _last_output(run: ProfiledRun) -> Iterator[list[torch.Tensor]]:
    """A list that contains the last generated images, within the context."""
    generated: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        generated[:] = [output.detach()]

    # Losses call the synthesis network of a generator if it has one.
    hook = getattr(run.state.G, 'synthesis', run.state.G).register_forward_hook(keep)
    try:
        yield generated
    finally:
        hook.remove()
