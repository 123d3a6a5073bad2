# SPDX-License-Identifier: Apache-2.0
"""The names under which the packages of this project are imported.

In a checkout they are at the top level: `training`, `torch_utils`, ... The wheel has all of them inside
`stylegan2_ada`, where they collide with nobody's modules, and its imports read `stylegan2_ada.training`.
Network files are the same everywhere: they name `torch_utils.persistence` and `dnnlib.util`, and contain
source code with the imports of a checkout.

After install(), aliases make these names importable from the wheel, and `stylegan2_ada.X` from a checkout.
Other modules that are called `torch_utils` or `dnnlib` take precedence over the aliases.
"""
import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = 'stylegan2_ada'
PREFIX = __name__.removesuffix('dnnlib.naming')  # 'stylegan2_ada.' in the wheel, '' in a checkout
# What network files name: the modules of each package, and what they take from these.
IN_FILES = {'torch_utils': 'torch_utils.persistence', 'dnnlib': 'dnnlib.util'}
TAKEN = ('_reconstruct_persistent_obj', 'EasyDict')
ROOT = Path(__file__).resolve().parents[1]
_lock = threading.RLock()


def in_checkout(module_name: str) -> str:
    """The name of one of our modules in a checkout."""
    return module_name.removeprefix(PREFIX)


def source_in_checkout(source: str) -> str:
    """Source code of one of our modules, with the imports that it has in a checkout."""
    return source.replace(f'from {PACKAGE} import ', 'import ').replace(f'from {PACKAGE}.', 'from ')


def install() -> None:
    """Make the aliases importable; repeating it changes nothing."""
    if any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Aliases())
    for package in IN_FILES if PREFIX else ():
        if package in sys.modules:
            _check_submodules(package, getattr(sys.modules[package], '__file__', None))


@contextlib.contextmanager
def owned() -> Iterator[None]:
    """Within this context `torch_utils` and `dnnlib` are our packages, whoever has these names otherwise.

    For reading and writing pickles, and for the source code in them.
    """
    if not PREFIX:
        yield
        return
    with _lock:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _package(name) in IN_FILES}
        for package in IN_FILES:
            sys.modules[package] = importlib.import_module(PREFIX + package)
        try:
            yield
        finally:
            for name in [name for name in sys.modules if _package(name) in IN_FILES]:
                del sys.modules[name]
            sys.modules.update(hidden)


def _package(name: str) -> str:
    return name.partition('.')[0]


class _Aliases(MetaPathFinder):
    """Finds modules under their other name: `stylegan2_ada.X` in a checkout, `torch_utils.X` in the wheel."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if PREFIX:
            return self._in_wheel(fullname, path, target) if _package(fullname) in IN_FILES else None
        real = fullname.removeprefix(f'{PACKAGE}.')
        place = ROOT.joinpath(*real.split('.'))
        is_ours = real != fullname and (place.is_dir() or place.with_suffix('.py').exists())
        return _alias(fullname, real) if is_ours else None

    def _in_wheel(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None,
    ) -> ModuleSpec | None:
        package = _package(fullname)
        if fullname != package and sys.modules.get(package) is sys.modules.get(PREFIX + package):
            return _alias(fullname, PREFIX + fullname)
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        found = next((spec for spec in others if spec is not None), None)
        if fullname == package:
            if found is None:
                return _alias(fullname, PREFIX + fullname)
            if found.submodule_search_locations is None:
                _check_submodules(package, found.origin)
        elif found is None and fullname == IN_FILES[package]:
            raise ImportError(_conflict(package, str((path or ['?'])[0])), name=fullname)
        return found


def _alias(name: str, real: str) -> ModuleSpec:
    return ModuleSpec(name, _Alias(real))


class _Alias(Loader):
    """Loads the module `real` under another name."""

    def __init__(self, real: str):
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.real)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has replaced it by that of the alias


def _check_submodules(package: str, place: str | None) -> None:
    """Let the import of what network files name fail with a reason, if `package` is a module of others.

    Nobody is asked for submodules of what is no package, so the reason must be there beforehand.
    """
    module = sys.modules.get(package)
    if module is None or not hasattr(module, '__path__'):
        sys.modules.setdefault(IN_FILES[package], _Conflict(package, place))


class _Conflict(ModuleType):
    """Stands where a network file expects one of our modules, and says why it is not there."""

    def __init__(self, package: str, place: str | None):
        super().__init__(IN_FILES[package], _conflict(package, str(place)))

    def __getattr__(self, name: str) -> Any:
        if name in TAKEN:
            raise ImportError(self.__doc__, name=self.__name__)
        raise AttributeError(name)  # for tools that look at all modules


def _conflict(package: str, place: str) -> str:
    return (f'the file needs {IN_FILES[package]}, but `{package}` is another module here ({place}); use '
            f'{PACKAGE}.load_network(), or remove that module from the path')
