# SPDX-License-Identifier: Apache-2.0
"""The loader that executes nothing: what it reads, what it refuses, and that no file can hurt it."""
import collections
import copyreg
import hashlib
import io
import os
import pickle
import random
import struct
import time

import numpy as np
import pytest
import torch
from golden_cases import cases, golden_dir
from small_networks import without_end

import legacy
from dnnlib.util import EasyDict, UserError
from torch_utils.pickles import describe
from training import networks

FOLDER = golden_dir() / 'official_pickle'


def load(value_or_bytes, protocol=4):
    data = value_or_bytes
    if not isinstance(data, bytes):
        data = pickle.dumps(data, protocol=protocol)
    return describe.load(io.BytesIO(data), 'net.pkl')


def refusal(data):
    """The message with which these bytes are refused: one line that begins with the file's name."""
    with pytest.raises(UserError) as error:
        load(data)
    text = str(error.value)
    assert text.startswith('net.pkl: ') and text.isprintable() and text.isascii() and len(text) < 400
    return text


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('case', cases('evil'))
def test_a_recorded_hostile_file_is_refused_and_does_nothing(case, empty_folder):
    path = FOLDER / case['file']
    try:
        legacy.load_network(path)
    except UserError as error:
        assert case['file'] in str(error) and str(error).isprintable()
        return
    assert case['expect'] != 'refuse'


@pytest.mark.parametrize('function, name', [
    (os.system, f'{os.name}.system'), (eval, '.eval'), (open, '.open'), (getattr, '.getattr'),
    (torch.load, 'torch.serialization.load'), (pickle.loads, 'pickle.loads'),
    (copyreg._reconstructor, '._reconstructor')])
def test_a_global_that_is_not_on_the_list_is_refused_by_name(function, name, empty_folder):
    for protocol in range(2, 6):
        assert name in refusal(pickle.dumps({'G': Call(function, 'touch bad')}, protocol=protocol))


@pytest.mark.parametrize(
    'name', [b'os.system', b'__builtins__', b'_reconstruct_persistent_obj.__globals__', b''])
def test_dotted_and_private_names_of_an_allowed_module_are_refused(name):
    head = b'\x80\x04\x8c\x17torch_utils.persistence\x8c' + bytes([len(name)]) + name + b'\x93.'
    assert 'torch_utils.persistence.' in refusal(head)


def test_a_message_shows_nothing_that_a_terminal_obeys():
    refusal(b'\x80\x04\x8c\x06os\x1b[2J\x8c\x03a\nb\x93.')


SET = b'cbuiltins\nset\n'
EASY = b'cdnnlib.util\nEasyDict\n'
ORDERED = b'ccollections\nOrderedDict\n'
HOSTILE = {
    'state for a function': SET + b'}b.',
    'state for a class': EASY + b'N}X\x01\0\0\0aK\x01s\x86b.',
    'state for a dict': b'}}b.',
    'state for an ordered dict': ORDERED + b')R}b.',
    'call of a string': b'X\x01\0\0\0a)R.',
    'call of a class that is only made anew': EASY + b')R.',
    'instance of a function': SET + b')\x81.',
    'instance with arguments': EASY + b'K\x01\x85\x81.',
    'arguments that are no tuple': SET + b']R.',
    'extension registry': b'\x80\x02\x82\x01.',
    'instance by name': b'(ios\nsystem\n.',
    'object opcode': b'(cos\nsystem\no.',
    'persistent id': b'Pabc\n.',
    'binary persistent id': b'K\x01Q.',
    'out-of-band buffer': b'\x80\x05\x97.',
    'unhashable key': b'}]K\x01s.',
    'nested tuple as key': b'}))\x85\x85K\x01s.',
    'stack underflow': b'R.', 'no mark': b't.', 'no memo': b'h\x07.', 'odd items': b'}(K\x01u.',
    'items for a number': b'K\x01(K\x01K\x02u.', 'nothing': b'', 'no stop': b'N',
    'unknown opcode': b'\xff.',
    'only a stop': b'.', 'item for a set': SET + b')Ra.',
    'number beyond all measure': b'\x8b' + struct.pack('<i', 5000) + b'\x7f' * 5000 + b'.',
    'text number of many digits': b'I' + b'7' * 4000 + b'\n.',
    'bytes of a huge declared size': b'\x8e' + struct.pack('<Q', 1 << 60) + b'abc.',
    'text of a huge declared size': b'X\xff\xff\xff\x7fabc.',
    'text that is not UTF-8': b'X\x02\0\0\0\xff\xff.',
    'a large memo index': b'Nr\xff\xff\xff\xff0h\x01.',
}


