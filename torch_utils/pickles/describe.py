# SPDX-License-Identifier: Apache-2.0
"""Reads network pickles without executing anything in them: the result is a description, not a network.

Supports official files, StyleGAN3's StyleGAN2 networks, TensorFlow networks and our own; any other global is
refused.
"""
import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from dnnlib.util import UserError
from torch_utils.persistence import VERSION
from torch_utils.pickles import arrays
from torch_utils.pickles.budget import Budget, Damaged, Refused
from torch_utils.pickles.machine import Buildable, Global, Machine
from torch_utils.pickles.tensors import StoredTensor, load_storage, rebuild_tensor

MAX_VALUES = 300_000  # arguments and attributes in one file; a network has some 10,000
MAX_DEPTH = 32  # of nested containers
MAX_NAME = 100  # characters of the name of a tensor or submodule
MAX_MODULES = 10_000  # in one network
TRUST = ('With --trust-pickle, generate.py, style_mixing.py, projector.py and calc_metrics.py run the code '
         'in a file: only if you trust its origin')
RECONSTRUCT = ('torch_utils.persistence', '_reconstruct_persistent_obj')
LOAD_STORAGE = ('torch.storage', '_load_from_bytes')


@dataclass(frozen=True)
class ModuleDescription:
    """A pickled network module: name of its class, constructor arguments, and contents.

    attributes: its plain values (numbers, text, lists of these).  tensors: its own parameters and buffers.
    children: submodules, in order; None for a disabled one.
    """

    class_name: str
    init_args: tuple = ()
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    children: dict[str, 'ModuleDescription | None'] = field(default_factory=dict)

    def modules(self) -> Iterator[tuple[str, 'ModuleDescription']]:
        """(dotted name, description) of this module and all submodules, parents first.

        Raises UserError if there are too many: a hostile file can share one submodule exponentially often.
        """
        pending: list[tuple[str, ModuleDescription, int]] = [('', self, 0)]
        for _ in range(MAX_MODULES):
            prefix, module, depth = pending.pop()
            yield prefix, module
            below = [(f'{prefix}.{name}'.lstrip('.'), child, depth + 1)
                     for name, child in module.children.items() if child is not None]
            pending += reversed(below)
            if not pending:
                return
            if depth > MAX_DEPTH:
                break
        raise UserError(f'{self.class_name}: too many submodules for a network')

    def state(self) -> dict[str, StoredTensor]:
        """All tensors, by state-dict name."""
        return {f'{prefix}.{name}'.lstrip('.'): tensor
                for prefix, module in self.modules() for name, tensor in module.tensors.items()}


class TensorFlowNetwork(Buildable):
    """A pickled TensorFlow network.  state: its attributes, as stored."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes. Raises Damaged unless they are a dict."""
        if type(state) is not dict:
            raise Damaged('a TensorFlow network without attributes')
        self.state = state


def load(file: BinaryIO, name: str = 'network pickle') -> Any:
    """Contents of the pickle in a binary file, with a ModuleDescription in place of every network module.

    name: of the file in error messages. TensorFlow networks become TensorFlowNetwork, arrays StoredArray,
    numpy scalars numbers, and every kind of dict a dict. Raises UserError, one line, if the file is not a
    network pickle, is damaged, or refers to an unknown global.
    """
    data = file.read()  # all at once, so that a declared size cannot exceed what is there
    budget = Budget(len(data))
    with explained(name):
        return Machine(io.BytesIO(data), table(budget), budget=budget).load()


def table(budget: Budget) -> dict[tuple[str, str], Any]:
    """The globals that the pickle of one file may use; what they do is charged to its budget."""
    return {**ALLOWED, RECONSTRUCT: Global(call=_Describer().describe),
            LOAD_STORAGE: Global(call=lambda data: load_storage(data, budget))}


