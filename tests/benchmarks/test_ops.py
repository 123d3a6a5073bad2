# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the operators: as a program, and with small stand-ins for kernels."""
import json
import time
from types import SimpleNamespace

import pytest
import torch
from benchmark_programs import benchmark_module, run_benchmark

from dnnlib.util import UserError
from torch_utils import custom_ops
from torch_utils.ops._registry import memory_format_of
from torch_utils.ops.variants import HOT

SIZE = (2, 8, 16, 32)
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def ops():
    with benchmark_module('ops') as module:
        yield module


@pytest.fixture
def clock(ops, monkeypatch):
    monkeypatch.setitem(ops.FLUSH_BYTES, 'cpu', 1024)
    monkeypatch.setattr(ops, 'MAX_RUNS', 5)
    return ops.Clock(CPU)


def maker(ops, layout='nchw', dtype=torch.float32):
    return ops.Maker(SIZE, dtype, ops.LAYOUTS[layout], CPU)


def test_it_times_references_on_a_cpu_and_writes_what_it_prints(tmp_path):
    path = tmp_path / 'o.json'
    done = run_benchmark('ops', '--device=cpu', '--size=2x8x16x32', '--only=scale_channels,down2 4x4',
                         f'--json={path}')
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert written['environment']['torch'] == torch.__version__
    rows = {row['case']: row for row in written['rows']}
    large, small, scales, taps = 2 * 8 * 16 * 32 * 4, 2 * 8 * 8 * 16 * 4, 2 * 8 * 4, 16 * 4
    assert {name: row['bytes'] for name, row in rows.items()} == {
        f'{name} 2x8x16x32 fp32 {layout}': size for layout in ('nchw', 'nhwc')
        for name, size in (('scale_channels', 2 * large + scales), ('down2 4x4', large + small + taps))}
    for row in rows.values():
        assert row['by'] == 'reference' and row['us'] == row['reference_us'] > 0 and row['copy_percent'] > 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith('case') and lines[-1].startswith('0 kernels') and len(lines) == 7


def test_two_files_are_compared_case_by_case(ops, tmp_path, capsys):
    paths = [tmp_path / 'old.json', tmp_path / 'new.json']
    for path, us in zip(paths, (30, 20), strict=True):
        path.write_text(json.dumps({'rows': [{'case': 'a', 'us': us}, {'case': path.stem, 'us': 1}]}))
    ops.compare(*paths)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [['a', '30', '20', '1.5']]


def test_a_file_of_something_else_cannot_be_compared(ops, tmp_path):
    other = tmp_path / 'other.json'
    for text in ('{}', 'no json', '{"rows": [{"variant": "a"}]}'):
        other.write_text(text)
        with pytest.raises(UserError, match=r'other\.json.*--json'):
            ops.compare(other, other)


def test_a_wrong_value_of_an_option_is_one_line():
    done = run_benchmark('ops', '--device=cpu', '--only=sort')
    assert done.returncode == 2 and done.stderr.startswith('Error: --only=sort') and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and 'filtered_epilogue' in done.stderr


@pytest.mark.parametrize(
    'text', ['', '2x8x16', '2x8x15x16', '2x8x4x16', '0x8x16x16', '2x8x16x16,', 'axbxcxd'])
def test_sizes_that_cannot_be_are_refused(ops, text):
    with pytest.raises(UserError, match='--size'):
        ops.parse_sizes(text)


def test_sizes_and_names_are_lists(ops):
    assert ops.parse_sizes('2x8x16x32,1x3x8x8') == [(2, 8, 16, 32), (1, 3, 8, 8)]
    assert ops.parse_names('dtype', 'fp16,fp32', ops.DTYPES) == ['fp16', 'fp32']
    for text in ('fp8', 'fp16,'):
        with pytest.raises(UserError, match=r'--dtype=.*fp16, bf16, fp32'):
            ops.parse_names('dtype', text, ops.DTYPES)