@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_bytes_end_in_one_clean_line(what, empty_folder):
    refusal(HOSTILE[what])


def obj(state=None, **meta):
    """Pickled bytes of a persistent object with this state."""
    content = {'type': 'class', 'version': 6, 'module_src': 'raise RuntimeError', 'class_name': 'Generator',
               'state': {'_parameters': {}, '_buffers': {}, '_modules': {}, '_init_args': (),
                         '_init_kwargs': {}, **(state or {})}, **meta}
    body = pickle.dumps(content, protocol=2)[2:-1]
    return b'\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n' + body + b'\x85R.'


def test_a_persistent_object_becomes_a_description():
    kwargs = {'z_dim': 4, 'nested': {'a': [1, (2.5, None)], 'b': 'x'}}
    state = {'z_dim': 4, 'act': 'lrelu', '_private': 1, 'odd': {1, 2}, 0.5: 'no name'}
    described = load(obj({'_init_args': (7,), '_init_kwargs': kwargs, **state}))
    assert (described.class_name, described.init_args, described.init_kwargs) == ('Generator', (7,), kwargs)
    assert described.attributes == {'z_dim': 4, 'act': 'lrelu'}
    assert described.tensors == {} and described.children == {}


@pytest.mark.parametrize('data', [
    obj(version=7), obj(type='function'), obj(class_name=3), obj(state={'_parameters': [1]}),
    obj(state={'_modules': {'a': 3}}), obj(state={'_buffers': {'a': 'b'}}), obj(state={'_init_kwargs': [1]}),
    obj(state={'_init_kwargs': {'a': {1, 2}}}), obj(state={'_buffers': {'y' * 200: 1}})])
def test_a_malformed_object_is_refused(data):
    assert 'damaged' in refusal(data)


