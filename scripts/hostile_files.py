# SPDX-License-Identifier: Apache-2.0
"""Makes hostile network files from scratch: well-formed, except for what one or a few places say."""
import gzip
import io
import json
import math
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.pickles.describe import NAMES, RECONSTRUCT
from training import networks
from training.formats import safetensors_file

ORDERED, EASY = ('collections', 'OrderedDict'), ('dnnlib.util', 'EasyDict')
TENSOR, LOAD = ('torch._utils', '_rebuild_tensor_v2'), ('torch.storage', '_load_from_bytes')
TENSORFLOW = ('dnnlib.tflib.network', 'Network')
FOREIGN = [
    ('os', 'system'), ('posix', 'mkdir'), ('builtins', 'eval'), ('builtins', 'exec'), ('subprocess', 'run'),
    ('torch', 'load'), ('torch_utils.persistence', 'persistent_class'), ('numpy', 'load')]
MAGIC = 0x1950A86A20F9469CFC6C  # of torch's format without zip
NUMBERS = [
    0, -1, 1, 2, 7, 255, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 62, 2 ** 63 - 1, 2 ** 63, 2 ** 64, -2 ** 63,
    2 ** 200, 10 ** 3000, True, False, None, 0.5, -0.0, 1e308, -1e308, 1e-320, math.inf, -math.inf, math.nan]
TEXTS = [
    '', 'x', 'a' * 300, '\ud800', 'G\udcff', '7' * 5000, 'style.' + '9' * 5000 + '.weight', '\x1b[2J\n', '\0',
    'Generator', 'Discriminator', 'AugmentPipe', 'DCGANGenerator', 'DCGANDiscriminator', 'StyleGAN1Generator',
    'skip', 'orig', 'resnet', 'lrelu', '__class__', 'training']
SIZES = [
    (), (0,), (1,), (2 ** 63,), (0, 2 ** 63), (1, 1, 2 ** 62), (2 ** 40, 2 ** 40), (-1,), (1,) * 9,
    (3, 0, 2 ** 64), (1.5,), ('1',)]


@dataclass(frozen=True)
class Call:
    """A global that is called, made anew, or given a state: opcode REDUCE, NEWOBJ or BUILD."""

    name: tuple[str, str]
    arguments: Any
    opcode: bytes = b'R'


@dataclass(frozen=True)
class Persistent:
    """A persistent id, as torch.save writes for a storage."""

    pid: Any


@dataclass(frozen=True)
class Name:
    """A global itself."""

    name: tuple[str, str]


def code(value: Any) -> bytes:
    """Opcodes that push a value."""
    if isinstance(value, Name):
        return f'c{value.name[0]}\n{value.name[1]}\n'.encode()
    if isinstance(value, Persistent):
        return code(value.pid) + b'Q'
    if isinstance(value, Call):
        made = code(Name(value.name))
        return (made + b')\x81' if value.opcode == b'b' else made) + code(value.arguments) + value.opcode
    if isinstance(value, dict):
        return b'}(' + b''.join(code(key) + code(item) for key, item in value.items()) + b'u'
    if isinstance(value, (list, tuple)):
        return b'(' + b''.join(map(code, value)) + (b'l' if isinstance(value, list) else b't')
    return _scalar_code(value)