def plain(value: Any, name: str) -> Any:
    """A copy of a part of load()'s result: numbers, text, None and containers of these.

    A small pickle can nest one list in itself, or exponentially often, so that it cannot be printed or
    compared. Raises UserError about the file called `name` for that, and for values of other types.
    """
    with explained(name):
        return _Describer().copy(value)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn errors of the machine into a one-line UserError about the file called `name`."""
    try:
        yield
    except Refused as error:
        wanted = _printable(str(error))
        if wanted.startswith(('dnnlib.tflib.', 'tfutil.')):
            raise UserError(f'{name}: a TensorFlow network pickle that asks for {wanted}; only those of '
                            'StyleGAN2 and StyleGAN2-ADA can be read') from error
        raise UserError(f'{name}: asks for {wanted}, which is not among the names that networks of StyleGAN2 '
                        f'need; refused, and nothing in it was run. {TRUST}') from error
    except Damaged as error:
        raise UserError(f'{name}: not a network file, or damaged ({_printable(str(error))}); '
                        'download or copy it again') from error


def _printable(text: str) -> str:
    """The text on one line, without control characters."""
    return ''.join(c if c.isascii() and c.isprintable() else '?' for c in text)


class _Describer:
    """Turns pickled objects into descriptions, and limits the number of values: a small pickle can repeat
    them exponentially often.
    """

    def __init__(self):
        self.count = 0

    def describe(self, meta: Any) -> ModuleDescription:
        """Stands in for persistence._reconstruct_persistent_obj; module_src is ignored."""
        if type(meta) is not dict or (meta.get('type'), meta.get('version')) != ('class', VERSION):
            raise Damaged(f'an object that is not a class of format {VERSION}')
        class_name, state = _member(meta, 'class_name', str, None), _member(meta, 'state', dict, None)
        # Copies: the pickle can still modify these dicts afterwards.
        held = {**_member(state, '_parameters', dict, {}), **_member(state, '_buffers', dict, {})}
        modules = _member(state, '_modules', dict, {})
        self.charge(len(state) + len(held) + len(modules))
        tensors = {name: _expect(t, StoredTensor, name) for name, t in held.items() if t is not None}
        children = {name: child if child is None else _expect(child, ModuleDescription, name)
                    for name, child in modules.items()}
        own = {name: v for name, v in state.items()
               if isinstance(name, str) and name[:1] != '_' and _is_plain(v)}
        return ModuleDescription(
            class_name, tuple(self.copy(_member(state, '_init_args', (tuple, list), ()))),
            self.copy(_member(state, '_init_kwargs', dict, {})), self.copy(own), tensors, children)

    def charge(self, count: int) -> None:
        """Count values. Raises Damaged above MAX_VALUES."""
        self.count += count
        if self.count > MAX_VALUES:
            raise Damaged('too many values')

    def copy(self, value: Any, depth: int = 0) -> Any:
        """A copy of numbers, text, None and containers of these. Raises Damaged for anything else."""
        self.charge(1)
        if depth > MAX_DEPTH:
            raise Damaged('values nested too deep')
        if _is_scalar(value):
            return value
        if type(value) in (list, tuple):
            return type(value)(self.copy(v, depth + 1) for v in value)
        if type(value) is dict:
            return {self.copy(k, depth + 1): self.copy(v, depth + 1) for k, v in value.items()}
        raise Damaged(f'a {type(value).__name__} among the arguments of an object')


def _is_scalar(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _is_plain(value: Any) -> bool:
    return _is_scalar(value) or type(value) in (list, tuple)


def _member(state: dict, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = state.get(name, default)
    if not isinstance(value, kind):
        raise Damaged(f'{name} is a {type(value).__name__}')
    return value


def _expect(value: Any, kind: type, name: Any) -> Any:
    if not isinstance(name, str) or len(name) > MAX_NAME or not isinstance(value, kind):
        raise Damaged(f'{str(name)[:MAX_NAME]} is a {type(value).__name__}, not a {kind.__name__}')
    return value


def _make_dict(items: Any = ()) -> dict:
    """Stands in for OrderedDict: created empty or from [[key, value], ...]."""
    pairs = [item for item in items if type(item) in (list, tuple) and len(item) == 2]
    if len(pairs) != len(items) or not all(type(key) is str for key, _ in pairs):
        raise Damaged('an ordered dict that is not made of pairs')
    return dict(items)


def _make_set(items: Any = ()) -> set:
    if type(items) is not list or not all(_is_scalar(item) for item in items):
        raise Damaged('a set of other things than numbers and text')
    return set(items)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if hooks:
        raise Damaged('a parameter with hooks')
    return _expect(tensor, StoredTensor, 'parameter')


def _called(function: Callable[..., Any]) -> Global:
    return Global(call=function)


_SET, _NEW_DICT = _called(_make_set), Global(new=lambda: {})

# The globals that a network pickle may use, matched exactly, besides RECONSTRUCT and LOAD_STORAGE.
ALLOWED = {
    ('dnnlib.util', 'EasyDict'): _NEW_DICT,
    ('collections', 'OrderedDict'): Global(call=_make_dict, new=_make_dict),
    ('builtins', 'set'): _SET,
    ('__builtin__', 'set'): _SET,
    ('torch._utils', '_rebuild_tensor_v2'): _called(rebuild_tensor),
    ('torch._utils', '_rebuild_parameter'): _called(_rebuild_parameter),
    ('dnnlib.tflib.network', 'Network'): Global(new=TensorFlowNetwork),
    **arrays.TABLE,
}
NAMES = frozenset({*ALLOWED, RECONSTRUCT, LOAD_STORAGE})
