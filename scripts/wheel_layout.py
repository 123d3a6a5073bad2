# SPDX-License-Identifier: Apache-2.0
"""The layout of wheels: everything is inside the package `stylegan2_ada`, and imported from there.

Setuptools commands, which pyproject.toml names. Editable installations have the layout of the checkout.
"""
import ast
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.errors import SetupError

PACKAGE = 'stylegan2_ada'


class BuildPy(build_py):
    """Collects the files of the wheel, below `stylegan2_ada`."""

    def run(self) -> None:
        """Copy all modules and data, and adapt the imports."""
        if not self.editable_mode:
            self._collect()

    def _collect(self) -> None:
        # What an earlier build has left there would end up in the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        folder = Path(self.build_lib, PACKAGE)
        self.build_lib = str(folder)
        super().run()
        for path in (folder / PACKAGE).iterdir():
            path.rename(folder / path.name)
        (folder / PACKAGE).rmdir()
        own = {name.partition('.')[0] for name in (*self.packages, *self.py_modules)}
        for path in folder.rglob('*.py'):
            path.write_text(inside_package(path.read_text(encoding='utf-8'), own), encoding='utf-8')


class EggInfo(egg_info):
    """Writes the metadata, which name the top-level packages, too."""

    def run(self) -> None:
        """Write all files."""
        super().run()
        self.write_file('top-level names', os.path.join(self.egg_info, 'top_level.txt'), f'{PACKAGE}\n')


def inside_package(source: str, own: Set[str]) -> str:
    """Source code whose imports of the top-level modules `own` name `stylegan2_ada` before these.

    `dnnlib.naming.source_in_checkout` is the inverse. Raises SetupError for `import a.b`, which binds the
    name of the top-level module.
    """
    lines = source.splitlines(keepends=True)
    for line, column, before, after in reversed(list(_changes(ast.parse(source), own))):
        text = lines[line - 1]
        assert text.startswith(before, column), f'{text!r} does not start an import at {column}'
        lines[line - 1] = text[:column] + after + text[column + len(before):]
    return ''.join(lines)


def _changes(tree: ast.Module, own: Set[str]) -> Iterator[tuple[int, int, str, str]]:
    """(line, column, text there, new text) of each import of a module in `own`."""
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or '').partition('.')[0] in own:
                yield node.lineno, node.col_offset, 'from ', f'from {PACKAGE}.'
        elif any(alias.name.partition('.')[0] in own for alias in node.names):
            if len(node.names) > 1 or '.' in node.names[0].name:
                raise SetupError(f'line {node.lineno}: write `{ast.unparse(node)}` as `from ... import ...`')
            yield node.lineno, node.col_offset, 'import ', f'from {PACKAGE} import '
