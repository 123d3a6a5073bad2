# SPDX-License-Identifier: Apache-2.0
"""The project's Python files, parsed, for the tests that look at the code itself."""
import ast
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ('dnnlib', 'torch_utils', 'training', 'metrics', 'stylegan2_ada')
NOT_SOURCE = ('tests', 'benchmarks', 'scripts')


@dataclass(frozen=True)
class Source:
    """One file: dotted module name, text and syntax tree."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    def at(self, node):
        return f'{self.path.relative_to(ROOT)}:{getattr(node, "lineno", 1)}'

    def functions(self):
        """All functions and methods, outermost first."""
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]


def _tracked(pattern):
    listed = subprocess.run(
        ['git', '-C', str(ROOT), 'ls-files', '-co', '--exclude-standard', pattern], capture_output=True,
        text=True, check=False)
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    if listed.returncode:  # not a git checkout
        paths = [p for p in ROOT.rglob(pattern) if '.venv' not in p.parts and 'build' not in p.parts]
    return sorted(p for p in paths if p.is_file())


@functools.cache
def all_files():
    """Every Python file of the project, tests included."""
    sources = []
    for path in _tracked('*.py'):
        parts = path.relative_to(ROOT).with_suffix('').parts
        module = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        text = path.read_text(encoding='utf-8')
        sources.append(Source(path, module, text, ast.parse(text)))
    return sources


def product_files():
    """What is shipped: packages and top-level scripts."""
    return [s for s in all_files() if s.module.split('.')[0] not in NOT_SOURCE]
