# SPDX-License-Identifier: Apache-2.0
"""Which implementation each operator uses here, and whether it is correct: `python -m torch_utils.doctor`."""
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch

from dnnlib.cli import run_command
from dnnlib.util import first_line
from torch_utils import custom_ops
from torch_utils.kernels import nvrtc
from torch_utils.kernels.cubin_cache import CubinCache
from torch_utils.ops import layers, warp, warp_cuda  # noqa: F401 (layers registers the other operators)
from torch_utils.ops._registry import OPS, Op
from torch_utils.ops.variants import HOT

TOLERANCE = 1e-4  # of float32 against float64, relative to the largest value
TIMED_RUNS = 10
TEST_ARCH = 'sm_80'  # compilation target of the test without a GPU
SHAPE = (2, 16, 32, 32)  # activations of the self-test: [N, C, H, W]
OUT_CHANNELS, IMAGE_CHANNELS = 8, 3
LRELU = ('lrelu', 0.2, 1.25)  # act, alpha, gain
FIX_OP = 'report it with this page, and train with --ops=torch meanwhile'


@dataclass(frozen=True)
class OpCheck:
    """Implementation of an operator, its error (None: it failed) and its time."""

    name: str
    implementation: str
    error: float | None = None
    time_us: float = 0.0
    problem: str | None = None


def versions() -> list[tuple[str, str]]:
    """(component, version) of everything that the operators depend on."""
    return [
        ('python', platform.python_version()), ('torch', torch.__version__),
        ('CUDA of torch', torch.version.cuda or 'none (CPU build)'), ('driver', driver_version()),
        ('cuda-bindings', nvrtc.bindings_version() or 'not installed'),
        ('NVRTC', 'not usable' if nvrtc.problem() else nvrtc.release()), ('GPU', ', '.join(gpus()) or 'none')]


def driver_version() -> str:
    """Version of the NVIDIA driver; 'none' without one."""
    program = shutil.which('nvidia-smi')
    if program is None:
        return 'none'
    query = [program, '--query-gpu=driver_version', '--format=csv,noheader']
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    lines = result.stdout.split() if result.returncode == 0 else []
    return lines[0] if lines else 'not answering'


def best_device() -> torch.device:
    """The current GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device('cpu')
    return torch.device('cuda', torch.cuda.current_device())


def gpus() -> list[str]:
    """Name and compute capability of each GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f'{gpu.name} (capability {gpu.major}.{gpu.minor})' for gpu in found]


def machine_problems() -> Iterator[str]:
    """One line per problem outside the operators, with its remedy."""
    if torch.version.cuda and not torch.cuda.is_available():
        yield (f'torch is built for CUDA {torch.version.cuda} but finds no usable GPU; install an NVIDIA '
               f'driver that supports it, or the CPU build of torch')
    if torch.cuda.is_available():
        reason = custom_ops.why_not(best_device())
        if reason:
            yield f'the GPU runs without compiled kernels: {reason}'
    reason = cache_problem(custom_ops.default_cache())
    if reason:
        yield reason


def cache_problem(cache: CubinCache) -> str | None:
    """Why the cache folder cannot be written; None if it can."""
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.folder):
            return None
    except OSError as error:
        return (f'the cache folder {cache.folder} cannot be written ({error.strerror}); set DNNLIB_CACHE_DIR '
                f'to a writable folder')


def compiler_line() -> tuple[str, str | None]:
    """(how long one kernel takes to compile, or why none can be compiled; a problem or None)."""
    if nvrtc.problem():
        return f'no kernels can be compiled: {nvrtc.problem()}', None
    arch, start = TEST_ARCH, time.perf_counter()
    if torch.cuda.is_available():
        arch = custom_ops.architecture_of(best_device())
    try:
        size = len(custom_ops.compile_cubin(HOT[0], arch))
    except nvrtc.CompileError as error:
        problem = f'{HOT[0]} does not compile for {arch} ({error}); run: {nvrtc.install_command()}'
        return 'compilation fails', problem
    return f'one kernel for {arch}: {time.perf_counter() - start:.2f} s, {size} bytes', None


