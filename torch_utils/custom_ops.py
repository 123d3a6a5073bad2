# SPDX-License-Identifier: Apache-2.0
"""From kernel source to a launch: compiled by NVRTC at first use, kept on disk, loaded once for each device.

Without a compiler everything runs by the operators' references, and one warning says why and what helps.
"""
import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dnnlib.util import UserError, first_line, make_cache_dir_path
from torch_utils import distributed
from torch_utils.kernels import driver, nvrtc, nvrtc_process
from torch_utils.kernels.cubin_cache import CubinCache, key_of
from torch_utils.kernels.nvrtc import CompileError

SOURCE_FOLDER = Path(__file__).resolve().parent / 'ops' / 'csrc'
MODES = ('auto', 'cuda', 'torch')
KEY_FORMAT = '1'  # counts what key_of hashes and how code is compiled
MAX_PLAIN_SHARED_BYTES = 48 * 1024  # more needs an attribute that launch does not set


@dataclass(frozen=True)
class Kernel:
    """One specialisation of one entry point of csrc/`source`; defines: (macro, value), sorted."""

    source: str
    entry: str
    defines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return ' '.join([f'{self.source}:{self.entry}', *(f'{name}={value}' for name, value in self.defines)])


@dataclass
class _State:
    """What this process has decided, loaded and said."""

    mode: str = 'auto'
    usable: dict[torch.device, bool] = field(default_factory=dict)
    loaded: dict[tuple[Kernel, int], driver.Function | None] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    noted: dict[Kernel, None] | None = None  # an ordered set


_state = _State()


def set_mode(mode: str) -> None:
    """'auto': kernels where they can be had; 'cuda': an error where they cannot; 'torch': never kernels.

    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f'{mode=} must be one of {MODES}')
    _state.mode = mode
    _state.usable.clear()


def get_mode() -> str:
    """The mode in force."""
    return _state.mode


def reset() -> None:
    """Forget what was loaded, decided and said: the next call starts afresh, in mode 'auto'."""
    _state.loaded.clear()
    _state.said.clear()
    set_mode('auto')


def is_available(device: torch.device) -> bool:
    """Whether kernels can be compiled for and launched on `device`. The first "no" for a CUDA device warns.

    Raises UserError instead in mode 'cuda'.
    """
    usable = _state.usable.get(device)
    if usable is None:
        usable = _state.usable[device] = _decide(device)
    return usable


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on `device`, with the remedy, in one line; None if they can."""
    if device.type != 'cuda':
        return f'the device is {device.type}'
    if torch.version.cuda is None:
        return 'this torch is not built for CUDA'
    if _state.mode == 'torch':
        return 'the mode is torch'
    if nvrtc.problem():
        return nvrtc.problem()
    try:
        architecture_of(device)
        driver.library()
    except (RuntimeError, OSError) as error:  # CompileError and DriverError are RuntimeErrors
        return first_line(error)
    return None


def architecture_of(device: torch.device) -> str:
    """What kernels for a CUDA device are compiled for: 'sm_XX', or 'compute_XX' if it is newer than NVRTC."""
    return nvrtc.architecture_for(torch.cuda.get_device_capability(device))


@contextlib.contextmanager
def noting() -> Iterator[dict[Kernel, None]]:
    """Within this context kernels that are not loaded yet are noted in the result instead; operators run by
    their references meanwhile.
    """
    before, _state.noted = _state.noted, {}
    try:
        yield _state.noted
    finally:
        _state.noted = before


