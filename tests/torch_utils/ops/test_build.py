# SPDX-License-Identifier: Apache-2.0
"""Building ahead of time: which compiler, what is written, and that launches find it."""
import click.testing
import pytest
import torch

from dnnlib.util import UserError
from torch_utils import custom_ops
from torch_utils.custom_ops import Kernel
from torch_utils.kernels import nvrtc, nvrtc_process
from torch_utils.kernels.cubin_cache import CubinCache
from torch_utils.ops import build
from torch_utils.ops.variants import HOT, all_variants

needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason='no NVRTC')
needs_nvcc = pytest.mark.skipif(isinstance(build.find_toolkit(), str), reason='no nvcc or no ninja')
SOURCE = 'extern "C" __global__ void f(float* x) { x[0] = NUMBER(VALUE); }\n'
GOOD = [Kernel('f.cu', 'f', (('NUMBER', 'float'), ('VALUE', str(n)))) for n in (1, 2)]
BAD = Kernel('f.cu', 'f', (('NUMBER', 'unheard_of'), ('VALUE', '1')))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'a folder'
    folder.mkdir()
    (folder / 'f.cu').write_text(SOURCE)
    return folder


def plan_for(kernels, folder, archs=('sm_80',)):
    jobs = tuple((kernel, arch) for arch in archs for kernel in kernels)
    return build.Plan(jobs, CubinCache(folder / 'cache'), folder)


@pytest.fixture
def compilers(monkeypatch):
    """Pretend: compilers('12.8', None) has nvcc of CUDA 12.8 and no NVRTC."""
    def set_(nvcc, nvrtc_release):
        toolkit = build.Toolkit('/bin/nvcc', '/bin/ninja', nvcc) if nvcc else 'there is no nvcc'
        monkeypatch.setattr(build, 'find_toolkit', lambda: toolkit)
        monkeypatch.setattr(nvrtc, 'problem', lambda: None if nvrtc_release else 'there is no NVRTC')
        monkeypatch.setattr(nvrtc, 'release', lambda: nvrtc_release)
    return set_