def doubled(depth):
    """A list of which each level holds the one below twice: 2^depth values in a few bytes."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize('data', [
    obj(state={'_init_kwargs': {'a': doubled(30)}}), obj(state={'a': doubled(40)}),
    obj(state={'a': doubled(25)}),
    b'\x8f' * 2_000_000 + b'.',
    b'](' + b'N' * 100_000 + b'eq\x01' + SET + b'q\x020' + b'h\x02h\x01\x85R0' * 10_000 + b'.'])
def test_small_files_cannot_make_the_loader_work_for_long(data):
    start = time.process_time()
    refusal(data)
    assert time.process_time() - start < 5


def test_a_list_that_contains_itself_is_refused():
    endless = []
    endless.append(endless)
    refusal(obj(state={'_init_kwargs': {'a': endless}}))


def test_submodules_that_are_shared_beyond_measure_are_refused():
    described = describe.ModuleDescription('A')
    for _ in range(30):
        described = describe.ModuleDescription('A', children={'a': described, 'b': described})
    with pytest.raises(UserError, match='too many submodules'):
        described.state()
    for _ in range(3000):
        described = describe.ModuleDescription('A', children={'a': described})
    with pytest.raises(UserError, match='too many submodules'):
        list(described.modules())


@pytest.mark.parametrize('protocol', range(2, 6))
def test_plain_data_and_the_few_allowed_types_come_through(protocol):
    value = {'a': [1, -2, 2 ** 40, 0.5, 'text', None, True, b'bytes\xff'], 'b': EasyDict(x=(1, 2)),
             'c': collections.OrderedDict([('k', 1)]), 'd': {'one', 'two'}, 'e': np.float64(1.5),
             'f': np.int32(-7), 'g': (), 'h': np.bool_(1), 'i': 300, 'j': 70000, 'k': (1, 2, 3, 4)}
    loaded = load(value, protocol)
    assert loaded == value
    assert type(loaded['b']) is dict and type(loaded['e']) is float and loaded['h'] is True


def test_old_text_pickles_of_plain_data_are_read():
    value = {'a': [1, 2.5, 'x'], 'b': (True, None)}
    assert load(value, protocol=0) == value


@pytest.mark.parametrize('value', [
    np.array(['text']), np.void(b'1234'), np.datetime64('2020-01-01'), np.dtype([('a', 'f4')]),
    np.dtype('O')])
def test_other_numpy_values_are_refused(value):
    refusal(pickle.dumps(value))


@pytest.mark.parametrize('value', without_end(), ids=['doubled', 'cycle'])
def test_a_numpy_type_without_end_is_refused(value):
    assert 'nameless' in refusal(Call(np.dtype, value))


def test_truncated_files_are_named_as_such():
    data = obj({'a': 1.5, '_init_kwargs': {'b': [1, 2, 3]}})
    for length in range(len(data)):
        assert 'damaged' in refusal(data[:length])


@pytest.mark.parametrize('data, hint', [
    (b'<html>', 'not a network file'),
    (b'ctfutil\nNetwork\n.', 'TensorFlow'), (b'cdnnlib.tflib.custom_ops\nget\n.', 'custom_ops')])
def test_other_kinds_of_files_are_recognised(data, hint):
    assert hint in refusal(data)


@pytest.mark.parametrize('case', cases('official_pickle'))
def test_an_official_file_is_described_as_recorded(case):
    with open(FOLDER / case['file'], 'rb') as file:
        held = describe.load(file, case['file'])
    assert list(held) == case['keys'] and held['training_set_kwargs'] == case['training_set_kwargs']
    for key, net in case['nets'].items():
        if net is None:
            assert held[key] is None
            continue
        check_description(held[key], net)


def check_description(described, net):
    assert (described.class_name, list(described.init_args)) == (net['class_name'], net['init_args'])
    assert described.init_kwargs == net['init_kwargs']
    classes = {prefix or '<root>': module.class_name for prefix, module in described.modules()}
    assert classes == net['submodule_classes']
    expected, state = {**net['parameters'], **net['buffers']}, described.state()
    assert set(state) == set(expected)
    for name, stored in state.items():
        tensor = stored.tensor()
        assert list(stored.shape) == list(tensor.shape) == expected[name]['shape']
        assert str(tensor.dtype) == f'torch.{expected[name]["dtype"]}'
        content = tensor.contiguous().numpy().tobytes()
        assert hashlib.sha256(content).hexdigest() == expected[name]['sha256']


@pytest.mark.filterwarnings('ignore:invalid escape sequence')
def test_five_hundred_mutations_end_in_a_value_or_a_clean_line(monkeypatch, empty_folder):
    """Bit flips, other opcodes, cuts, repeats: no exception but UserError, and no time to speak of."""
    for cls in vars(networks).values():
        if isinstance(cls, type) and hasattr(cls, '_orig_module_src'):
            monkeypatch.setattr(cls, '_orig_module_src', '')
    layer = networks.SynthesisLayer(2, 2, w_dim=2, resolution=4)
    good = pickle.dumps({'G_ema': layer, 'training_set_kwargs': EasyDict(path='x'), 'scale': np.float64(2)})
    generator, outcomes = random.Random(1), collections.Counter()
    for _ in range(500):
        try:
            describe.load(io.BytesIO(mutated(good, generator)))
            outcomes['loaded'] += 1
        except UserError as error:
            assert str(error).isprintable()
            outcomes['refused'] += 1
    assert min(outcomes['loaded'], outcomes['refused']) > 20, outcomes


def mutated(data, generator):
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 8])):
        at = generator.randrange(len(data))
        kind = generator.randrange(5)
        if kind == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[at] = ord(generator.choice('().012FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x81\x82\x85\x8f\x93'))
        elif kind == 2:
            del data[at:at + generator.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at:at + generator.randrange(1, 99)]
        else:
            data[at:at + 4] = b'\xff\xff\xff\x7f'
    return bytes(data)
