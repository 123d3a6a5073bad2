# SPDX-License-Identifier: Apache-2.0
"""Modes, availability, loading and launching of kernels; what needs a GPU is marked so."""
import warnings

import pytest
import torch

from dnnlib.util import UserError
from torch_utils import custom_ops
from torch_utils.custom_ops import Kernel
from torch_utils.kernels import driver, nvrtc, nvrtc_process

CUDA = torch.device('cuda', 0)
DOUBLE_IT = '''#include "twice.cuh"
extern "C" __global__ void double_it(const REAL* x, REAL* y, long long size, double add, const float* none) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < size && none == nullptr) y[i] = twice(x[i]) + (REAL)add;
}
'''
HEADER = '__device__ inline float twice(float v) { return FACTOR * v; }\n'
KERNEL = Kernel('double.cu', 'double_it', (('FACTOR', '2'), ('REAL', 'float')))


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No decision of another test, and a cache of its own."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    custom_ops.reset()
    yield
    custom_ops.reset()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'csrc').mkdir()
    (tmp_path / 'csrc' / 'double.cu').write_text(DOUBLE_IT)
    (tmp_path / 'csrc' / 'twice.cuh').write_text(HEADER)
    return tmp_path / 'csrc'


@pytest.fixture
def fake_gpu(monkeypatch):
    """A torch that says it has a GPU of capability 9.0; nothing can be run on it."""
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, 'problem', lambda: None)
    monkeypatch.setattr(driver, 'library', lambda: None)
    monkeypatch.setattr(nvrtc, 'architectures', lambda: (75, 80, 90))


@pytest.fixture
def launches(monkeypatch, fake_gpu):
    """What would reach the driver: (function, grid, block, shared_bytes, stream, values)."""
    seen = []
    monkeypatch.setattr(driver, 'launch', lambda *a: seen.append(a))
    monkeypatch.setattr(custom_ops, '_stream', lambda index: 77 + index)
    return seen


def messages(caught):
    return [str(w.message) for w in caught]


def test_nothing_is_available_on_a_cpu_and_that_is_no_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert not custom_ops.is_available(torch.device('cpu'))
    assert not caught and 'cpu' in custom_ops.why_not(torch.device('cpu'))


def test_a_missing_compiler_warns_once_with_cause_and_command(fake_gpu, monkeypatch):
    monkeypatch.setattr(nvrtc, 'problem', lambda: 'cuda-bindings is missing; run: pip install cuda-bindings')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert not any(custom_ops.is_available(torch.device('cuda', i)) for i in (0, 1, 0))
    assert len(caught) == 1 and 'pip install cuda-bindings' in messages(caught)[0]


def test_mode_cuda_is_an_error_where_auto_would_fall_back(fake_gpu, monkeypatch):
    monkeypatch.setattr(nvrtc, 'problem', lambda: 'the compiler is gone')
    custom_ops.set_mode('cuda')
    with pytest.raises(UserError, match=r'--ops=cuda.*compiler is gone'):
        custom_ops.is_available(CUDA)


def test_mode_torch_never_uses_kernels_and_says_nothing(fake_gpu):
    custom_ops.set_mode('torch')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert not custom_ops.is_available(CUDA)
    assert not caught
    custom_ops.set_mode('auto')
    assert custom_ops.is_available(CUDA)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='gpu'"):
        custom_ops.set_mode('gpu')
    assert custom_ops.get_mode() == 'auto'


@pytest.mark.skipif(nvrtc.problem() is not None, reason='no NVRTC')
def test_a_device_that_the_compiler_has_forgotten_is_left_to_torch(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (6, 1))
    with pytest.warns(RuntimeWarning, match=r'capability 6\.1'):
        assert not custom_ops.is_available(CUDA)


def test_arguments_become_pointers_integers_and_doubles():
    x = torch.zeros(3)
    packed = custom_ops.pack((x, torch.nn.Parameter(x), None, 2 ** 40, True, -0.5))
    assert packed == [x.data_ptr(), x.data_ptr(), 0, 2 ** 40, 1, -0.5]
    assert [type(value) for value in packed] == [int] * 5 + [float]


def test_an_argument_of_another_type_is_refused():
    with pytest.raises(KeyError):
        custom_ops.pack(['text'])


def test_a_launch_passes_stream_geometry_and_arguments(launches, monkeypatch):
    monkeypatch.setattr(custom_ops, '_load', lambda kernel, device: 'function')
    x = torch.zeros(3)
    custom_ops.launch(KERNEL, (4, 1, 1), (256, 1, 1), (x, None, 3), CUDA, shared_bytes=64)
    assert launches == [('function', (4, 1, 1), (256, 1, 1), 64, 77, [x.data_ptr(), 0, 3])]


def test_a_kernel_is_loaded_once_for_each_device(launches, monkeypatch):
    loads = []
    monkeypatch.setattr(custom_ops, '_load', lambda kernel, device: loads.append(device) or 'function')
    for index in (0, 1, 0):
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), torch.device('cuda', index))
    assert loads == [torch.device('cuda', 0), torch.device('cuda', 1)]


def test_more_shared_memory_than_is_granted_is_refused(launches, monkeypatch):
    monkeypatch.setattr(custom_ops, '_load', lambda kernel, device: 'function')
    with pytest.raises(ValueError, match='shared_bytes=50000'):
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), CUDA, shared_bytes=50000)