def self_test_arguments(name: str, dtype: torch.dtype, device: torch.device) -> tuple | None:
    """Arguments for the operator `name`, the same values in any dtype; None for an unknown operator."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    make = _ARGUMENTS.get(name)
    return None if make is None else make(randn)


def check_op(op: Op, device: torch.device) -> OpCheck:
    """Run an operator in float32 on `device` and compare it with its reference in float64 on the CPU."""
    arguments = self_test_arguments(op.name, torch.float32, device)
    if arguments is None:
        return OpCheck(op.name, 'unknown', problem=f'{op.name} has no self-test; {FIX_OP}')
    try:
        implementation = implementation_of(op, arguments, device)
        # Fallbacks on a GPU are convolutions, which would otherwise round to TF32.
        with torch.backends.cudnn.flags(allow_tf32=False):
            got, time_us = _timed(lambda: op.run(*arguments), device)
    except RuntimeError as error:
        return OpCheck(op.name, 'failed', problem=f'{op.name} fails: {first_line(error)}; {FIX_OP}')
    wanted = op.reference(*self_test_arguments(op.name, torch.float64, torch.device('cpu')))
    error = difference(got, wanted)
    wrong = None if error <= TOLERANCE else f'{op.name} by {implementation} is wrong by {error:.1e}; {FIX_OP}'
    return OpCheck(op.name, implementation, error, time_us, wrong)


def implementation_of(op: Op, arguments: tuple, device: torch.device) -> str:
    """Implementation used for these arguments on `device`, and the reason if it is not a kernel."""
    if op.native is None:
        return 'PyTorch (has no kernel)'
    if device.type != 'cuda':
        return f'PyTorch (the device is {device.type})'
    if not custom_ops.is_available(device):
        return 'PyTorch (see below)'
    try:
        return 'PyTorch (the kernel does not cover this)' if op.native(*arguments) is None else 'CUDA kernel'
    except custom_ops.CompileError as error:
        return f'PyTorch ({error})'


def difference(got: torch.Tensor | tuple, wanted: torch.Tensor | tuple) -> float:
    """Largest difference relative to the largest value, over all results; infinite if a shape differs."""
    pairs = [(got, wanted)] if isinstance(got, torch.Tensor) else list(zip(got, wanted, strict=True))
    return max(_relative(a, b) for a, b in pairs)


@click.command()
def command() -> None:
    """Show versions, the kernel cache and the implementation of every operator, and test all operators. Exits
    with status 1 if there is a problem.
    """
    device = best_device()
    for name, version in versions():
        click.echo(f'{name:14} {version}')
    cache = custom_ops.default_cache()
    files, size = cache.usage()
    click.echo(f'{"cache":14} {cache.folder} ({files} kernels, {size / 1e6:.1f} MB)')
    compiler, compiler_problem = compiler_line()
    click.echo(f'{"compiler":14} {compiler}')
    problems = [*machine_problems(), *([compiler_problem] if compiler_problem else [])]
    click.echo(f'\n{"operator":24} {"error":>8} {"us":>8}  on {device}: implementation')
    for op in OPS.values():
        finding = check_op(op, device)
        error = 'failed' if finding.error is None else f'{finding.error:.1e}'
        click.echo(f'{finding.name:24} {error:>8} {finding.time_us:8.1f}  {finding.implementation}')
        problems += [finding.problem] if finding.problem else []
    click.echo('\n' + '\n'.join([f'Problem: {line}' for line in problems] or ['Nothing is wrong.']))
    if problems:
        click.get_current_context().exit(1)


def main() -> None:
    """Entry point."""
    run_command(command)


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape or not torch.isfinite(got).all():
        return float('inf')
    if got.numel() == 0:
        return 0.0
    scale = max(float(wanted.abs().max()), 1.0)
    return float((got.double().cpu() - wanted.double()).abs().max()) / scale


def _timed(run: Callable, device: torch.device) -> tuple[object, float]:
    """(the result, microseconds per run)."""
    result = run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(TIMED_RUNS):
        run()
    _wait(device)
    return result, (time.perf_counter() - start) / TIMED_RUNS * 1e6


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _taps(randn: Callable) -> torch.Tensor:
    """A filter, which is float32 for activations of any dtype."""
    return randn(4, 4).float()


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] in channels_last, for operators whose kernels support nothing else."""
    return x.contiguous(memory_format=torch.channels_last)


def _warp_arguments(randn: Callable, shape: tuple[int, ...], size: list[int]) -> tuple:
    """Arguments of warp and warp_adjoint: a rotation with scaling and translation."""
    matrix = torch.tensor([[[0.6, -0.4, 0.1], [0.3, 0.5, -0.2], [0.0, 0.0, 1.0]]])
    x = randn(_N, IMAGE_CHANNELS, *shape)
    taps = randn(warp_cuda.TAPS).float()
    return x, taps / taps.abs().sum(), matrix.expand(_N, -1, -1).to(x.device), size, [3, 4, 5, 2]


