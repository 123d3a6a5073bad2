# SPDX-License-Identifier: Apache-2.0
"""Describes the contents of a network file of any kind; nothing in it is executed."""
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dnnlib.util import UserError
from torch_utils.pickles.budget import Damaged
from torch_utils.pickles.describe import ALLOWED, NAMES
from torch_utils.pickles.machine import Buildable, Global, Machine
from training.formats import kinds, lineage, rebuild
from training.formats.exported import NEEDED, optional
from training.formats.rebuild import MODULES, shown

REFUSED = '  refused    '  # begins the last line about a file that cannot be used
MAX_GLOBALS = 30  # listed at most
CONTAINERS = [('dnnlib.util', 'EasyDict'), ('collections', 'OrderedDict'), ('builtins', 'set'),
              ('__builtin__', 'set')]
Loader = Callable[[bytes, str], Mapping[str, Any]]


def describe(data: bytes, name: str, load: Loader) -> list[str]:
    """Lines about a file. load(data, name): the networks in it, as returned by load_network().

    A file that is refused gets a line with the reason; the globals that it asks for are still listed.
    """
    kind = kinds.kind_of(data)
    lines = [f'{name}', f'  kind       {kind}', f'  size       {len(data):,} bytes']
    problem = kinds.foreign(data)
    if problem is not None and kind != 'torch.export':
        return [*lines, f'{REFUSED}{problem}']
    if kind == 'pickle':
        lines += [f'  asks for   {line}' for line in globals_of(data)]
    if kind in ('ONNX', 'torch.export'):
        return lines + [f'  {line}' for line in (_onnx_lines if kind == 'ONNX' else _archive_lines)(data)]
    try:
        found = load(data, name)
    except UserError as error:
        return [*lines, f'{REFUSED}{error}']
    for key in MODULES:
        lines += [f'  {key:<10} {line}' for line in _network_lines(found.get(key))]
    kwargs = found.get('training_set_kwargs')
    return lines if kwargs is None else [*lines, f'  trained on {shown(kwargs)}']


def globals_of(data: bytes) -> list[str]:
    """The globals that a pickle names; first, and marked, those that no network file needs."""
    recorder = _Recorder()
    try:
        Machine(io.BytesIO(data), recorder).load()
    except Damaged as error:
        recorder.end = f'({shown(error)})'
    foreign = [f'{shown(".".join(wanted))}  (NOT needed by any network file)'
               for wanted in recorder.names if wanted not in NAMES]
    listed = [*foreign, *('.'.join(wanted) for wanted in recorder.names if wanted in NAMES)]
    return [*listed[:MAX_GLOBALS], *([recorder.end] if recorder.end else [])]


def looks_like_network(data: bytes) -> bool:
    """Whether a file is complete and of a kind that holds networks, of this or another program."""
    kind = kinds.kind_of(data)
    if kind != 'pickle':
        return kind in ('safetensors', 'torch checkpoint', 'ONNX', 'torch.export')
    recorder = _Recorder()
    try:
        Machine(io.BytesIO(data), recorder).load()
    except Damaged:
        return False
    return bool(recorder.names.keys() - set(CONTAINERS))


class _Anything(Buildable):
    """Inert stand-in for the result of an unknown global."""

    def build(self, state: Any) -> None:
        """Accept and discard any state."""


class _Recorder(Mapping):
    """A table of globals that contains every name, all of them inert, and records the lookups."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, str], None] = {}
        self.end = ''

    def __contains__(self, wanted: object) -> bool:
        return True

    def __getitem__(self, wanted: tuple[str, str]) -> Global:
        self.names[wanted] = None
        # The following opcodes fill containers, so these must be real.
        return ALLOWED[wanted] if wanted in CONTAINERS else Global(call=_anything, new=_anything)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _anything(*_: Any) -> _Anything:
    return _Anything()


def _network_lines(net: torch.nn.Module | None) -> list[str]:
    if net is None:
        return []
    parameters = sum(p.numel() for p in net.parameters())
    buffers = sum(b.numel() for b in net.buffers())
    counts = f'{parameters:,} parameters, {buffers:,} numbers in buffers'
    if not hasattr(net, 'img_resolution'):
        return [f'{type(net).__name__}, {counts}']
    size = net.img_resolution
    height, width = (size, size) if isinstance(size, int) else size
    half = sum(getattr(module, 'use_fp16', False) for module in net.modules())
    spaces = f', z {net.z_dim}, w {net.w_dim}, {net.num_ws} ws' if hasattr(net, 'num_ws') else ''
    precision = f', {half} levels in float16' if half else ''
    return [f'{type(net).__name__} of {height}x{width} (HxW), {net.img_channels} channels, '
            f'{net.c_dim} classes{spaces}{precision}', counts, _elsewhere(net)]


def _elsewhere(net: torch.nn.Module) -> str:
    """Whether programs that construct networks of their own can construct this one."""
    unknown = lineage.obstacles(net, rebuild.arguments_of('network', net))
    if not unknown:
        return 'other programs: pickle.load, and their own constructors'
    return f'other programs: pickle.load; published constructors do not have {", ".join(unknown)}'


def _archive_lines(data: bytes) -> list[str]:
    names = kinds.member_names(data)
    weights = sum('/data/weights/' in name for name in names)
    return [f'contains   {len(names)} files, {weights} of them weights', 'opens with torch.export.load()']


def _onnx_lines(data: bytes) -> list[str]:
    onnx = optional('onnx')
    if onnx is None:
        return [NEEDED]
    damaged = optional('google.protobuf.message').DecodeError  # which onnx is built upon
    try:
        model = onnx.load_model_from_string(data)
    except (damaged, ValueError, RuntimeError, TypeError) as error:
        return [f'refused    {shown(error)}']
    opsets = [f'{shown(item.domain or "standard")} {item.version}' for item in model.opset_import]
    values = [('input', v) for v in model.graph.input] + [('output', v) for v in model.graph.output]
    return [f'operators  {len(model.graph.node)} ({", ".join(opsets)})',
            *(f'{word:<11}{shown(v.name)} {_onnx_shape(v)}' for word, v in values)]


def _onnx_shape(value: Any) -> list[str]:
    return [shown(size.dim_param or size.dim_value) for size in value.type.tensor_type.shape.dim]