def test_every_case_is_a_call_that_its_operator_understands(ops):
    for layout in ops.LAYOUTS:
        for name, case in ops.CASES.items():
            arguments = case.arguments(maker(ops, layout))
            result, *_ = ops.tensors_in(case.op.reference(*arguments))
            assert result.shape == ops.tensors_in(case.op.fake(*arguments))[0].shape
            if case.has_layout and case.makes_features:
                half = name.startswith('down2')
                assert list(result.shape[2:]) == ([8, 16] if half else [16, 32]), name
                assert memory_format_of(result) is ops.LAYOUTS[layout], name


def test_weights_are_timed_once_for_each_number_of_samples(ops):
    labels = [label for label, _, _ in ops.plan(
        ['bias_act', 'demodulation'], [SIZE, (2, 4, 8, 8), (1, 4, 8, 8)], ['fp16', 'fp32'], CPU)]
    assert len(labels) == len(set(labels)) == 3 * 2 * 2 + 2
    assert labels[-2:] == ['demodulation x1', 'demodulation x2']


def slow_copy(x):
    time.sleep(0.01)
    return x.clone()


def refuses(x):
    raise custom_ops.CompileError('no compiler')


@pytest.mark.parametrize(('native', 'by'), [
    (torch.clone, 'kernel'), (None, 'reference'), (lambda x: None, 'reference'), (refuses, 'reference')])
def test_a_kernel_is_timed_where_there_is_one_for_the_case(ops, clock, monkeypatch, native, by):
    monkeypatch.setattr(custom_ops, 'is_available', lambda device: True)
    op = SimpleNamespace(native=native, reference=slow_copy)
    case = SimpleNamespace(op=op, arguments=lambda m: (m.picture(),))
    row = ops.measure('x', case, maker(ops), clock)
    assert row['by'] == by and row['bytes'] == 2 * 4 * torch.Size(SIZE).numel()
    assert row['reference_us'] > 9000 and (row['speedup'] > 2 if by == 'kernel' else row['speedup'] == 1)


def test_a_copy_of_so_many_bytes_is_timed_once(clock):
    first = clock.copy_microseconds(4096)
    assert clock.copy_microseconds(4096) == first > 0 and list(clock.copies) == [4096]


def test_references_run_without_kernels_and_the_mode_comes_back(ops):
    before = custom_ops.get_mode()
    with pytest.raises(RuntimeError, match='stop'), ops.references_only():
        assert custom_ops.get_mode() == 'torch'
        raise RuntimeError('stop')
    assert custom_ops.get_mode() == before


def test_first_calls_of_kernels_are_timed_with_an_empty_cache(ops, monkeypatch, capsys):
    folders, now = [], [0.0]

    def load(kernel, device):
        folders.append(custom_ops.default_cache().folder)
        now[0] += 0.002 * len(folders)
        return 'function'

    monkeypatch.setattr(ops.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(custom_ops, '_load', load)
    monkeypatch.setattr(custom_ops, '_state', custom_ops._State())
    usual = custom_ops.default_cache().folder
    with ops.cold_kernels() as seconds:
        assert [custom_ops._loaded(kernel, 0) for kernel in (*HOT[:2], HOT[0])] == ['function'] * 3
    assert len(folders) == 2 and usual not in folders and custom_ops.default_cache().folder == usual
    rows = ops.show_kernels(seconds)
    assert [row['case'] for row in rows] == [f'first call: {HOT[1]}', f'first call: {HOT[0]}']
    assert [row['us'] for row in rows] == pytest.approx([4000, 2000])
    assert capsys.readouterr().out.strip().startswith('2 kernels')


@pytest.mark.gpu
def test_it_times_kernels_on_a_gpu(tmp_path):
    path = tmp_path / 'o.json'
    options = ('--size=2x16x32x32', '--dtype=fp16', '--only=filter 4x4,epilogue_grad', f'--json={path}')
    done = run_benchmark('ops', '--device=cuda', *options)
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(path.read_text())['rows'] if 'bytes' in row]
    assert len(rows) == 4 and all(row['us'] > 0 and row['copy_us'] > 0 for row in rows)