def test_architectures_are_read_and_checked():
    assert build.parse_archs('sm_90, sm_80,sm_90,') == ['sm_90', 'sm_80']
    for wrong in ['', 'sm90', 'sm_80,9.0', ',']:
        with pytest.raises(UserError, match='--arch='):
            build.parse_archs(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_the_architecture_must_be_given():
    with pytest.raises(UserError, match='--arch is missing'):
        build.archs_here()


@pytest.mark.parametrize(('nvcc', 'runtime', 'wanted', 'chosen', 'said'), [
    ('13.0', '13.0', 'auto', 'nvcc', 'under ninja'),
    ('12.8', '13.0', 'auto', 'nvrtc', 'nvcc is of CUDA 12.8'),
    (None, '13.0', 'auto', 'nvrtc', 'no nvcc'), ('13.0', None, 'auto', 'nvcc', 'under ninja'),
    ('12.8', '13.0', 'nvcc', 'nvcc', 'look for what CUDA 13.0'), ('13.0', '13.0', 'nvrtc', 'nvrtc', 'NVRTC')])
def test_auto_takes_nvcc_only_where_launches_find_its_work(compilers, nvcc, runtime, wanted, chosen, said):
    compilers(nvcc, runtime)
    toolkit, note = build.choose(wanted)
    assert (toolkit is None) == (chosen == 'nvrtc') and said in note


@pytest.mark.parametrize('wanted', build.COMPILERS)
def test_a_compiler_that_is_missing_is_an_error(compilers, wanted):
    compilers(None, None)
    with pytest.raises(UserError, match='there is no'):
        build.choose(wanted)


@needs_nvrtc
def test_what_nvrtc_builds_is_what_launches_look_for(folder, monkeypatch):
    plan = plan_for(GOOD, folder, ('sm_80', 'sm_90'))
    assert build.build(plan, None, jobs=1) == (4, [])
    monkeypatch.setattr(custom_ops, 'compile_cubin', lambda *a: pytest.fail('compiled again'))
    assert custom_ops.obtain(GOOD[0], 'sm_90', plan.cache, folder).startswith(b'\x7fELF')
    assert build.build(plan, None, jobs=1) == (0, [])


@needs_nvrtc
def test_nvrtc_in_several_processes_reports_what_fails_and_builds_the_rest(folder):
    built, failures = build.build(plan_for([*GOOD, BAD], folder), None, jobs=2)
    assert built == 2 and [job for job, _ in failures] == [(BAD, 'sm_80')] and 'unheard_of' in failures[0][1]


@needs_nvcc
def test_nvcc_under_ninja_reports_what_fails_and_builds_the_rest(folder):
    plan, toolkit = plan_for([*GOOD, BAD], folder), build.find_toolkit()
    built, failures = build.build(plan, toolkit, jobs=2)
    assert built == 2 and [job for job, _ in failures] == [(BAD, 'sm_80')] and 'unheard_of' in failures[0][1]
    assert plan.missing(toolkit.release) == [(BAD, 'sm_80')]
    assert plan.cache.load(custom_ops.key(GOOD[1], 'sm_80', toolkit.release, folder)).startswith(b'\x7fELF')


def test_the_ninja_file_has_one_target_for_each_job(folder, tmp_path):
    build.write_ninja_file(tmp_path, plan_for(GOOD, folder), [(GOOD[0], 'sm_80'), (GOOD[1], 'sm_90')],
                           build.Toolkit('/opt/cu da/nvcc', 'ninja', '13.0'))
    text = (tmp_path / 'build.ninja').read_text()
    assert "'/opt/cu da/nvcc' -cubin" in text
    assert 'a$ folder/f.cu' in text and 'options = -arch=sm_90 -DNUMBER=float -DVALUE=2' in text
    assert text.count('\nbuild ') == 2


@needs_nvrtc
def test_the_command_builds_counts_and_fails_with_status_2(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, 'all_variants', lambda: HOT[:1])
    run = ['--arch=sm_75', f'--cache={tmp_path / "c"}', '--jobs=1', '--compiler=nvrtc']
    for said in ['1 kernels built, 0 already', '0 kernels built, 1 already']:
        result = click.testing.CliRunner().invoke(build.command, run)
        assert result.exit_code == 0 and said in result.output
    wrong = Kernel('bias_act.cu', 'f', (('SCALAR_T', 'nonsense'),))
    monkeypatch.setattr(build, 'all_variants', lambda: [wrong])
    monkeypatch.setattr('sys.argv', ['build', *run])
    with pytest.raises(SystemExit) as left:
        build.main()
    assert left.value.code == 2 and '1 of 1 kernels' in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(compilers, monkeypatch, tmp_path, capsys):
    compilers(None, '13.0')
    monkeypatch.setattr(custom_ops, 'job_for', lambda *recipe: None)
    monkeypatch.setattr(nvrtc_process, 'run_all', lambda jobs, number, finished: finished(0, b'code'))
    monkeypatch.setattr(build, 'all_variants', lambda: HOT[:1])
    (tmp_path / 'file').touch()
    monkeypatch.setattr('sys.argv', ['build', '--arch=sm_75', '--jobs=1', f'--cache={tmp_path}/file/cache'])
    with pytest.raises(SystemExit) as left:
        build.main()
    assert left.value.code == 2 and '--cache' in capsys.readouterr().err


@needs_nvrtc
@pytest.mark.parametrize('arch', ['sm_75', 'sm_80', 'sm_90', 'sm_120'])
def test_one_kernel_of_each_source_compiles(arch):
    sources = {kernel.source: kernel for kernel in all_variants()}
    for kernel in sources.values():
        assert custom_ops.compile_cubin(kernel, arch).startswith(b'\x7fELF')
