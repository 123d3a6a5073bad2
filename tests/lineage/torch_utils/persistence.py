# SPDX-License-Identifier: Apache-2.0
"""Objects pickled with their source, by the protocol that all programs share."""
import copy
import inspect
import sys
import types
import uuid

import dnnlib

_hooks, _text_of, _module_of = [], {}, {}


def persistent_class(orig_class):
    """A subclass that remembers its arguments and pickles with the text of its module."""
    if is_persistent(orig_class):
        return orig_class
    assert orig_class.__module__ in sys.modules
    text = _text(sys.modules[orig_class.__module__])

    class Remembering(orig_class):
        _orig_module_src, _orig_class_name = text, orig_class.__name__

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)

        @property
        def init_args(self):
            return copy.deepcopy(self._init_args)

        @property
        def init_kwargs(self):
            return dnnlib.EasyDict(copy.deepcopy(self._init_kwargs))

        def __reduce__(self):
            function, args, state, *rest = [*super().__reduce__(), None, None, None][:5]
            if function is not _reconstruct_persistent_obj:
                meta = {'type': 'class', 'version': 6, 'module_src': self._orig_module_src,
                        'class_name': self._orig_class_name, 'state': state}
                function, args = _reconstruct_persistent_obj, (meta,)
            return (function, args, None, *rest)

    Remembering.__name__ = orig_class.__name__
    _decorated.add(Remembering)
    return Remembering


_decorated = set()


def is_persistent(obj):
    """Whether a class, or that of an object, is decorated."""
    return (obj if isinstance(obj, type) else type(obj)) in _decorated


def import_hook(hook):
    """Have meta changed before it is used."""
    _hooks.append(hook)


def _reconstruct_persistent_obj(meta):
    meta = dnnlib.EasyDict(meta)
    meta.state = dnnlib.EasyDict(meta.state)
    for hook in _hooks:
        meta = hook(meta)
    assert meta.type == 'class' and meta.version == 6
    cls = persistent_class(_module(meta.module_src).__dict__[meta.class_name])
    obj = cls.__new__(cls)
    if hasattr(obj, '__setstate__'):
        obj.__setstate__(meta.state)
    else:
        obj.__dict__.update(meta.state)
    return obj


def _text(module):
    if module not in _text_of:
        _text_of[module] = inspect.getsource(module)
        _module_of[_text_of[module]] = module
    return _text_of[module]


def _module(text):
    if text not in _module_of:
        module = types.ModuleType('_foreign_' + uuid.uuid4().hex)
        sys.modules[module.__name__] = module
        _text_of[module], _module_of[text] = text, module
        exec(text, module.__dict__)
    return _module_of[text]
