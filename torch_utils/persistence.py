# SPDX-License-Identifier: Apache-2.0
"""Classes whose instances are pickled together with the source code of their module.

Such a pickle opens wherever `torch_utils` and `dnnlib` can be imported, ours or copies of the published ones,
even after the class has changed; torch_utils.bundle makes the text.
Opening it with `pickle.load` executes that source; `torch_utils.pickles.describe` reads it without executing.
"""
import contextlib
import copy
import functools
import importlib
import inspect
import pickle
import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dnnlib import naming
from dnnlib.util import EasyDict, UserError
from torch_utils.bundle import bundle

VERSION = 6  # of the dictionary that represents an object in a pickle

_sources: dict[str, str] = {}  # module name -> source code
_modules: dict[str, types.ModuleType] = {}  # source code -> module created from it
# Of files of version 0.1: module name -> {module name: source code}, in order of import.
_companions: dict[str, dict[str, str]] = {}
_import_lock = threading.RLock()

T = TypeVar('T', bound=type)
Hook = Callable[[EasyDict], EasyDict]
_hooks: list[Hook] = []


def persistent_class(cls: T) -> T:
    """Class decorator: a subclass of the same name that records its arguments and is pickled with its source.

    Adds the properties init_args (tuple) and init_kwargs (EasyDict, as are all dictionaries in it), both deep
    copies, and the class attributes _orig_module_src and _orig_class_name. Decorating twice changes nothing.
    Constructing an instance raises TypeError if its arguments cannot be pickled. Raises ValueError if the
    source code of the module cannot be read.
    """
    assert isinstance(cls, type), f'persistent_class decorates classes, not {cls!r}'
    if is_persistent(cls):
        return cls
    source = _module_source(cls.__module__)

    bases = (cls,) if issubclass(cls, _PersistentMixin) else (_PersistentMixin, cls)

    class Persistent(*bases):
        _orig_module_src = source
        _orig_class_name = cls.__name__
        _is_decorated = True

        @functools.wraps(cls.__init__)
        def __init__(self, *args: Any, **kwargs: Any):
            arguments = _checked_copy(cls.__name__, args, kwargs)
            super().__init__(*args, **kwargs)
            # After the constructor: with nested decorated classes, the outermost arguments are kept.
            self.__dict__['_init_args'], self.__dict__['_init_kwargs'] = arguments

    for attribute in ('__name__', '__qualname__', '__module__', '__doc__'):
        setattr(Persistent, attribute, getattr(cls, attribute))
    return Persistent


def is_persistent(obj: Any) -> bool:
    """Whether this is a decorated class or an instance of one; undecorated subclasses are not."""
    cls = obj if isinstance(obj, type) else type(obj)
    return '_is_decorated' in cls.__dict__


def import_hook(hook: Hook) -> Hook:
    """Register hook(meta) -> meta, called for each object being unpickled, before its source is executed.

    meta: EasyDict with type, version, module_src, class_name, state. Typical use: patch the module_src of old
    files.
    """
    assert callable(hook), f'an import hook is a function of one argument, not {hook!r}'
    _hooks.append(hook)
    return hook


class _PersistentMixin:
    """Base of every decorated class."""

    @property
    def init_args(self) -> tuple:
        """Positional constructor arguments, as a deep copy."""
        return copy.deepcopy(self._init_args)

    @property
    def init_kwargs(self) -> EasyDict:
        """Keyword constructor arguments, as a deep copy."""
        return _with_attributes(copy.deepcopy(self._init_kwargs), EasyDict)

    def __reduce_ex__(self, protocol: int) -> tuple:
        plain = super().__reduce_ex__(max(int(protocol), 2))
        if not is_persistent(self):
            return plain  # an undecorated subclass: the source code of its parent does not contain it
        cls = type(self)
        # By the names in files: in the wheel these may be the modules of another program.
        reconstruct = importlib.import_module('torch_utils.persistence')._reconstruct_persistent_obj
        state, easy_dict = dict(plain[2] or {}), importlib.import_module('dnnlib.util').EasyDict
        if '_init_kwargs' in state:
            state['_init_kwargs'] = _with_attributes(state['_init_kwargs'], easy_dict)
        meta = {'type': 'class', 'version': VERSION, 'module_src': cls._orig_module_src,
                'class_name': cls._orig_class_name, 'state': state}
        if _companions.get(cls.__module__):
            meta['companions'] = _companions[cls.__module__]
        return reconstruct, (meta,), None

    def __deepcopy__(self, memo: dict) -> Any:
        # Not through __reduce_ex__: a copy has the class of the original, not one rebuilt from its source.
        if hasattr(super(), '__deepcopy__'):
            return super().__deepcopy__(memo)
        twin = memo[id(self)] = type(self).__new__(type(self))
        _set_state(twin, copy.deepcopy(super().__reduce_ex__(2)[2] or {}, memo))
        return twin


