# SPDX-License-Identifier: Apache-2.0
"""How fast a device is at the operations that a training consists of, by a measurement of about a second."""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.capacity.count import Kind, Work

PROBE_SEC, MIN_CALLS = 0.03, 3  # of each measurement
ENOUGH_SEC = 1.0  # then fewer calls will do: some datatypes are very slow on some processors
PROBE_FLOP = {'cpu': 4e8, 'cuda': 1e11}
PROBE_NUMEL = {'cpu': 2 ** 20, 'cuda': 2 ** 26}  # about an activation of a small and of a large network
PROBE_SIDES = (64, 32, 16)  # pixels, the first that is affordable; more are no faster
PROBED_SHARE = 0.95  # of the arithmetic; the rest is taken to be as fast as the slowest
PASSES = 3  # a convolution, and the gradients of its two arguments
# Small layers, filters and Python cost more than what is probed: 1.6 and 1.0 times as much in two networks of
# 16 and 64 feature maps on a CPU.
OVERHEAD = 1.3


@dataclass(frozen=True)
class Speed:
    """What a device was measured to do. flop_per_sec: of convolutions, by kind.  bytes_per_sec: of
    element-wise operations.  call_sec: the least time of an operation.
    """

    flop_per_sec: dict[Kind, float]
    bytes_per_sec: float
    call_sec: float

    def seconds(self, work: Work) -> float:
        """About how long the work takes, one operation after the other; measured within a factor of two."""
        slowest = min(self.flop_per_sec.values())
        computing = sum(flop / self.flop_per_sec.get(kind, slowest) for kind, flop in work.flop.items())
        moving = work.bytes / self.bytes_per_sec
        return OVERHEAD * (computing + moving + work.calls * self.call_sec)


def measure_speed(
    work: Work, device: torch.device, batch: int, *, cudnn_benchmark: bool = True, allow_tf32: bool = False,
) -> Speed:
    """Measure the device at the kinds of arithmetic that make up most of the work.

    batch: pictures at a time.  cudnn_benchmark, allow_tf32: as in the training.
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
    """How many times as fast as in float32 the device convolves `width` feature maps in another datatype.

    batch: pictures at a time.  Takes some tenths of a second.
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
    # As the networks have it: see training.networks._compute_format.
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
    """Bytes per second of an addition: two tensors read, one written."""
    a, b = torch.ones([2, PROBE_NUMEL[device.type]], device=device)
    return 3 * a.numel() * a.element_size() / _seconds(lambda: a + b, device)


def _call(device: torch.device) -> float:
    """Seconds of an operation on next to nothing, with its share of autograd."""
    x = torch.ones([8], device=device, requires_grad=True)

    def step() -> None:
        torch.autograd.grad((x * x).sum(), x)  # 6 operations

    return _seconds(step, device) / 6


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Time of a call, after one to warm up: the shortest, since all disturbances make it longer."""
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
