# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled kernels: hits, misses, damage, folders that cannot be written, many processes."""
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from torch_utils import custom_ops
from torch_utils.kernels import nvrtc
from torch_utils.kernels.cubin_cache import CubinCache, key_of

ROOT = Path(__file__).resolve().parents[3]
KERNEL = custom_ops.Kernel('f.cu', 'f', ())


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """A source, and a compiler that only counts."""
    (tmp_path / 'f.cu').write_text('extern "C" __global__ void f() {}\n')
    done = []
    monkeypatch.setattr(nvrtc, 'release', lambda: '13.0')
    monkeypatch.setattr(nvrtc, 'compile_source', lambda *a: done.append(a) or b'code of ' + a[3].encode())
    custom_ops.reset()
    yield done
    custom_ops.reset()


def test_what_is_stored_is_found_again(tmp_path):
    cache = CubinCache(tmp_path / 'new' / 'folder')
    assert cache.load('a') is None and cache.usage() == (0, 0)
    cache.store('a', b'code')
    cache.store('a', b'newer code')
    assert cache.load('a') == b'newer code' and cache.load('b') is None
    assert cache.usage() == (1, cache.path('a').stat().st_size)
    assert [p.name for p in cache.folder.iterdir()] == ['a.cubin']


@pytest.mark.parametrize('damage', [
    lambda d: d[:-1], lambda d: d[:10], lambda d: b'', lambda d: d + b'x', lambda d: d[:-1] + b'?',
    lambda d: b'?' + d[1:]], ids=['cut', 'header_cut', 'empty', 'longer', 'changed', 'other_file'])
def test_damaged_entries_are_not_used(tmp_path, damage):
    cache = CubinCache(tmp_path)
    cache.store('a', b'code')
    cache.path('a').write_bytes(damage(cache.path('a').read_bytes()))
    assert cache.load('a') is None


def test_a_key_knows_where_a_part_ends():
    assert key_of('ab', 'c') != key_of('a', 'bc') and key_of('ab') == key_of(b'ab') != key_of('ab', '')


def test_a_kernel_is_compiled_once_and_again_after_damage(tmp_path, compilations):
    cache = CubinCache(tmp_path / 'cache')
    for _ in range(2):
        assert custom_ops.obtain(KERNEL, 'sm_90', cache, tmp_path) == b'code of sm_90'
    assert len(compilations) == 1
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(b'damaged')
    assert custom_ops.obtain(KERNEL, 'sm_90', cache, tmp_path) == b'code of sm_90'
    assert len(compilations) == 2 and entry.read_bytes() != b'damaged'


def test_a_folder_that_cannot_be_made_costs_one_warning_and_no_kernel(tmp_path, compilations):
    (tmp_path / 'file').touch()
    cache = CubinCache(tmp_path / 'file' / 'cache')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            assert custom_ops.obtain(KERNEL, 'sm_80', cache, tmp_path) == b'code of sm_80'
    assert len(caught) == 1 and 'DNNLIB_CACHE_DIR' in str(caught[0].message)


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space'):
        CubinCache(tmp_path).store('a', b'code')
    assert not list(tmp_path.iterdir())


EIGHT = '''
import importlib.util, sys
spec = importlib.util.spec_from_file_location('cubin_cache', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
cache, code = module.CubinCache(sys.argv[2]), bytes(range(256)) * 2000
for i in range(50):
    key = f'key{i % 5}'
    found = cache.load(key)
    assert found is None or found == code, 'half a file was read'
    cache.store(key, code)
    assert cache.load(key) == code
'''


def test_eight_processes_at_once_do_no_harm(tmp_path):
    module = ROOT / 'torch_utils' / 'kernels' / 'cubin_cache.py'
    command = [sys.executable, '-S', '-c', EIGHT, str(module), str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 8, errors
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'key{i}.cubin' for i in range(5)]