def _reconstruct_persistent_obj(meta: dict) -> Any:
    """Called by pickles to rebuild an object from its source code, without its constructor.

    Raises UserError for an unknown format version.
    """
    meta = EasyDict(meta)
    meta.state = EasyDict(meta.state)
    for hook in _hooks:
        meta = hook(meta)
        assert meta is not None, 'an import hook must return meta'
    if meta.type != 'class' or meta.version != VERSION:
        raise UserError(f'the pickle holds a {meta.type!r} object of format {meta.version}; only classes of '
                        f'format {VERSION} are known: open it with the version of the program that wrote it')
    module = _module_of(meta.module_src, meta.get('companions', {}))
    cls = persistent_class(module.__dict__[meta.class_name])
    obj = cls.__new__(cls)
    _set_state(obj, dict(meta.state))
    return obj


_reconstruct_persistent_obj.__module__ = naming.in_checkout(__name__)  # as files name it


def _set_state(obj: Any, state: dict) -> None:
    if hasattr(obj, '__setstate__'):  # torch modules: adds fields that older releases lack
        obj.__setstate__(state)
    else:
        obj.__dict__.update(state)


def _checked_copy(class_name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Deep copies of the arguments. Only these are test-pickled: all weights would take seconds."""
    try:
        with naming.owned():
            pickle.dump((args, kwargs), _Discard())
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TypeError(f'{class_name}: cannot be saved: its arguments cannot be pickled: {error}') from error
    return copy.deepcopy(args), copy.deepcopy(kwargs)


def _with_attributes(kwargs: dict, kind: type[dict]) -> dict:
    """The same with `kind`, an EasyDict, for each dictionary: programs set init_kwargs.synthesis_kwargs.x."""
    return kind({name: _with_attributes(value, kind) if isinstance(value, dict) else value
                 for name, value in kwargs.items()})


class _Discard:
    """A file that discards all data."""

    def write(self, data: Any) -> int:
        return len(data)


def _module_source(name: str) -> str:
    """Source code of an imported module and all that it needs, as in a checkout; cached at first use."""
    if name not in _sources:
        _sources[name] = bundle(naming.in_checkout(name), _file_source)
        _modules.setdefault(_sources[name], sys.modules[name])
    return _sources[name]


def _file_source(name: str) -> str | None:
    """The text of an imported module, by its name in a checkout; None if there is no such module."""
    module = sys.modules.get(naming.PREFIX + name) or sys.modules.get(name)
    if module is None:
        return None
    try:
        return naming.source_in_checkout(inspect.getsource(module))
    except (OSError, TypeError) as error:
        raise ValueError(f'persistent_class: the source code of module {name} cannot be read; '
                         'move the class to a file') from error


def _module_of(source: str, companions: dict[str, str]) -> types.ModuleType:
    """The module with this source code: the installed one if byte-identical, else a new one."""
    with _import_lock:
        # Keyed by the source code itself: the table holds installed modules, too.
        if source not in _modules:
            module = types.ModuleType(f'_imported_module_{uuid.uuid4().hex}')
            with contextlib.ExitStack() as undo:
                undo.callback(_forget, module.__name__, source)
                _sources[module.__name__] = source
                _companions[module.__name__] = dict(companions)
                _modules[source] = sys.modules[module.__name__] = module
                with naming.owned(), _aliases(companions):
                    exec(compile(source, f'<{module.__name__}>', 'exec'), module.__dict__)
                undo.pop_all()
        return _modules[source]


def _forget(name: str, source: str) -> None:
    for table, key in ((_sources, name), (_companions, name), (_modules, source), (sys.modules, name)):
        table.pop(key, None)


@contextlib.contextmanager
def _aliases(companions: dict[str, str]) -> Iterator[None]:
    """Within this context companions can be imported by name, hiding any package of that name."""
    packages = {name.partition('.')[0] for name in companions}
    hidden = {name: module for name, module in sys.modules.items() if name.partition('.')[0] in packages}
    modules = {}
    for name, source in companions.items():
        modules[name] = _module_of(source, dict(list(companions.items())[:len(modules)]))
    try:
        for name in hidden:
            del sys.modules[name]
        for name, module in modules.items():
            package, _, leaf = name.rpartition('.')
            parent = sys.modules.setdefault(package, types.ModuleType(package))
            parent.__path__ = []
            sys.modules[name] = module
            setattr(parent, leaf, module)
        yield
    finally:
        for name in [n for n in sys.modules if n.partition('.')[0] in packages]:
            del sys.modules[name]
        sys.modules.update(hidden)