def obtain_all(
    kernels: Iterable[Kernel], arch: str, num_processes: int | None = None, folder: Path = SOURCE_FOLDER,
) -> int:
    """`obtain` them side by side, so that loading finds them on the disk; returns how many could be had.

    num_processes: a share of the processors by default. Failures are told when a kernel is loaded.
    """
    cache, kernels = default_cache(), list(kernels)
    names = {key(kernel, arch, nvrtc.release(), folder): kernel for kernel in kernels}
    missing = {name: kernel for name, kernel in names.items() if cache.load(name) is None}
    jobs = [job_for(kernel, arch, folder) for kernel in missing.values()]
    if num_processes is None:
        # A process that compiles less than two kernels takes longer to start than it saves.
        cpus = (os.cpu_count() or 1) // distributed.local_world_size()
        num_processes = max(min(cpus, len(jobs) // 2), 1)
    names_in_order = list(missing)

    def keep(i: int, result: bytes | CompileError) -> None:
        if isinstance(result, bytes):
            _keep(cache, names_in_order[i], result)

    results = nvrtc_process.run_all(jobs, num_processes, keep)
    return len(names) - sum(isinstance(result, CompileError) for result in results)


def launch(
    kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int],
    args: Sequence[torch.Tensor | int | float | None], device: torch.device, shared_bytes: int = 0,
) -> None:
    """Run a kernel on the current stream of `device`.

    args: a tensor becomes its pointer, None a null pointer, an int a long long, a float a double.
    Raises CompileError if the kernel cannot be had or does not fit the device (after one warning), ValueError
    for too many shared_bytes, RuntimeError for what has gone wrong before.
    """
    if shared_bytes > MAX_PLAIN_SHARED_BYTES:
        raise ValueError(f'{shared_bytes=} exceeds the {MAX_PLAIN_SHARED_BYTES} that every device grants')
    index = torch.cuda.current_device() if device.index is None else device.index
    function = _loaded(kernel, index)
    if function is None:
        raise CompileError(f'{kernel} is not available')
    try:
        driver.launch(function, grid, block, shared_bytes, _stream(index), pack(args))
    except driver.DriverError as error:
        if not error.is_refusal:
            raise
        _state.loaded[kernel, index] = None
        _give_up(kernel, error)
        raise CompileError(f'{kernel} cannot be launched ({error})') from error


def pack(args: Sequence[torch.Tensor | int | float | None]) -> list[int | float]:
    """Kernel arguments as integers (pointers, long long) and floats (double)."""
    return [_PACKERS[type(value)](value) for value in args]


def key(kernel: Kernel, arch: str, release: str, folder: Path = SOURCE_FOLDER) -> str:
    """Name of the compiled kernel in the cache.

    release: CUDA release of the compiler, whether nvcc or NVRTC: what one has built ahead of time, the other
    finds. All headers of `folder` count, whether included or not.
    """
    options = (arch, release, nvrtc.CXX_STANDARD, str(nvrtc.FAST_MATH), kernel.entry, repr(kernel.defines))
    return key_of(KEY_FORMAT, *options, _source(kernel, folder), *_headers(folder))


def compile_cubin(
    kernel: Kernel, arch: str, folder: Path = SOURCE_FOLDER, report: Callable[[str], object] | None = None,
) -> bytes:
    """Compile for 'sm_XX' (or to PTX for 'compute_XX') with NVRTC, without a GPU and without the cache.

    report(text): called with the registers, memory and spills that the compiler tells. Raises CompileError
    with the compiler's complaint, UserError if there is no compiler.
    """
    return nvrtc.compile_source(*_recipe(kernel, arch, folder), report)


def job_for(kernel: Kernel, arch: str, folder: Path = SOURCE_FOLDER) -> nvrtc_process.Job:
    """What compile_cubin does, for another process. Raises UserError if there is no compiler."""
    return nvrtc.job_for(*_recipe(kernel, arch, folder))


def obtain(kernel: Kernel, arch: str, cache: CubinCache | None = None, folder: Path = SOURCE_FOLDER) -> bytes:
    """The compiled kernel from the cache, else compiled and put there. Raises as compile_cubin does."""
    cache = cache or default_cache()
    name = key(kernel, arch, nvrtc.release(), folder)
    code = cache.load(name)
    if code is None:
        code = compile_cubin(kernel, arch, folder)
        _keep(cache, name, code)
    return code


def default_cache() -> CubinCache:
    """The cache that launches use: 'ops' in the project's cache folder."""
    return CubinCache(make_cache_dir_path('ops'))


def warn_once(message: str) -> None:
    """Warn on rank 0, the first time that this message comes up."""
    if message not in _state.said:
        _state.said.add(message)
        if distributed.rank() == 0:
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _keep(cache: CubinCache, name: str, code: bytes) -> None:
    """Store compiled code; one warning if that fails."""
    try:
        cache.store(name, code)
    except OSError as error:
        warn_once(f'Compiled kernels cannot be kept in {cache.folder} ({error.strerror}), so that every '
                  f'start compiles them again; set DNNLIB_CACHE_DIR to a folder that can be written')


def _decide(device: torch.device) -> bool:
    reason = why_not(device)
    if reason is None or device.type != 'cuda' or _state.mode == 'torch':
        return reason is None
    if _state.mode == 'cuda':
        raise UserError(f'--ops=cuda: kernels cannot run on {device}: {reason} (or use --ops=auto)')
    warn_once(f'Operators run by their PyTorch references, which is slower: {reason}')
    return False


def _loaded(kernel: Kernel, index: int) -> driver.Function | None:
    """The kernel on CUDA device `index`, compiled and loaded at first use; None after a warning, or if it is
    only noted. Raises UserError instead of the warning in mode 'cuda'.
    """
    name = (kernel, index)
    if name not in _state.loaded and _state.noted is not None:
        _state.noted[kernel] = None
        return None
    if name not in _state.loaded:
        _state.loaded[name] = _load(kernel, torch.device('cuda', index))
    return _state.loaded[name]


def _load(kernel: Kernel, device: torch.device) -> driver.Function | None:
    """The kernel on the device, which has a number, or None after a warning."""
    try:
        code = obtain(kernel, architecture_of(device))
        return driver.load(code, kernel.entry, device.index)
    except (RuntimeError, OSError) as error:  # CompileError and DriverError are RuntimeErrors
        _give_up(kernel, error)
    return None


def _give_up(kernel: Kernel, error: Exception) -> None:
    """Warn of a kernel that cannot be used. Raises UserError in mode 'cuda'."""
    message = f'Kernel {kernel} cannot be used ({first_line(error)})'
    if _state.mode == 'cuda':
        raise UserError(f'--ops=cuda: {message}; run python -m torch_utils.doctor') from error
    warn_once(f'{message}; its PyTorch reference is used. To see what is wrong: python -m torch_utils.doctor')


def _stream(index: int) -> int:
    """The handle of the thread's current stream."""
    return _raw_stream(index) if _raw_stream else torch.cuda.current_stream(index).cuda_stream


@functools.cache
def _text(path: Path, modified_ns: int) -> str:
    return path.read_text(encoding='utf-8')


def _read(path: Path) -> str:
    return _text(path, os.stat(path).st_mtime_ns)


def _source(kernel: Kernel, folder: Path) -> str:
    return _read(folder / kernel.source)


def _recipe(kernel: Kernel, arch: str, folder: Path) -> tuple:
    """What nvrtc.job_for takes."""
    return _source(kernel, folder), kernel.source, kernel.defines, arch, (str(folder),)


def _headers(folder: Path) -> list[str]:
    """Name and text of each header, in the order of names."""
    return [text for path in sorted(folder.glob('*.cuh')) for text in (path.name, _read(path))]


# What compiled code asks, too; a builtin call instead of a Python object for every launch.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, '_cuda_getCurrentRawStream', None)
# By exact type: cheaper than a chain of isinstance, and this runs for every argument of every launch.
_PACKERS = {
    torch.Tensor: torch.Tensor.data_ptr, torch.nn.Parameter: torch.Tensor.data_ptr, int: int, bool: int,
    float: float, type(None): lambda _: 0}
