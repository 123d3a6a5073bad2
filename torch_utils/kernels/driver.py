# SPDX-License-Identifier: Apache-2.0
"""Loading and launching machine code through the C API of the CUDA driver.

libcuda comes with the GPU's driver, not with a Python package. The signatures of the few functions called
here have not changed since CUDA 10.1, and a call costs less than through the layers above.
"""
import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass

LIBRARY = 'nvcuda.dll' if sys.platform == 'win32' else 'libcuda.so.1'
ATTRIBUTE_NUM_REGS = 4
CAPTURE_MODE_RELAXED = 2
# Errors that leave the context usable: invalid arguments, code for another device, and blocks that need more
# registers or shared memory than the device has.
REFUSALS = frozenset([1, 98, 200, 209, 218, 220, 221, 222, 301, 400, 500, 701])
_SIGNATURES: dict[str, tuple] = {
    'cuInit': (c_uint,),
    'cuGetErrorName': (c_int, POINTER(c_char_p)),
    'cuDeviceGet': (POINTER(c_int), c_int),
    'cuDevicePrimaryCtxRetain': (POINTER(c_void_p), c_int),
    'cuCtxGetCurrent': (POINTER(c_void_p),),
    'cuCtxSetCurrent': (c_void_p,),
    'cuThreadExchangeStreamCaptureMode': (POINTER(c_int),),
    'cuModuleLoadData': (POINTER(c_void_p), c_void_p),
    'cuModuleGetFunction': (POINTER(c_void_p), c_void_p, c_char_p),
    'cuFuncGetAttribute': (POINTER(c_int), c_int, c_void_p),
    'cuLaunchKernel': (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p),
}


class DriverError(RuntimeError):
    """A call of the driver has failed with `code`, a CUresult."""

    def __init__(self, call: str, code: int, name: str):
        super().__init__(f'{call}: {name}')
        self.code = code

    @property
    def is_refusal(self) -> bool:
        """Whether only this call failed, so that a fallback can do the same work."""
        return self.code in REFUSALS


@dataclass(frozen=True)
class Function:
    """A loaded kernel, in the primary context of its device, which torch uses, too."""

    handle: int
    context: int
    num_regs: int


class _Thread(threading.local):
    """Objects that each thread reuses from launch to launch."""

    def __init__(self) -> None:
        self.context = c_void_p()
        self.buffers: dict[int, tuple] = {}


_thread = _Thread()


@functools.cache
def library() -> ctypes.CDLL:
    """The initialized driver. Raises OSError if there is none, DriverError if it fails to initialize."""
    driver = ctypes.CDLL(LIBRARY)
    for name, argtypes in _SIGNATURES.items():
        getattr(driver, name).argtypes = argtypes
    _check(driver, 'cuInit', driver.cuInit(0))
    return driver


def load(code: bytes, entry: str, index: int) -> Function:
    """The kernel `entry` of a cubin or PTX, ready to be launched on CUDA device `index`.

    May be called while a CUDA graph is captured. Raises OSError or DriverError.
    """
    driver, context = library(), _primary_context(index)
    module, handle, num_regs = c_void_p(), c_void_p(), c_int()
    with _current(driver, context), _relaxed(driver):
        _check(driver, 'cuModuleLoadData', driver.cuModuleLoadData(module, code))
        _check(driver, 'cuModuleGetFunction', driver.cuModuleGetFunction(handle, module, entry.encode()))
        # CUDA loads code lazily; querying an attribute forces loading now rather than at the first launch.
        _check(driver, 'cuFuncGetAttribute',
               driver.cuFuncGetAttribute(num_regs, ATTRIBUTE_NUM_REGS, handle))
    return Function(handle.value or 0, context, num_regs.value)


def launch(
    function: Function, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int,
    stream: int, values: Sequence[int | float],
) -> None:
    """Enqueue a kernel on a stream of its device. An int is passed as a long long, a float as a double.

    A thread without a context, as autograd's may be, gets that of the device; otherwise the current context
    is restored. Raises DriverError.
    """
    driver, current = library(), _thread.context
    _check(driver, 'cuCtxGetCurrent', driver.cuCtxGetCurrent(current))
    before = current.value
    if before != function.context:
        _check(driver, 'cuCtxSetCurrent', driver.cuCtxSetCurrent(function.context))
    try:
        status = driver.cuLaunchKernel(
            function.handle, *grid, *block, shared_bytes, stream, _parameters(values), None)
    finally:
        if before is not None and before != function.context:
            driver.cuCtxSetCurrent(before)
    _check(driver, 'cuLaunchKernel', status)


def _check(driver: ctypes.CDLL, call: str, status: int) -> None:
    if status:
        name = c_char_p()
        driver.cuGetErrorName(status, name)
        raise DriverError(call, status, (name.value or b'unknown error').decode() + f' ({status})')


@functools.cache
def _primary_context(index: int) -> int:
    driver, device, context = library(), c_int(), c_void_p()
    _check(driver, 'cuDeviceGet', driver.cuDeviceGet(device, index))
    _check(driver, 'cuDevicePrimaryCtxRetain', driver.cuDevicePrimaryCtxRetain(context, device.value))
    return context.value or 0


@contextlib.contextmanager
def _current(driver: ctypes.CDLL, context: int) -> Iterator[None]:
    """Make a context current within this block, and leave it current if there was none before."""
    before = c_void_p()
    _check(driver, 'cuCtxGetCurrent', driver.cuCtxGetCurrent(before))
    _check(driver, 'cuCtxSetCurrent', driver.cuCtxSetCurrent(context))
    try:
        yield
    finally:
        if before.value is not None:
            driver.cuCtxSetCurrent(before)


@contextlib.contextmanager
def _relaxed(driver: ctypes.CDLL) -> Iterator[None]:
    """Within this block the thread may make calls that would otherwise invalidate a capture in progress."""
    mode = c_int(CAPTURE_MODE_RELAXED)
    _check(driver, 'cuThreadExchangeStreamCaptureMode', driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def _parameters(values: Sequence[int | float]) -> ctypes.Array:
    """Pointers to the values, eight bytes each, in a thread-local buffer that the next call overwrites."""
    buffers = _thread.buffers.get(len(values))
    if buffers is None:
        buffers = _thread.buffers[len(values)] = _new_buffers(len(values))
    integers, doubles, pointers = buffers
    for i, value in enumerate(values):
        if type(value) is float:
            doubles[i] = value
        else:
            integers[i] = value
    return pointers


def _new_buffers(count: int) -> tuple:
    """One buffer as integers and as doubles, and pointers to its elements."""
    integers = (ctypes.c_int64 * count)()
    start = ctypes.addressof(integers)
    pointers = (c_void_p * count)(*(start + 8 * i for i in range(count)))
    return integers, (ctypes.c_double * count).from_address(start), pointers
