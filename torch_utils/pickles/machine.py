# SPDX-License-Identifier: Apache-2.0
"""A pickle interpreter that only builds data: numbers, text, containers, and objects from its table.

It imports nothing, calls only the functions passed to it, and spends no more memory and time than its budget.
"""
import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch_utils.pickles.budget import MAX_OPERATIONS, Budget, Damaged, Refused

MAX_BITS = 256  # of an integer


@dataclass(frozen=True)
class Global:
    """An allowed global, and what calling it does.

    call(*args) -> value: for opcode REDUCE.  new(*args) -> object: for NEWOBJ.  None: not allowed.
    """

    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


class Buildable:
    """Base of objects that accept a state by opcode BUILD; no other object does."""

    def build(self, state: Any) -> None:
        """Take the state; raise Damaged if it is invalid."""
        raise NotImplementedError


class Machine:
    """Executes one pickle after another from a binary file.

    allowed: (module, name) -> Global or value.  persistent_load(pid) -> object; None: refuse persistent ids.
    budget: charged by every opcode; None: one for this file alone.  max_opcodes: per pickle, besides.
    drops_dict_state: ignore attributes of dicts instead of refusing them.
    """

    def __init__(
        self, file: io.BytesIO, allowed: Mapping[tuple[str, str], Any],
        persistent_load: Callable[[Any], Any] | None = None, budget: Budget | None = None,
        max_opcodes: int = MAX_OPERATIONS, drops_dict_state: bool = False,
    ):
        self.file, self.allowed, self.persistent_load = file, allowed, persistent_load
        self.max_opcodes, self.drops_dict_state = max_opcodes, drops_dict_state
        self.budget = budget or Budget(file.getbuffer().nbytes)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the next pickle in the file. Raises Refused or Damaged, and nothing else."""
        # A pickle must not see the stack or memo of the previous one.
        self.stack, self.marks, self.memo = [], [], {}
        position = 0
        try:
            for count, (opcode, argument, place) in enumerate(pickletools.genops(self.file)):
                position = place
                if opcode.name == 'STOP':
                    return self.stack.pop()
                if opcode.name not in _HANDLERS or count >= self.max_opcodes:
                    raise Damaged(f'opcode {opcode.name}, number {count}, has no place in a network file')
                self.budget.operate(argument)
                _HANDLERS[opcode.name](self, argument)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, MemoryError,
                RecursionError) as error:
            raise Damaged(f'{type(error).__name__} at byte {position}: {str(error)[:80]}') from error
        raise Damaged('no STOP opcode')

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The top of the stack, which must be of exactly this type."""
        value = self.stack[-1]
        # Exactly: a subclass may override methods.
        if type(value) is not kind:
            raise Damaged(f'expected a {kind.__name__}, found a {type(value).__name__}')
        return value

    def find(self, module: Any, name: Any) -> Any:
        """The allowed global of this exact module and name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged('the name of a global is not text')
        # A table, not getattr: attributes of globals are out of reach.
        if (module, name) not in self.allowed:
            raise Refused(f'{module}.{name}'[:120])
        return self.allowed[module, name]


def _key(value: Any) -> Any:
    """A dictionary key or set element. Only scalars: hashing nested tuples can take exponential time."""
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise Damaged(f'a {type(value).__name__} as a key')
    return value


def _set_items(target: dict, items: list[Any]) -> None:
    if len(items) % 2:
        raise Damaged('a key without a value')
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value


def _op_integer(machine: Machine, number: int) -> None:
    if number.bit_length() > MAX_BITS:
        raise Damaged(f'an integer of {number.bit_length()} bits')
    machine.push(number)


def _op_global(machine: Machine, argument: str) -> None:
    module, _, name = argument.partition(' ')
    machine.push(machine.find(module, name))


def _op_stack_global(machine: Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push(machine.find(module, name))


def _arguments(value: Any) -> tuple:
    if type(value) is not tuple:
        raise Damaged('arguments that are not a tuple')
    return value


def _op_reduce(machine: Machine, _: Any) -> None:
    arguments, function = _arguments(machine.stack.pop()), machine.stack.pop()
    # Only entries of the table can be called, whatever else is on the stack.
    if not isinstance(function, Global) or function.call is None:
        raise Damaged('a call of something that is not a function')
    machine.budget.charge_values(arguments)
    machine.push(function.call(*arguments))


def _op_newobj(machine: Machine, _: Any) -> None:
    arguments, cls = _arguments(machine.stack.pop()), machine.stack.pop()
    if not isinstance(cls, Global) or cls.new is None:
        raise Damaged('an instance of something that is not a class')
    machine.budget.charge_values(arguments)
    machine.push(cls.new(*arguments))


def _op_build(machine: Machine, _: Any) -> None:
    state = machine.stack.pop()
    # torch's state dicts have version numbers as attributes.
    if machine.drops_dict_state and type(machine.stack[-1]) is dict:
        return
    # The standard unpickler would set any attribute of any object, even of functions and classes.
    if not isinstance(machine.stack[-1], Buildable):
        raise Damaged(f'a state for a {type(machine.stack[-1]).__name__}')
    machine.budget.charge_values((state,))
    machine.stack[-1].build(state)


def _op_persistent_id(machine: Machine, _: Any) -> None:
    if machine.persistent_load is None:
        raise Damaged('persistent ids have no place in a network file')
    machine.push(machine.persistent_load(machine.stack.pop()))


def _op_mark(machine: Machine, _: Any) -> None:
    machine.marks.append(len(machine.stack))


def _op_setitem(machine: Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.top(dict)[_key(key)] = value


def _op_setitems(machine: Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    _set_items(machine.top(dict), items)


def _op_append(machine: Machine, _: Any) -> None:
    value = machine.stack.pop()
    machine.top(list).append(value)


def _op_appends(machine: Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


def _op_additems(machine: Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.top(set).update(map(_key, values))


def _op_dict(machine: Machine, _: Any) -> None:
    target: dict = {}
    _set_items(target, machine.pop_to_mark())
    machine.push(target)


def _op_tuple_of(count: int) -> Callable[[Machine, Any], None]:
    def handler(machine: Machine, _: Any) -> None:
        values = [machine.stack.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))
    return handler


def _op_constant(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _op_put(machine: Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_INTEGERS = ('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4')
_OTHER_LITERALS = (
    'FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8',
    'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8')

# Not supported: INST, OBJ, NEWOBJ_EX, EXT*, PERSID, out-of-band buffers. No network file uses them.
_HANDLERS: dict[str, Callable[[Machine, Any], Any]] = {
    'PROTO': lambda machine, version: None,
    'FRAME': lambda machine, size: None,
    **dict.fromkeys(_INTEGERS, _op_integer),
    **dict.fromkeys(_OTHER_LITERALS, Machine.push),
    **{name: _op_constant(make) for name, make in {
        'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False, 'EMPTY_LIST': list,
        'EMPTY_TUPLE': tuple, 'EMPTY_DICT': dict, 'EMPTY_SET': set}.items()},
    'MARK': _op_mark,
    'POP': lambda machine, _: machine.stack.pop(),
    'POP_MARK': lambda machine, _: machine.pop_to_mark(),
    'DUP': lambda machine, _: machine.push(machine.stack[-1]),
    'LIST': lambda machine, _: machine.push(machine.pop_to_mark()),
    'TUPLE': lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    'TUPLE1': _op_tuple_of(1), 'TUPLE2': _op_tuple_of(2), 'TUPLE3': _op_tuple_of(3),
    'DICT': _op_dict, 'SETITEM': _op_setitem, 'SETITEMS': _op_setitems,
    'APPEND': _op_append, 'APPENDS': _op_appends, 'ADDITEMS': _op_additems,
    **dict.fromkeys(('PUT', 'BINPUT', 'LONG_BINPUT'), _op_put),
    **dict.fromkeys(('GET', 'BINGET', 'LONG_BINGET'), lambda machine, i: machine.push(machine.memo[i])),
    'MEMOIZE': lambda machine, _: _op_put(machine, len(machine.memo)),
    'GLOBAL': _op_global, 'STACK_GLOBAL': _op_stack_global,
    'REDUCE': _op_reduce, 'NEWOBJ': _op_newobj, 'BUILD': _op_build, 'BINPERSID': _op_persistent_id,
}