@pytest.fixture
def broken_kernel(fake_gpu, monkeypatch):
    def fail(*args):
        raise custom_ops.CompileError('line 3: error: nonsense')
    monkeypatch.setattr(custom_ops, 'obtain', fail)


def test_a_kernel_that_does_not_compile_warns_once_and_stays_unavailable(broken_kernel):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            with pytest.raises(custom_ops.CompileError):
                custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), CUDA)
    assert len(caught) == 1
    assert all(part in messages(caught)[0] for part in ('double_it', 'FACTOR=2', 'nonsense', 'doctor'))


def test_a_kernel_that_does_not_compile_is_an_error_in_mode_cuda(broken_kernel):
    custom_ops.set_mode('cuda')
    with pytest.raises(UserError, match='nonsense'):
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), CUDA)


def test_kernels_that_are_only_noted_are_neither_compiled_nor_warned_of(broken_kernel):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with custom_ops.noting() as wanted, pytest.raises(custom_ops.CompileError):
            custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), CUDA)
    assert list(wanted) == [KERNEL]
    with pytest.warns(RuntimeWarning, match='nonsense'), pytest.raises(custom_ops.CompileError):
        custom_ops.launch(KERNEL, (1, 1, 1), (1, 1, 1), (), CUDA)


@pytest.mark.skipif(nvrtc.problem() is not None, reason='no NVRTC')
def test_kernels_are_obtained_side_by_side_and_failures_are_left_for_later(folder, monkeypatch):
    kernels = [Kernel('double.cu', 'double_it', (('FACTOR', factor), ('REAL', 'float')))
               for factor in ('2', '3', 'nonsense')]
    assert custom_ops.obtain_all(kernels, 'sm_90', num_processes=2, folder=folder) == 2
    monkeypatch.setattr(nvrtc_process, 'run_all', lambda jobs, *_: [nvrtc.CompileError('')] * len(jobs))
    assert custom_ops.obtain_all(kernels, 'sm_90', folder=folder) == 2
    monkeypatch.setattr(nvrtc, 'compile_source', lambda *args: pytest.fail('compiled again'))
    assert custom_ops.obtain(kernels[0], 'sm_90', folder=folder).startswith(b'\x7fELF')


@pytest.mark.parametrize(('kernels', 'cpus', 'ranks', 'processes'), [
    (24, 4, 1, 4), (24, 16, 8, 2), (5, 16, 1, 2), (1, 16, 1, 1), (24, 2, 8, 1)])
def test_as_many_processes_compile_as_gain_something(monkeypatch, kernels, cpus, ranks, processes):
    asked = []
    monkeypatch.setattr(custom_ops.os, 'cpu_count', lambda: cpus)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    monkeypatch.setattr(nvrtc, 'job_for', lambda *recipe: recipe)
    monkeypatch.setattr(nvrtc, 'release', lambda: '13.0')
    monkeypatch.setattr(custom_ops, '_source', lambda kernel, folder: '')
    monkeypatch.setattr(
        nvrtc_process, 'run_all', lambda jobs, number, keep: asked.append(number) or [b'code'] * len(jobs))
    all_kernels = [Kernel('f.cu', f'f{i}', ()) for i in range(kernels)]
    assert custom_ops.obtain_all(all_kernels, 'sm_90') == kernels and asked == [processes]
    assert custom_ops.obtain_all(all_kernels, 'sm_90') == kernels


def test_the_key_depends_on_everything_that_the_code_depends_on(folder):
    def key(kernel=KERNEL, arch='sm_90', release='13.0'):
        return custom_ops.key(kernel, arch, release, folder)
    keys = [key(), key(arch='sm_80'), key(release='12.9'), key(Kernel('double.cu', 'other', KERNEL.defines)),
            key(Kernel('double.cu', 'double_it', (('FACTOR', '3'),)))]
    (folder / 'twice.cuh').write_text(HEADER + '// changed\n')
    keys.append(key())
    (folder / 'double.cu').write_text(DOUBLE_IT + '// changed\n')
    keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[-1]




@pytest.fixture
def on_gpu(folder, monkeypatch):
    """Kernels from the test's own folder, and a launch of y = 2 * x + 0.5."""
    if nvrtc.problem():
        pytest.skip(nvrtc.problem())
    code = custom_ops.obtain(KERNEL, custom_ops.architecture_of(CUDA), folder=folder)
    monkeypatch.setattr(custom_ops, 'obtain', lambda kernel, arch: code)

    def run(x, y):
        custom_ops.launch(KERNEL, (-(-x.numel() // 64), 1, 1), (64, 1, 1), (x, y, x.numel(), 0.5, None), CUDA)
    return run


@pytest.mark.gpu
def test_a_kernel_runs_on_the_current_stream(on_gpu):
    x = torch.arange(1000.0, device=CUDA)
    y, stream = torch.empty_like(x), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_gpu(x, y)
    stream.synchronize()
    assert torch.equal(y, 2 * x + 0.5)


@pytest.mark.gpu
def test_a_kernel_can_be_captured_in_a_graph(on_gpu):
    x = torch.zeros(1000, device=CUDA)
    y, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
    on_gpu(x, y)  # compiles and loads
    with torch.cuda.graph(graph):
        on_gpu(x, y)
    x.fill_(3.0)
    graph.replay()
    assert torch.equal(y, torch.full_like(y, 6.5))