def _scalar_code(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
        return b'\x8b' + struct.pack('<i', len(data)) + data
    if isinstance(value, float):
        return b'G' + struct.pack('>d', value)
    data = value.encode('utf-8', 'surrogatepass') if isinstance(value, str) else value
    return (b'X' if isinstance(value, str) else b'B') + struct.pack('<I', len(data)) + data


def hostile_file(generator: random.Random) -> bytes:
    """One file of a kind of KINDS."""
    return generator.choice(KINDS)(generator)


def _pickle(generator: random.Random) -> bytes:
    return b'\x80\x02' + code(changed(_network_template(), generator)) + b'.'


def _tensorflow(generator: random.Random) -> bytes:
    array = Call(('numpy.core.multiarray', 'scalar'), (Call(('numpy', 'dtype'), ('f4',)), bytes(4)))
    variables = [('4x4/Const/const', array), ('Dense0/weight', 1.0), ('8x8/Conv0/weight', 3)]
    network = Call(TENSORFLOW, {
        'version': 5, 'static_kwargs': {'resolution': 8, 'latent_size': 2, 'fmap_max': 2, 'num_channels': 3},
        'components': {}, 'variables': variables}, b'b')
    return b'\x80\x02' + code(changed((network, network, network), generator)) + b'.'


def _safetensors(generator: random.Random) -> bytes:
    G = _small_generator()
    tensors = {f'G_ema.{name}': t for name, t in G.state_dict().items()}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * 4
        header[name] = {'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [offset, end]}
        offset = end
    described = {'G_ema': {'class_name': 'Generator', 'init_kwargs': G.init_kwargs}}
    described = changed(described, generator, is_plain=True)
    header = changed(header, generator, is_plain=True) if generator.random() < 0.5 else header
    # As text, so that Python need not agree that it is JSON.
    metadata = {'format': safetensors_file.FORMAT, 'networks': _json(described)}
    header = header if isinstance(header, dict) else {'x': header}
    text = _json({'__metadata__': metadata, **header}).encode()
    return struct.pack('<Q', len(text)) + text + bytes(offset)


def _json(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value) if value.bit_length() > 10_000 else str(value)
    if isinstance(value, dict):
        return '{' + ','.join(f'{json.dumps(str(k))}:{_json(v)}' for k, v in value.items()) + '}'
    if isinstance(value, (list, tuple)):
        return '[' + ','.join(map(_json, value)) + ']'
    return json.dumps(value if isinstance(value, (str, float, bool)) or value is None else str(value))


def _checkpoint(generator: random.Random) -> bytes:
    """A file of torch.save: state dicts, a module, or a training state, in a zip of odd structure."""
    storages = {str(i): bytes(4 * size) for i, size in enumerate([4, 4, 1])}
    tensors = {name: Call(TENSOR, (
        Persistent(('storage', Name(('torch', 'FloatStorage')), key, 'cpu', len(data) // 4)), 0,
        (len(data) // 4,), (1,), False, Call(ORDERED, ())))
        for name, (key, data) in zip(['style.1.weight', 'convs.0.conv.weight', 'fc.bias'], storages.items(),
                                     strict=True)}
    held = generator.choice([
        {'g_ema': tensors, 'latent_avg': tensors['fc.bias']}, {'state_dict': tensors}, _network_template(),
        {'config': {'G_kwargs': {'class_name': 'training.networks.Generator'}}, 'loop': {}, 'extra': {},
         'format': 1, 'run': {'G': tensors, 'D': tensors, 'G_ema': tensors}}])
    members = {'archive/data.pkl': b'\x80\x02' + code(changed(held, generator)) + b'.',
               'archive/byteorder': b'little', **{f'archive/data/{key}': d for key, d in storages.items()}}
    return _odd_zip(members, generator)


def _odd_zip(members: dict[str, bytes], generator: random.Random) -> bytes:
    """A zip of these members, perhaps with overlapping, compressed, missing or damaged ones."""
    stream = io.BytesIO()
    method = generator.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])
    if generator.random() < 0.2:
        del members[generator.choice(list(members))]
    with zipfile.ZipFile(stream, 'w', method) as archive:
        for name, data in members.items():
            # Not by its name alone, which would add the time.
            archive.writestr(zipfile.ZipInfo(name), data, method)
        items = archive.filelist
        for _ in range(generator.choice([0, 0, 1, 3])):
            item = generator.choice(items)
            field = generator.choice(['header_offset', 'file_size', 'compress_size', 'CRC', 'flag_bits'])
            other = getattr(generator.choice(items), field)
            setattr(item, field, generator.choice([other, 0, 1, 2 ** 16 - 1, 2 ** 32 - 2]) & (
                0xffff if field == 'flag_bits' else 0xffffffff))
    return stream.getvalue()


def _stream(generator: random.Random) -> bytes:
    """The format of torch.save before its zip."""
    declared = Persistent(('storage', Name(('torch', 'FloatStorage')), '0', 'cpu', 4))
    tensor = Call(TENSOR, (declared, 0, (4,), (1,), False, Call(ORDERED, ())))
    parts: list[Any] = [
        MAGIC, 1001, {'protocol_version': 1001, 'little_endian': True}, {'g_ema': {'a': tensor}}, ['0']]
    place = generator.randrange(len(parts))
    parts[place] = changed(parts[place], generator)
    head = b''.join(b'\x80\x02' + (code(part) if i else b'\x8a\x0a' + MAGIC.to_bytes(10, 'little')) + b'.'
                    for i, part in enumerate(parts))
    return head + struct.pack('<Q', generator.choice([4, 0, 2 ** 62, 2 ** 64 - 1])) + bytes(16)


def _opcodes(generator: random.Random) -> bytes:
    """Opcodes and values in any order, with a memo."""
    parts = [code(odd(generator)) for _ in range(generator.randrange(3, 40))]
    for _ in range(generator.randrange(3, 60)):
        parts.insert(generator.randrange(len(parts)), generator.choice([
            b'q\x01', b'h\x01', b'2', b'0', b'1', b'(', b'R', b'\x81', b'b', b'a', b'e', b's', b'u', b'\x90',
            b't', b'd', b'l', b'\x85', b'\x86', b'\x87', b'\x93', b'Q', b'\x94', b')', b']', b'}', b'\x8f']))
    return b'\x80\x04' + b''.join(parts) + b'.'


def _repeated(generator: random.Random) -> bytes:
    """One value, memoized, and an allowed global called with it again and again."""
    value = generator.choice([
        'x' * 100_000, b'x' * 100_000, [0] * 20_000, [['a', 1]] * 20_000, (b'x' * 50_000,) * 9,
        {str(i): i for i in range(5000)}])
    name = generator.choice(sorted(NAMES))
    opcode = generator.choice([b'R', b'\x81', b'b'])
    made = b')\x81' if opcode == b'b' else b''
    argument = b'h\x01' if opcode == b'b' else b'h\x02'
    return (b'\x80\x02' + code(value) + b'q\x01\x85q\x020' + code(Name(name)) + b'q\x030]('
            + (b'h\x03' + made + argument + opcode) * generator.choice([10, 1000, 50_000]) + b'e.')


def _packed(generator: random.Random) -> bytes:
    """Something else than a network, or a network in a wrapping that is none of a network file."""
    data = _pickle(generator)
    return generator.choice([
        gzip.compress(data, mtime=0), gzip.compress(bytes(5_000_000), mtime=0), zlib.compress(data),
        b'<!DOCTYPE html><html>' + data, b'version https://git-lfs.github.com/spec/v1\n', b'', b'\n',
        b'{' * 100_000, b'[' * 100_000, b'PK\x03\x04' + data, b'\x93NUMPY\x01\0' + data,
        _odd_zip({'a.png': data, 'dataset.json': b'{}'}, generator)])


KINDS: list[Callable[[random.Random], bytes]] = [
    _pickle, _pickle, _pickle, _tensorflow, _safetensors, _checkpoint, _checkpoint, _stream, _opcodes,
    _repeated, _packed]


def odd(generator: random.Random, *, is_plain: bool = False) -> Any:
    """A value that nobody expects.  is_plain: without calls."""
    kind = generator.randrange(5 if is_plain else 7)
    if kind < 2:
        return generator.choice(NUMBERS)
    if kind == 2:
        return generator.choice(TEXTS)
    if kind == 3:
        return generator.choice(SIZES)
    if kind == 4:
        return generator.choice([[], {}, {'a': 1}, ['a', 1], [[1] * 3] * 3, _nested(30), _nested(200)])
    if kind == 5:
        return generator.choice([
            b'', b'x' * 20, Name(generator.choice(FOREIGN)), Name(generator.choice(sorted(NAMES)))])
    name = generator.choice([*sorted(NAMES), *FOREIGN])
    arguments = tuple(odd(generator, is_plain=True) for _ in range(generator.randrange(4)))
    opcode = generator.choice([b'R', b'R', b'\x81', b'b'])
    return Call(name, arguments, opcode)


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def changed(value: Any, generator: random.Random, *, is_plain: bool = False) -> Any:
    """The value with something odd in one to three places, chosen at each level by chance."""
    for _ in range(generator.choice([1, 1, 2, 3])):
        value = _changed_once(value, generator, is_plain)
    return value


def _changed_once(value: Any, generator: random.Random, is_plain: bool) -> Any:
    if isinstance(value, Call) and generator.random() < 0.95:
        return Call(value.name, _changed_once(value.arguments, generator, is_plain), value.opcode)
    if isinstance(value, Persistent):
        return Persistent(_changed_once(value.pid, generator, is_plain))
    if not isinstance(value, (dict, list, tuple)) or not value or generator.random() < 0.05:
        return odd(generator, is_plain=is_plain)
    if not isinstance(value, dict):
        items = list(value)
        place = generator.randrange(len(items))
        items[place] = _changed_once(items[place], generator, is_plain)
        return type(value)(items)
    items = dict(value)
    key = generator.choice(list(items))
    if generator.random() < 0.15:
        items[generator.choice(TEXTS)] = items.pop(key)
    else:
        items[key] = _changed_once(items[key], generator, is_plain)
    return items


def _small_generator() -> torch.nn.Module:
    G = networks.Generator(
        z_dim=2, c_dim=0, w_dim=2, img_resolution=8, img_channels=3, mapping_kwargs={'num_layers': 1},
        synthesis_kwargs={'channel_base': 16, 'channel_max': 2}).eval()
    for tensor in G.state_dict().values():
        tensor.fill_(0.5)
    return G


def _network_template() -> dict[str, Any]:
    return {'G_ema': _module(_small_generator()), 'training_set_kwargs': {'path': 'x', 'resolution': 8}}


def _module(module: torch.nn.Module) -> Call:
    """A network module as it is pickled, without its source."""
    attributes = {name: v for name, v in vars(module).items()
                  if name[:1] != '_' and (v is None or isinstance(v, (bool, int, float, str)))}
    state = {
        **attributes, '_parameters': {n: _tensor(p) for n, p in module._parameters.items()},
        '_buffers': {n: _tensor(b) for n, b in module._buffers.items()},
        '_modules': {n: _module(m) for n, m in module._modules.items()},
        '_init_args': tuple(module.init_args), '_init_kwargs': dict(module.init_kwargs)}
    return Call(RECONSTRUCT, ({'type': 'class', 'version': 6, 'module_src': 'raise RuntimeError("it ran")',
                               'class_name': type(module).__name__, 'state': state},))


def _tensor(tensor: torch.Tensor | None) -> Call | None:
    if tensor is None:
        return None
    stream = io.BytesIO()
    torch.save(tensor.detach().contiguous(), stream, _use_new_zipfile_serialization=False)
    # The storage alone, as inside a pickle: the header, its persistent id, its key, its elements.
    numel = tensor.numel()
    pid = ('storage', Name(('torch', 'FloatStorage')), '0', 'cpu', numel, None)
    head = stream.getvalue()[:stream.getvalue().index(b'ctorch._utils') - 2]
    data = (head + b'\x80\x02' + code(Persistent(pid)) + b'.\x80\x02' + code(['0']) + b'.'
            + struct.pack('<Q', numel) + tensor.detach().contiguous().numpy().tobytes())
    stride = tuple(tensor.contiguous().stride())
    return Call(TENSOR, (Call(LOAD, (data,)), 0, tuple(tensor.shape), stride, False, Call(ORDERED, ())))
