# SPDX-License-Identifier: Apache-2.0
"""What a machine can see of the style: size of functions and files, docstrings, annotations, forbidden
things.
"""
import ast
import dataclasses
import importlib.util
import statistics
import subprocess
import sys
import tokenize

import pytest
from source_tree import ROOT, Source, all_files, product_files

MAX_FUNCTION_LINES, MEDIAN_FUNCTION_LINES, MAX_NESTING, MAX_PARAMETERS = 60, 10, 3, 8
MAX_FILE_LINES, MAX_NETWORK_LINES = 500, 640
MIN_COMMENTS, MAX_COMMENTS = 0.05, 0.15  # lines of comment a line of code, over all files
BLOCKS = (ast.For, ast.While, ast.If, ast.Try)


def lines_of(function):
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def depth(node, level=0):
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            continue
        # An elif is an If inside orelse, but reads as the same level.
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child, level + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def public_functions(source):
    """Functions and methods that are neither private nor inside of something that is."""
    hidden = [c for c in ast.walk(source.tree) if isinstance(c, ast.ClassDef) and c.name.startswith('_')]
    inner = {id(n) for outer in [*source.functions(), *hidden] for n in ast.walk(outer) if n is not outer}
    return [f for f in source.functions() if not f.name.startswith('_') and id(f) not in inner]


def code_lines(source):
    """Lines that are neither empty nor part of a docstring."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [n.body[0] for n in ast.walk(source.tree) if isinstance(n, owners) and ast.get_docstring(n)]
    inside = sum(d.end_lineno - d.lineno + 1 for d in docstrings)
    return len([line for line in source.text.splitlines() if line.strip()]) - inside


def complain(wrong):
    assert not wrong, '\n'.join(wrong)


def test_functions_are_short():
    complain([f'{s.at(f)}: {f.name} has {lines_of(f)} lines' for s in product_files() for f in s.functions()
              if lines_of(f) > MAX_FUNCTION_LINES])
    assert statistics.median(
        lines_of(f) for s in product_files() for f in s.functions()) <= MEDIAN_FUNCTION_LINES


def test_functions_nest_little():
    complain([f'{s.at(f)}: {f.name} nests {depth(f)} deep' for s in product_files() for f in s.functions()
              if depth(f) > MAX_NESTING])


def test_functions_take_few_parameters_unless_marked_as_published():
    def count(f):
        return len(
            [a for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs if a.arg not in ('self', 'cls')])
    complain(
        [f'{s.at(f)}: {f.name} takes {count(f)} parameters' for s in product_files() for f in s.functions()
              if count(f) > MAX_PARAMETERS and 'noqa: PLR0913' not in s.text.splitlines()[f.lineno - 1]])


def test_files_are_short():
    complain([f'{s.path.name}: {len(s.text.splitlines())} lines' for s in product_files()
              if len(s.text.splitlines()) > (
                  MAX_NETWORK_LINES if 'networks' in s.path.name else MAX_FILE_LINES)])


def test_everything_public_has_a_docstring_and_annotations():
    wrong = []
    for s in product_files():
        for f in public_functions(s):
            arguments = [a for a in f.args.args + f.args.kwonlyargs if a.arg not in ('self', 'cls')]
            if ast.get_docstring(f) is None:
                wrong.append(f'{s.at(f)}: {f.name} has no docstring')
            if f.returns is None or any(a.annotation is None for a in arguments):
                wrong.append(f'{s.at(f)}: {f.name} is not annotated')
    complain(wrong)


def test_nothing_forbidden_is_there():
    wrong = []
    for s in all_files():
        for node in ast.walk(s.tree):
            if isinstance(node, ast.ExceptHandler):
                caught = '' if node.type is None else ast.unparse(node.type)
                if caught in ('', 'Exception', 'BaseException'):
                    wrong.append(f'{s.at(node)}: catches everything')
            if isinstance(node, ast.Global):
                wrong.append(f'{s.at(node)}: global')
    complain(wrong)


def comments(source):
    with tokenize.open(source.path) as file:
        return [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT]


def test_comments_are_neither_rare_nor_everywhere():
    lines = sum(len({t.start[0] for t in comments(s)}) for s in product_files())
    code = sum(code_lines(s) for s in product_files())
    assert MIN_COMMENTS <= lines / code <= MAX_COMMENTS, f'{lines} comments in {code} lines of code'


def test_comments_leave_nothing_for_later_and_draw_no_lines():
    marks = ['TO' + 'DO', 'FIX' + 'ME', 'X' + 'XX', '# ----', '# ====', '####']
    complain([f'{s.path.name}:{t.start[0]}: {t.string}' for s in all_files() for t in comments(s)
              if any(mark in t.string for mark in marks)])


def test_files_are_ascii_and_carry_the_licence_line():
    complain([f'{s.path.name}: not ASCII' for s in all_files() if not s.text.isascii()])
    complain([f'{s.path.name}: no licence line' for s in all_files()
              if not s.text.startswith('# SPDX-License-Identifier: Apache-2.0\n')])


def test_network_and_tensor_code_never_waits_for_the_device():
    watched = ('training.networks', 'training.loss', 'training.phases', 'torch_utils.ops')
    complain([f'{s.at(n)}: .{n.func.attr}()' for s in product_files() if s.module.startswith(watched)
              for n in ast.walk(s.tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
              and n.func.attr in ('item', 'tolist')])


@pytest.mark.skipif(importlib.util.find_spec('ruff') is None, reason='ruff is not installed')
def test_ruff_is_satisfied():
    result = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format=concise', '.'], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


# The measures themselves, on code that is known to break the rules.
BAD = Source(ROOT / 'bad.py', 'bad', '''# first comment
"""Docstring."""


def deep(a, b):
    """Docstring of
    two lines."""
    for i in a:
        if i:
            with b:
                while i:
                    i -= 1
        elif b:
            pass
        elif a:
            pass
    return a


class _Hidden:
    def method(self):
        def inner():
            pass
        return inner
''', None)


@pytest.fixture
def bad():
    return dataclasses.replace(BAD, tree=ast.parse(BAD.text))


def test_length_and_nesting_are_measured(bad):
    deep = bad.functions()[0]
    assert lines_of(deep) == 10 and depth(deep) == 3
    assert code_lines(bad) == len([line for line in bad.text.splitlines() if line]) - 3


def test_public_functions_are_told_from_hidden_and_inner_ones(bad):
    assert [f.name for f in public_functions(bad)] == ['deep']
