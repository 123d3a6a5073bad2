# SPDX-License-Identifier: Apache-2.0
"""legacy.py inspect: what a file of any kind holds and asks for, without running anything."""
import io
import os
import pickle
import re
import zipfile

import pytest
import torch
from golden_cases import cases, golden_dir
from small_networks import small_discriminator, small_generator
from tensorflow_files import tensorflow_pickle

from dnnlib.util import UserError
from training.formats import convert, inspection
from training.formats.load import load_bytes


def described(data, name='a file'):
    return inspection.describe(data, name, load_bytes)


@pytest.fixture(scope='module')
def contents():
    return {'G_ema': small_generator(c_dim=2, img_resolution=(12, 8), img_channels=1),
            'D': small_discriminator(num_fp16_res=1), 'training_set_kwargs': {'path': 'x'}}


@pytest.mark.parametrize('suffix, kind', [('.pkl', 'pickle'), ('.safetensors', 'safetensors')])
def test_networks_of_our_own_files_are_described(suffix, kind, contents, tmp_path):
    path = tmp_path / f'a{suffix}'
    convert.write(path, contents, convert.Choices())
    text = '\n'.join(described(path.read_bytes()))
    count = sum(p.numel() for p in contents['G_ema'].parameters())
    assert f'kind       {kind}' in text and f'{path.stat().st_size:,} bytes' in text
    assert 'G_ema      Generator of 12x8 (HxW), 1 channels, 2 classes, z 8, w 8' in text
    assert f'{count:,} parameters' in text and 'Discriminator of 16x16' in text
    assert '1 levels in float16' in text and "{'path': 'x'}" in text and 'G  ' not in text


def test_what_other_programs_can_construct_is_said(contents, tmp_path):
    path = tmp_path / 'a.pkl'
    convert.write(path, contents, convert.Choices())
    lines = [line.split('other programs: ')[1] for line in described(path.read_bytes()) if 'other p' in line]
    assert lines == ['pickle.load, and their own constructors',
                     'pickle.load; published constructors do not have img_resolution=(12, 8)']


def test_tensorflow_and_rosinality_files_are_described(tmp_path):
    assert any('Generator of 16x16' in line for line in described(tensorflow_pickle()))
    convert.write(tmp_path / 'a.pt', {'G_ema': small_generator()}, convert.Choices())
    lines = described((tmp_path / 'a.pt').read_bytes())
    assert 'torch checkpoint' in lines[1] and any('Generator of 16x16' in line for line in lines)


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_every_foreign_global_is_listed_first_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = {'a': torch.ones(2), 'b': Call(os.mkdir, 'x'), 'c': Call(eval, 'exit()')}
    head = '  asks for   '
    lines = [line.removeprefix(head) for line in described(pickle.dumps(held)) if line.startswith(head)]
    assert f'{os.name}.mkdir  (NOT needed by any network file)' == lines[0] and 'builtins.eval' in lines[1]
    assert 'torch._utils._rebuild_tensor_v2' in lines[2:] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('case', cases('evil'))
def test_recorded_hostile_files_are_described_and_do_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = described((golden_dir() / 'official_pickle' / case['file']).read_bytes())
    assert list(tmp_path.iterdir()) == []
    if case['expect'] != 'refuse':
        return
    assert 'refused' in lines[-1]
    # Only a refusal because of a global names one; damaged or oversized files are refused for other reasons.
    asked = re.search(r'asks for (\S+?);', lines[-1])
    assert asked is None or any(f' {asked[1]}  (NOT needed' in line for line in lines)


@pytest.mark.parametrize(
    'data', [b'', b'hello', b'PK\x03\x04', b'\x08\x07\x12\xff', b'\x80\x04N', b'\0' * 20])
def test_other_files_are_refused_in_words(data):
    lines = described(data)
    assert any('refused' in line or 'pip install' in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_a_pickle_that_asks_for_very_much_is_cut_short():
    data = b''.join(b'cmodule\nname%d\n' % i for i in range(1000)) + b'.'
    assert len(inspection.globals_of(data)) == inspection.MAX_GLOBALS


def fail(data, name):
    raise AssertionError('it was loaded')


def test_a_torch_export_program_is_described_without_loading_it():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name in ('models/model.json', 'data/weights/weight_0', 'data/weights/weight_1'):
            archive.writestr(f'archive/{name}', '')
    lines = inspection.describe(stream.getvalue(), 'a', fail)
    assert 'torch.export' in lines[1] and '3 files, 2 of them weights' in lines[3]


def test_an_onnx_model_is_described():
    onnx = pytest.importorskip('onnx')
    z = onnx.helper.make_tensor_value_info('z', onnx.TensorProto.FLOAT, ['batch', 8])
    img = onnx.helper.make_tensor_value_info('img', onnx.TensorProto.FLOAT, ['batch', 8])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Abs', ['z'], ['img'])], 'net', [z], [img])
    data = onnx.helper.make_model(graph, producer_name='pytorch').SerializeToString()
    text = '\n'.join(inspection.describe(data, 'a', fail))
    assert 'kind       ONNX' in text and 'operators  1 (standard' in text
    assert "input      z ['batch', '8']" in text and "output     img ['batch', '8']" in text


def test_a_loader_that_refuses_has_its_reason_shown():
    def refuse(data, name):
        raise UserError(f'{name}: because')
    assert inspection.describe(pickle.dumps(1), 'a', refuse)[-1] == '  refused    a: because'
