# SPDX-License-Identifier: Apache-2.0
"""Processes that compile: the same code as here, failures as here, and none of them left afterwards."""
import subprocess
import sys

import pytest

from torch_utils.kernels import nvrtc, nvrtc_process

needs_compiler = pytest.mark.skipif(nvrtc.problem() is not None, reason='no NVRTC')
SOURCE = 'extern "C" __global__ void f(float* x) { x[0] = N; }\n'
SERVE = '''
import json, sys
for line in sys.stdin.buffer:
    job = json.loads(line)
    if job['text'] == 'die':
        sys.exit(3)
    error = 'no' if job['text'] == 'bad' else None
    print(json.dumps({'size': 2, 'error': error}) + '\\nok', end='', flush=True)
'''


@pytest.fixture
def started(monkeypatch):
    """All processes that were started."""
    processes, start = [], subprocess.Popen

    def popen(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]
    monkeypatch.setattr(nvrtc_process.subprocess, 'Popen', popen)
    yield processes
    assert all(process.poll() is not None for process in processes)


def jobs(*texts):
    return [nvrtc_process.Job(text, 'f.cu', ()) for text in texts]


def said(results):
    return [r if isinstance(r, bytes) else str(r) for r in results]


@needs_compiler
def test_a_process_compiles_what_would_be_compiled_here(started):
    wanted = [nvrtc.job_for(SOURCE, 'f.cu', (('N', n),), arch, ())
              for n, arch in (('1', 'sm_80'), ('nonsense', 'sm_80'), ('2', 'compute_90'))]
    cubin, error, ptx = nvrtc_process.run_all(wanted, 2)
    assert (cubin, ptx) == (wanted[0].run(), wanted[2].run()) and len(started) == 2
    assert isinstance(error, nvrtc.CompileError) and 'f.cu' in str(error) and 'nonsense' in str(error)


def test_each_job_goes_to_one_process_and_results_keep_their_order(started, monkeypatch):
    monkeypatch.setattr(nvrtc_process, 'COMMAND', (sys.executable, '-c', SERVE))
    assert said(nvrtc_process.run_all(jobs('a', 'bad', 'b', 'bad', 'c'), 3)) == [
        b'ok', 'no', b'ok', 'no', b'ok']
    assert len(started) == 3


def test_a_process_that_ends_costs_its_jobs_and_hangs_nobody(started, monkeypatch):
    monkeypatch.setattr(nvrtc_process, 'COMMAND', (sys.executable, '-c', SERVE))
    assert said(nvrtc_process.run_all(jobs('a', 'die', 'b'), 1)) == [
        b'ok', *['the compiler process has exited'] * 2]


def test_an_error_in_what_follows_a_result_ends_everything(started, monkeypatch):
    monkeypatch.setattr(nvrtc_process, 'COMMAND', (sys.executable, '-c', SERVE))
    seen = []

    def full(i, result):
        seen.append(i)
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'):
        nvrtc_process.run_all(jobs('a', 'b', 'c'), 1, full)
    assert seen == [0]


def test_without_any_process_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(nvrtc_process, 'COMMAND', ('/no/such/program',))
    assert said(nvrtc_process.run_all(jobs('a'), 2)) == ['the compiler process has exited']
    assert nvrtc_process.run_all([], 2) == []


def test_a_process_imports_no_torch():
    code = ('import sys, torch_utils.kernels.nvrtc_process\n'
            'assert not {"torch", "numpy", "click"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], cwd=nvrtc_process.ROOT, check=True)
