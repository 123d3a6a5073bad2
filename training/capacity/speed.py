# SPDX-License-Identifier: Apache-2.0
"""Benchmarks a device at the operations of a training, for about a second."""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.capacity.count import Kind, Work

PROBE_SEC, MIN_CALLS = 0.03, 3  # per measurement
ENOUGH_SEC = 1.0  # fewer than MIN_CALLS after this time: some dtypes are very slow on some CPUs
PROBE_FLOP = {'cpu': 4e8, 'cuda': 1e11}
PROBE_NUMEL = {'cpu': 2 ** 20, 'cuda': 2 ** 26}  # like activations of a small and of a large network
PROBE_SIDES = (64, 32, 16)  # pixels: the first one within PROBE_FLOP; larger ones are not more efficient
PROBED_SHARE = 0.95  # of the FLOPs; the rest is assumed to be as fast as the slowest kind
PASSES = 3  # forward, and gradients with respect to input and weight
# Small layers, filters and Python take more time than the probes predict: 1.6 and 1.0 times in two networks
# of 16 and 64 feature maps on a CPU.
OVERHEAD = 1.3


@dataclass(frozen=True)
class Speed:
    """Measured speed of a device. flop_per_sec: of convolutions, by kind.  bytes_per_sec: of element-wise
    operations.  call_sec: minimum time per operation.
    """

    flop_per_sec: dict[Kind, float]
    bytes_per_sec: float
    call_sec: float

    def seconds(self, work: Work) -> float:
        """Approximate time of the work without overlap; observed to be within a factor of two."""
        slowest = min(self.flop_per_sec.values())
        computing = sum(flop / self.flop_per_sec.get(kind, slowest) for kind, flop in work.flop.items())
        moving = work.bytes / self.bytes_per_sec
        return OVERHEAD * (computing + moving + work.calls * self.call_sec)


def measure_speed(
    work: Work, device: torch.device, batch: int, *, cudnn_benchmark: bool = True, allow_tf32: bool = False,
) -> Speed:
    """Measure the device at the kinds of arithmetic that account for most of the work.

    batch: images per pass.  cudnn_benchmark, allow_tf32: as in the training.
    Raises RuntimeError if the device lacks an operation.
    """
    kinds, covered = [], 0.0
    for kind, flop in sorted(work.flop.items(), key=lambda item: -item[1]):
        if covered < PROBED_SHARE * work.total_flop:
            kinds.append(kind)
        covered += flop
    settings = {'enabled': True, 'benchmark': cudnn_benchmark, 'allow_tf32': allow_tf32}
    with torch.backends.cudnn.flags(**settings), torch.random.fork_rng([]):
        flop_per_sec = {kind: _arithmetic(kind, device, batch) for kind in kinds}
        return Speed(flop_per_sec, _movement(device), _call(device))


def relative_speed(dtype: torch.dtype, width: int, device: torch.device, batch: int) -> float:
    """Speed of convolutions of `width` feature maps in a dtype, relative to float32.

    batch: images per pass.  Takes a few tenths of a second.
    """
    with torch.random.fork_rng([]):
        return _arithmetic((dtype, width), device, batch) / _arithmetic((torch.float32, width), device, batch)


def _arithmetic(kind: Kind, device: torch.device, batch: int) -> float:
    """Floating-point operations per second of a 3x3 convolution and its gradients, or of a matrix product."""
    dtype, width = kind
    budget = PROBE_FLOP[device.type]
    if width == 0:
        x = torch.randn([512, 512], device=device, dtype=dtype)
        return 2 * 512 ** 3 / _seconds(lambda: x @ x, device)
    per_pixel = PASSES * 2 * 9 * width ** 2
    side = next((s for s in PROBE_SIDES if s * s * per_pixel <= budget), PROBE_SIDES[-1])
    n = max(min(int(budget / (side * side * per_pixel)), batch), 1)
    # Same as in training.networks._compute_format.
    is_nhwc = device.type == 'cpu' or dtype != torch.float32
    layout = torch.channels_last if is_nhwc else torch.contiguous_format
    x = torch.randn([n, width, side, side], device=device, dtype=dtype).to(memory_format=layout)
    weight = torch.randn([width, width, 3, 3], device=device, dtype=dtype).requires_grad_()
    x.requires_grad_()

    def step() -> None:
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, [x, weight], y.detach())

    return n * side * side * per_pixel / _seconds(step, device)


def _movement(device: torch.device) -> float:
    """Bytes per second of an addition, which reads two tensors and writes one."""
    a, b = torch.ones([2, PROBE_NUMEL[device.type]], device=device)
    return 3 * a.numel() * a.element_size() / _seconds(lambda: a + b, device)


def _call(device: torch.device) -> float:
    """Seconds per operation on a tiny tensor, including autograd."""
    x = torch.ones([8], device=device, requires_grad=True)

    def step() -> None:
        torch.autograd.grad((x * x).sum(), x)  # 6 operations

    return _seconds(step, device) / 6


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Minimum time of a call, after a warm-up; the minimum is least affected by other processes."""
    step()
    times: list[float] = []
    while sum(times) < PROBE_SEC or (len(times) < MIN_CALLS and sum(times) < ENOUGH_SEC):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
