# SPDX-License-Identifier: Apache-2.0
"""The doctor: what it shows, what it finds wrong, and its exit status."""
import click.testing
import pytest
import torch

from torch_utils import custom_ops, doctor
from torch_utils.kernels import nvrtc
from torch_utils.kernels.cubin_cache import CubinCache
from torch_utils.ops._registry import OPS, Op

CPU = torch.device('cpu')
on_cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    custom_ops.reset()
    yield
    custom_ops.reset()


def doctored(reference, name='bias_act', wrong=None):
    """An operator of the registry with another implementation."""
    op = OPS[name]
    changed = Op(name, reference, op.fake, op.setup_context, op.backward)
    changed.kernels['cpu'] = wrong or reference
    return changed


def run():
    return click.testing.CliRunner().invoke(doctor.command, [])


@on_cpu_only
def test_a_cpu_machine_is_well_and_every_operator_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    result = run()
    assert result.exit_code == 0 and 'Nothing is wrong' in result.output
    shown = [*OPS, torch.__version__, 'cuda-bindings', 'driver', 'cache']
    assert all(name in result.output for name in shown)


@pytest.mark.parametrize('name', sorted(OPS))
def test_every_operator_has_a_self_test_and_passes_it(name, device):
    finding = doctor.check_op(OPS[name], device)
    assert finding.problem is None and finding.error <= doctor.TOLERANCE and finding.time_us > 0


def test_the_self_test_has_no_operators_that_are_gone():
    assert set(doctor._ARGUMENTS) == set(OPS)


def test_a_wrong_operator_is_found():
    reference = OPS['bias_act'].reference
    finding = doctor.check_op(doctored(reference, wrong=lambda *a: reference(*a) * 1.001), CPU)
    assert 'is wrong by' in finding.problem and '--ops=torch' in finding.problem


@pytest.mark.parametrize('wrong', [lambda r: r[:1], lambda r: r / 0])
def test_shapes_and_infinities_count_as_wrong(wrong):
    reference = OPS['bias_act'].reference
    finding = doctor.check_op(doctored(reference, wrong=lambda *a: wrong(reference(*a))), CPU)
    assert finding.error == float('inf') and finding.problem


def test_an_operator_that_fails_or_is_unknown_is_a_finding_too(monkeypatch):
    def fail(*args):
        raise RuntimeError('broken\ndetails')
    finding = doctor.check_op(doctored(fail), CPU)
    assert 'bias_act fails: broken;' in finding.problem and finding.error is None
    monkeypatch.delitem(doctor._ARGUMENTS, 'bias_act')
    assert 'no self-test' in doctor.check_op(OPS['bias_act'], CPU).problem


@on_cpu_only
def test_problems_are_listed_and_lead_to_status_1(monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(doctor, 'OPS', {})
    result = run()
    assert result.exit_code == 1 and 'Problem: torch is built for CUDA 13.0' in result.output


@on_cpu_only
def test_a_compiler_that_fails_is_a_problem_and_a_missing_one_is_not_without_a_gpu(monkeypatch):
    def fail(*args):
        raise nvrtc.CompileError('no header')
    monkeypatch.setattr(custom_ops, 'compile_cubin', fail)
    monkeypatch.setattr(nvrtc, 'problem', lambda: None)
    assert 'no header' in doctor.compiler_line()[1] and 'pip install' in doctor.compiler_line()[1]
    monkeypatch.setattr(nvrtc, 'problem', lambda: 'gone; run: pip')
    assert doctor.compiler_line() == ('no kernels can be compiled: gone; run: pip', None)


def test_a_gpu_without_kernels_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(custom_ops, 'why_not', lambda device: 'cuda-bindings is gone; run: pip')
    assert any('cuda-bindings is gone; run: pip' in line for line in doctor.machine_problems())


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path):
    assert doctor.cache_problem(CubinCache(tmp_path / 'new')) is None
    (tmp_path / 'file').touch()
    assert 'DNNLIB_CACHE_DIR' in doctor.cache_problem(CubinCache(tmp_path / 'file' / 'cache'))


def test_an_operator_says_why_it_does_not_use_a_kernel(monkeypatch):
    cuda, op = torch.device('cuda', 0), OPS['bias_act']
    assert 'cpu' in doctor.implementation_of(op, (), CPU)
    monkeypatch.setattr(custom_ops, 'is_available', lambda device: True)
    results = {'CUDA kernel': lambda: 1, 'not cover': lambda: None}
    for said, native in results.items():
        monkeypatch.setattr(op, 'native', native)
        assert said in doctor.implementation_of(op, (), cuda)
    monkeypatch.setattr(op, 'native', None)
    assert 'no kernel' in doctor.implementation_of(op, (), cuda)