_N, _C, _H, _W = SHAPE
_WARPED = [2 * _H, _W]
# Name of an operator -> function from randn(*shape) to its arguments.
_ARGUMENTS: dict[str, Callable[[Callable], tuple]] = {
    'upfirdn2d': lambda r: (r(*SHAPE), _taps(r), [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0),
    'upfirdn2d_plus': lambda r: (
        r(*SHAPE), _taps(r), [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0, r(_N, _C, 2 * _H, 2 * _W)),
    'bias_act': lambda r: (r(*SHAPE), r(_C), 1, *LRELU, 1.5),
    'bias_act_grad': lambda r: (r(*SHAPE), r(*SHAPE), *LRELU, 1.5),
    'bias_act_grad_both': lambda r: (r(*SHAPE), r(*SHAPE), *LRELU, 1.5),
    'bias_act_plus': lambda r: (r(*SHAPE), r(_C), r(*SHAPE), *LRELU, 1.5),
    'bias_act_input_grad': lambda r: (r(*SHAPE), r(*SHAPE), r(_C), True, *LRELU, 1.5),
    'activated_filter': lambda r: (_nhwc(r(*SHAPE)), _taps(r), [1, 2, 1, 2], False, r(_C), *LRELU, 1.5),
    'filtered_input_grad': lambda r: (
        _nhwc(r(*SHAPE)), _taps(r), [1, 2, 1, 2], False, _nhwc(r(*SHAPE)), r(_C), True, *LRELU, 1.5),
    'filtered_scale_grad': lambda r: (
        _nhwc(r(*SHAPE)), _taps(r), [1, 2, 1, 2], False, 2.0, _nhwc(r(*SHAPE)), r(_N, _C)),
    'bias_act_curvature': lambda r: (r(*SHAPE), r(*SHAPE), r(*SHAPE), 'swish', 1.25, -1.0),
    'scaled_cast': lambda r: (r(OUT_CHANNELS, _C, 3, 3), 0.1, r(1).dtype),
    'scale_channels': lambda r: (r(*SHAPE), r(_N, _C)),
    'scale_channels_grad': lambda r: (r(*SHAPE), r(*SHAPE), r(_N, _C)),
    'modulated_epilogue': lambda r: (r(*SHAPE), r(_N, _C), r(_N, 1, _H, _W), r(_C), *LRELU, 1.5),
    'modulated_epilogue_grad': lambda r: (
        r(*SHAPE), r(*SHAPE), r(*SHAPE), r(_N, _C), [_N, 1, _H, _W], [True] * 4, *LRELU, 1.5),
    'filtered_epilogue': lambda r: (
        r(*SHAPE), _taps(r), [1, 2, 1, 2], False, 2.0, r(_N, _C), r(_N, 1, _H, _W), r(_C), *LRELU, 1.5),
    'scaled_filtered_epilogue': lambda r: (
        r(*SHAPE), _taps(r), [1, 2, 1, 2], False, 2.0, r(_N, _C), r(_N, 1, _H, _W), r(_C), r(_N, _C), True,
        *LRELU, 1.5),
    'scaled_epilogue_grad': lambda r: (
        r(*SHAPE), r(*SHAPE), r(*SHAPE), r(_N, _C), [_N, 1, _H, _W], [True] * 4, *LRELU, 1.5),
    'pixel_product': lambda r: (_nhwc(r(*SHAPE)), r(_N, IMAGE_CHANNELS, _C), r(IMAGE_CHANNELS), False),
    'pixel_outer': lambda r: (r(_N, IMAGE_CHANNELS, _H, _W), _nhwc(r(*SHAPE))),
    'pixel_layer': lambda r: (
        r(_N, IMAGE_CHANNELS, _H, _W), r(_N, _C, IMAGE_CHANNELS), r(_C), True, *LRELU, 1.5),
    'pixel_layer_grad': lambda r: (
        _nhwc(r(*SHAPE)), _nhwc(r(*SHAPE)), r(_N, IMAGE_CHANNELS, _H, _W), r(_N, _C, IMAGE_CHANNELS),
        [True] * 3, *LRELU, 1.5),
    'warp': lambda r: _warp_arguments(r, (_H, _W), _WARPED),
    'warp_adjoint': lambda r: _warp_arguments(r, tuple(_WARPED), [_H, _W]),
    'demodulation': lambda r: (r(OUT_CHANNELS, _C, 3, 3), r(_N, _C), 1e-8),
    'modulation': lambda r: (r(OUT_CHANNELS, _C, 3, 3), r(_N, _C), 1e-8, True, r(1).dtype),
    'modulation_grad': lambda r: (
        r(OUT_CHANNELS, _C, 3, 3), r(_N, _C), r(_N, OUT_CHANNELS), r(OUT_CHANNELS, _C), r(OUT_CHANNELS),
        r(_N), r(OUT_CHANNELS, _C, 3, 3), r(_N, _C), r(_N, OUT_CHANNELS), None, [True] * 2),
    'modulated_weight': lambda r: (r(OUT_CHANNELS, _C, 3, 3), r(_N, _C), r(_N, OUT_CHANNELS), r(1).dtype),
}

if __name__ == '__main__':
    main()
