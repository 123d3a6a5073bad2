# SPDX-License-Identifier: Apache-2.0
"""Loading and launching against a driver that is as strict as CUDA's about threads, devices and captures."""
import contextlib
import threading

import driver_stand_in
import pytest
import torch
from driver_stand_in import words

from torch_utils import custom_ops
from torch_utils.custom_ops import Kernel
from torch_utils.kernels import driver as cuda_driver
from torch_utils.kernels import nvrtc
from torch_utils.ops._registry import Op

pytestmark = pytest.mark.skipif(not driver_stand_in.is_possible(), reason='needs g++ on Linux')
KERNEL, CUDA = Kernel('f.cu', 'f', ()), torch.device('cuda', 0)
ONE = ((1, 1, 1), (32, 1, 1), 0, 0)  # grid, block, shared memory, stream


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    return driver_stand_in.build(tmp_path_factory.mktemp('driver'))


@pytest.fixture
def driver(built, monkeypatch):
    def forget():
        for function in (cuda_driver.library, cuda_driver._primary_context):
            function.cache_clear()
    monkeypatch.setattr(cuda_driver, 'LIBRARY', str(built))
    forget()
    driver = driver_stand_in.Driver(built)
    driver.library.cuCtxSetCurrent(None)
    driver.set(num_launches=0, num_words=0, is_capturing=0, launch_status=0, init_status=0)
    yield driver
    forget()


@pytest.fixture
def gpu(driver, monkeypatch):
    """A torch that says it has a GPU of capability 9.0, whose kernels are compiled already."""
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, 'problem', lambda: None)
    monkeypatch.setattr(nvrtc, 'architectures', lambda: (90,))
    monkeypatch.setattr(custom_ops, 'obtain', lambda kernel, arch: b'cubin')
    monkeypatch.setattr(custom_ops, '_stream', lambda index: 70 + index)
    custom_ops.reset()
    yield driver
    custom_ops.reset()


def in_a_thread(function):
    """The result of function() in a thread of its own, or its error."""
    results = []

    def run():
        try:
            results.append(function())
        except RuntimeError as error:
            results.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_a_kernel_is_loaded_and_launched_with_eight_bytes_an_argument(driver):
    driver.set(num_words=5)
    function = cuda_driver.load(b'cubin', 'f', 0)
    assert function.num_regs == 42
    cuda_driver.launch(function, (4, 3, 2), (64, 2, 1), 128, 77, [2 ** 40, -3, 0.5, 0, -0.25])
    (launch,) = driver.launches
    assert list(launch.geometry) == [4, 3, 2, 64, 2, 1, 128] and launch.stream == 77
    assert words(launch, 'qqdqd') == [2 ** 40, -3, 0.5, 0, -0.25]


def test_what_one_launch_passes_is_not_left_for_the_next(driver):
    driver.set(num_words=2)
    function = cuda_driver.load(b'cubin', 'f', 0)
    for values in ([1, 2.5], [2.5, 1], [0, 0]):
        cuda_driver.launch(function, *ONE, values)
    first, second, third = driver.launches
    assert words(first, 'qd') == [1, 2.5] and words(second, 'dq') == [2.5, 1] and words(third, 'qq') == [0, 0]


def test_a_thread_without_a_context_gets_that_of_the_device(gpu):
    def launch():
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), CUDA)
    launch()
    assert in_a_thread(launch) is None and len(gpu.launches) == 2


def test_backward_launches_from_a_thread_that_has_called_nothing_before(gpu):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (grad,), CUDA)
            return 2 * grad
    x = torch.ones(3, requires_grad=True)
    assert in_a_thread(lambda: Twice.apply(x).sum().backward()) is None
    assert x.grad.tolist() == [2, 2, 2] and len(gpu.launches) == 1


def test_each_launch_runs_on_the_device_of_its_tensors_and_leaves_the_current_one(gpu):
    current = []
    for index in (0, 1, 0):
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), torch.device('cuda', index))
        place = cuda_driver.c_void_p()
        gpu.library.cuCtxGetCurrent(cuda_driver.ctypes.byref(place))
        current.append(place.value)
    assert [launch.stream for launch in gpu.launches] == [70, 71, 70]
    first, second, third = (launch.function for launch in gpu.launches)
    assert first == third != second
    # The first launch found no current device.
    assert current == [cuda_driver._primary_context(0)] * 3


def test_a_kernel_may_be_loaded_while_a_graph_is_captured(driver, monkeypatch):
    driver.set(is_capturing=1)
    assert cuda_driver.load(b'cubin', 'f', 0).num_regs == 42
    monkeypatch.setattr(cuda_driver, '_relaxed', contextlib.nullcontext)
    with pytest.raises(cuda_driver.DriverError, match=r'cuModuleLoadData.*CAPTURE_UNSUPPORTED.*900'):
        cuda_driver.load(b'cubin', 'f', 0)


@pytest.mark.parametrize(('code', 'entry', 'said'), [(b'nonsense', 'f', '200'), (b'cubin', 'g', '500')])
def test_code_that_does_not_load_is_a_runtime_error(driver, code, entry, said):
    with pytest.raises(RuntimeError, match=said):
        cuda_driver.load(code, entry, 0)


def test_a_driver_that_does_not_start_is_named_as_the_reason(gpu):
    cuda_driver.library.cache_clear()
    gpu.set(init_status=999)
    assert 'cuInit' in custom_ops.why_not(CUDA)


def test_no_driver_is_a_reason_and_not_a_crash(gpu, monkeypatch):
    cuda_driver.library.cache_clear()
    monkeypatch.setattr(cuda_driver, 'LIBRARY', 'libnothing.so.0')
    assert 'libnothing' in custom_ops.why_not(CUDA)
    with pytest.warns(RuntimeWarning, match='libnothing'):
        assert not custom_ops.is_available(CUDA)


@pytest.fixture
def op(gpu):
    """An operator with a kernel, run as on a GPU, on CPU tensors."""
    def native(x):
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (x,), CUDA)
        return x + 1
    op = Op('f', lambda x: x + 2, None, None, None, native)
    custom_ops._state.usable[torch.device('cpu')] = True
    return op


def test_a_launch_that_the_device_refuses_falls_back_with_one_warning(op, gpu):
    assert op.run_native(torch.zeros(())) == 1
    gpu.set(launch_status=701)
    with pytest.warns(RuntimeWarning, match=r'OUT_OF_RESOURCES.*doctor') as caught:
        assert [op.run_native(torch.zeros(())).item() for _ in range(2)] == [2, 2]
    assert len(caught) == 1


def test_code_that_the_device_refuses_falls_back_with_one_warning(op, monkeypatch):
    monkeypatch.setattr(custom_ops, 'obtain', lambda kernel, arch: b'for another device')
    with pytest.warns(RuntimeWarning, match=r'cuModuleLoadData.*200') as caught:
        assert [op.run_native(torch.zeros(())).item() for _ in range(2)] == [2, 2]
    assert len(caught) == 1


def test_an_error_of_an_earlier_kernel_is_not_hidden_by_a_fallback(op, gpu):
    gpu.set(launch_status=700)
    with pytest.raises(cuda_driver.DriverError, match='700'):
        op.run_native(torch.zeros(()))
