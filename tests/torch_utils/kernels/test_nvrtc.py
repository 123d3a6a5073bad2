# SPDX-License-Identifier: Apache-2.0
"""The run-time compiler: what it makes for which architecture, what it says when something is missing or
wrong.
"""
import pytest
import torch

from dnnlib.util import UserError
from torch_utils.kernels import nvrtc

SOURCE = '#include <cuda_fp16.h>\nextern "C" __global__ void f(__half* x) { x[0] = __float2half(N); }\n'
needs_compiler = pytest.mark.skipif(nvrtc.problem() is not None, reason='no NVRTC')


@pytest.fixture
def afresh(monkeypatch):
    """problem() and what it asks without the memory of earlier calls, and without leaving one."""
    cached = [nvrtc.problem, nvrtc.include_folder, nvrtc.release]
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


@needs_compiler
@pytest.mark.parametrize('arch', ['sm_75', 'sm_80', 'sm_90', 'sm_120'])
def test_machine_code_comes_out_for_every_architecture(arch):
    code = nvrtc.compile_source(SOURCE, 'f.cu', (('N', '1.0f'),), arch, ())
    assert code.startswith(b'\x7fELF') and b'f' in code


@needs_compiler
def test_ptx_comes_out_for_a_virtual_architecture():
    code = nvrtc.compile_source(SOURCE, 'f.cu', (('N', '1.0f'),), 'compute_80', ())
    assert b'.target sm_80' in code and b'.entry f' in code


@needs_compiler
@pytest.mark.parametrize(('source', 'arch', 'said'), [
    (SOURCE, 'sm_80', r'f\.cu.*error.*N'), ('#include "gone.cuh"\n', 'sm_80', 'gone.cuh'),
    (SOURCE, 'sm_1', 'architecture')])
def test_a_compilation_that_fails_says_why_in_one_line(source, arch, said):
    with pytest.raises(nvrtc.CompileError, match=said) as caught:
        nvrtc.compile_source(source, 'f.cu', (), arch, ())
    assert '\n' not in str(caught.value)


def test_a_newer_device_gets_ptx_and_an_older_one_an_error(monkeypatch):
    monkeypatch.setattr(nvrtc, 'architectures', lambda: (75, 80, 90))
    monkeypatch.setattr(nvrtc, 'release', lambda: '13.0')
    assert [nvrtc.architecture_for(c) for c in [(8, 0), (9, 0), (8, 6), (12, 1)]] == [
        'sm_80', 'sm_90', 'compute_80', 'compute_90']
    with pytest.raises(nvrtc.CompileError, match=r'CUDA 13\.0.*7\.0'):
        nvrtc.architecture_for((7, 0))


@pytest.mark.parametrize('torch_cuda', ['13.0', None])
def test_without_cuda_bindings_the_problem_names_one_command(afresh, torch_cuda):
    afresh.setattr(torch.version, 'cuda', torch_cuda)
    afresh.setattr(nvrtc, 'bindings_version', lambda: None)
    problem = nvrtc.problem()
    assert "missing; run: pip install 'cuda-bindings==13" in problem and '\n' not in problem
    with pytest.raises(UserError, match='cuda-bindings is missing'):
        nvrtc.compile_source(SOURCE, 'f.cu', (), 'sm_80', ())


@pytest.mark.parametrize(('torch_cuda', 'bindings', 'command'), [
    ('12.8', '13.0.3', "'cuda-bindings==12.*' nvidia-cuda-nvrtc-cu12"),
    ('13.0', '12.9.1', "'cuda-bindings==13.*' nvidia-cuda-nvrtc ")])
def test_bindings_must_have_the_major_version_of_torch(afresh, torch_cuda, bindings, command):
    afresh.setattr(torch.version, 'cuda', torch_cuda)
    afresh.setattr(nvrtc, 'bindings_version', lambda: bindings)
    assert command in nvrtc.problem() and torch_cuda in nvrtc.problem()


def test_a_compiler_that_does_not_load_is_a_problem(afresh):
    def gone():
        raise RuntimeError('libnvrtc.so.13 not found\nand more')
    afresh.setattr(nvrtc, 'bindings_version', lambda: '13.0.3')
    afresh.setattr(torch.version, 'cuda', '13.0')
    afresh.setattr(nvrtc, 'release', gone)
    assert 'libnvrtc.so.13 not found' in nvrtc.problem() and 'and more' not in nvrtc.problem()


def test_headers_are_found_in_cuda_home_where_no_package_has_them(afresh, tmp_path):
    (tmp_path / 'include').mkdir()
    (tmp_path / 'include' / nvrtc.HALF_HEADER).touch()
    afresh.setattr(nvrtc.importlib.util, 'find_spec', lambda name: None)
    afresh.setenv('CUDA_HOME', str(tmp_path))
    assert nvrtc.include_folder() == str(tmp_path / 'include')


@pytest.mark.parametrize(('log', 'said'), [
    ('a.cu(3): warning: x\n\na.cu(4): error: y\n', 'a.cu(4): error: y'), ('\nplain\n', 'plain'),
    ('', 'no output')])
def test_the_complaint_is_the_first_error(log, said):
    assert nvrtc.complaint(log) == said
