# SPDX-License-Identifier: Apache-2.0
"""One text of several modules: what it holds, what it refuses, and that old Pythons understand it."""
import ast
import sys
import textwrap

import pytest
import vermin

from torch_utils import bundle, persistence
from training import augment, networks
from training.systems import dcgan, stylegan1

BASE = '''
    """Not needed."""
    import math
    from dnnlib.util import EasyDict

    UNIT = 3
    # About the area.
    def area(r):
        return math.pi * square(r)

    def square(x):
        return UNIT * x * x

    def unused():
        return EasyDict()
'''


def text_of(name, **modules):
    texts = {f'training.{key}': textwrap.dedent(text) for key, text in modules.items()}
    return bundle.bundle(f'training.{name}', texts.get)


def run(text):
    module = type(sys)('bundled')
    sys.modules['bundled'] = module
    try:
        exec(compile(text, 'bundled', 'exec'), module.__dict__)
    finally:
        del sys.modules['bundled']
    return module


def test_a_module_without_needs_is_its_own_text():
    text = textwrap.dedent(BASE)
    assert text_of('base', base=BASE) == text


def test_what_is_used_comes_along_and_nothing_else():
    text = text_of('top', base=BASE, top='''
        """Docstring."""
        from training.base import area as size
        def double(r):
            return 2 * size(r)
    ''')
    assert run(text).double(1) == pytest.approx(6 * 3.14159265)
    assert text.startswith('\n"""Docstring."""\nfrom __future__ import annotations\n')
    assert '# About the area.' in text and 'unused' not in text and 'EasyDict' not in text


def test_modules_are_used_by_name():
    top = 'from training import base\ndef four():\n    return base.square(2)\n'
    text = text_of('top', base=BASE, top=top)
    assert run(text).four() == 12 and 'area' not in text


def test_imports_inside_try_stay():
    text = text_of('top', base=BASE, top='''
        from training.base import square
        try:
            from training.missing import square as fast
        except ImportError:
            fast = square
    ''')
    assert run(text).fast(1) == 3


def test_a_class_may_have_the_name_of_its_base():
    text = text_of('top', base='class Thing:\n    x = 1\n',
                   top='from training import base\nclass Thing(base.Thing):\n    y = 2\n')
    assert (run(text).Thing.x, run(text).Thing.y) == (1, 2)


def test_a_redefined_name_is_an_error():
    with pytest.raises(ValueError, match=r'training\.top redefines UNIT, which a module before it uses'):
        text_of('top', base=BASE, top='from training.base import square\nUNIT = square(5)\n')


@pytest.mark.parametrize('module', [networks, stylegan1, dcgan, augment], ids=lambda m: m.__name__)
def test_texts_in_snapshots_run_on_python_3_7(module):
    text = persistence._module_source(module.__name__)
    ast.parse(text, feature_version=(3, 7))
    config = vermin.Config()
    assert config.add_backport('typing') and config.add_backport('dataclasses')
    assert vermin.detect(text, config) in ([None, (3, 7)], [(0, 0), (3, 7)])
    # Nothing of ours except what the text does without.
    imported = {line for line in text.splitlines() if line.startswith(('from ', 'import '))}
    ours = {line.split()[1] for line in imported if line.split()[1].partition('.')[0] in bundle.PROJECT}
    assert ours <= bundle.PUBLISHED
