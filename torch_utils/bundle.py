# SPDX-License-Identifier: Apache-2.0
"""One source text of a module and of all it needs, for programs that have only the published modules.

Programs of the StyleGAN2-ADA lineage execute the text inside a snapshot with their own copies of torch_utils
and dnnlib. What a module imports at its top level from others of this project, or of its own package, is put
before it; imports inside `try` stay.
"""
import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PROJECT = {'dnnlib', 'metrics', 'torch_utils', 'training'}  # packages
# Modules that every program of the lineage has.
PUBLISHED = {
    'dnnlib', 'dnnlib.util', 'torch_utils', 'torch_utils.misc', 'torch_utils.persistence',
    'torch_utils.training_stats', 'torch_utils.ops', *(f'torch_utils.ops.{name}' for name in (
        'bias_act', 'conv2d_gradfix', 'conv2d_resample', 'fma', 'grid_sample_gradfix', 'upfirdn2d'))}
FUTURE = 'from __future__ import annotations\n'
SourceOf = Callable[[str], 'str | None']
Symbol = tuple[str, str]  # module, and a name at its top level


@dataclass(frozen=True, eq=False)
class _Part:
    """A top-level statement: its text with the comments above it, what it defines and what it uses."""

    text: str
    defines: set[Symbol]
    uses: set[Symbol]


@dataclass
class _Module:
    """A module as parts.

    head: comments and docstring before them.  needs: modules to put before it.  aliases: names that stand for
    modules.  imported: names that come from other modules of the text.
    """

    head: str = ''
    parts: list[_Part] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    imported: dict[str, Symbol] = field(default_factory=dict)


def bundle(name: str, source_of: SourceOf) -> str:
    """The text of module `name` after what it needs of others; a module that needs none: its own text.

    source_of: the text of a module; None if there is no such module.
    Raises ValueError if a later module redefines what an earlier one uses.
    """
    modules: dict[str, _Module] = {}
    _collect(name, source_of, modules)
    if len(modules) == 1:
        return _text(name, source_of)
    kept = _reachable(modules, name)
    _check_names(kept)
    sections = [f'\n# From {module.replace(".", "/")}.py.\n' + ''.join(part.text for part in parts)
                for module, parts in kept.items() if parts]
    return ''.join([modules[name].head, FUTURE, *sections])


def _text(name: str, source_of: SourceOf) -> str:
    source = source_of(name)
    assert source is not None, f'no module {name}'
    return source


def _collect(name: str, source_of: SourceOf, modules: dict[str, _Module]) -> None:
    """Add the module and, before it, those that it needs."""
    module = _parse(name, source_of)
    for needed in module.needs:
        if needed not in modules:
            _collect(needed, source_of, modules)
    modules[name] = module


def _parse(name: str, source_of: SourceOf) -> _Module:
    source = _text(name, source_of)
    lines, tree, module, end = source.splitlines(keepends=True), ast.parse(source), _Module(), 0
    for node in tree.body:
        text, end = ''.join(lines[end:node.end_lineno]), node.end_lineno or 0
        if node is tree.body[0] and ast.get_docstring(tree) is not None:
            module.head = text
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module.parts += _imported(name, module, node, alias, source_of)
        else:
            defines = {(name, found) for found in _bound(node)}
            module.parts.append(_Part(text, defines, set(_used(name, module, node))))
    return module


def _imported(
    name: str, module: _Module, node: ast.Import | ast.ImportFrom, alias: ast.alias, source_of: SourceOf,
) -> Iterator[_Part]:
    """What takes the place of one name of an import."""
    local = alias.asname or alias.name
    origin = f'from {node.module} ' if isinstance(node, ast.ImportFrom) else ''
    inner = f'{origin[5:-1]}.{alias.name}'
    is_module = source_of(inner) is not None
    needed = inner if is_module else origin[5:-1]
    if needed in PUBLISHED or needed.partition('.')[0] not in PROJECT | {name.partition('.')[0]}:
        if origin != 'from __future__ ':
            renamed = f' as {alias.asname}' if alias.asname else ''
            yield _Part(f'{origin}import {alias.name}{renamed}\n', {(name, local.partition('.')[0])}, set())
        return
    module.needs.append(needed)
    if is_module:  # each module in the text is the text's own module
        module.aliases[local] = needed
        yield _Part(f'import sys\n{local} = sys.modules[__name__]\n', {(name, local)}, set())
    else:
        module.imported[local] = needed, alias.name
        if local != alias.name:
            yield _Part(f'{local} = {alias.name}\n', {(name, local)}, {(needed, alias.name)})


def _bound(node: ast.stmt) -> Iterator[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition('.')[0] for alias in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Try | ast.If):
        for child in ast.iter_child_nodes(node):
            for statement in child.body if isinstance(child, ast.ExceptHandler) else [child]:
                yield from _bound(statement) if isinstance(statement, ast.stmt) else ()
    else:
        yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _used(name: str, module: _Module, node: ast.stmt) -> Iterator[Symbol]:
    """What a statement uses, by its own module's names or as attributes of other modules."""
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
            yield name, n.id
            if n.id in module.imported:
                yield module.imported[n.id]
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in module.aliases:
            yield module.aliases[n.value.id], n.attr


def _reachable(modules: dict[str, _Module], name: str) -> dict[str, list[_Part]]:
    """All parts of the named module, and those of others that these use, directly or not."""
    kept = set(modules[name].parts)
    others = {part for module in modules.values() for part in module.parts} - kept
    while True:
        used = set().union(*(part.uses for part in kept))
        found = {part for part in others if part.defines & used}
        if not found:
            return {key: [part for part in module.parts if part in kept] for key, module in modules.items()}
        kept, others = kept | found, others - found


def _check_names(kept: dict[str, list[_Part]]) -> None:
    texts: dict[str, set[str]] = {}  # of what defines a name, so far
    used: set[str] = set()  # so far
    for module, parts in kept.items():
        for part in parts:
            changed = {n for _, n in part.defines if n in used and texts.get(n, {part.text}) != {part.text}}
            if changed:
                raise ValueError(f'{module} redefines {min(changed)}, which a module before it uses')
        for part in parts:
            used |= {n for _, n in part.uses}
            for _, n in part.defines:
                texts.setdefault(n, set()).add(part.text)
