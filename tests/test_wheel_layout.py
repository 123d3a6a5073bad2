# SPDX-License-Identifier: Apache-2.0
"""The imports of a wheel's modules."""
import subprocess
import sys

import pytest
from golden_cases import ROOT

from dnnlib import naming

# In a process of its own: setuptools refuses to be imported after distutils, which other tests import.
PROGRAM = '''
import sys
from scripts.wheel_layout import inside_package
print(inside_package(sys.stdin.read(), {'training', 'dnnlib', 'train'}), end='')
'''
SOURCE = '''"""from training import nothing."""
import torch, train_else
import dnnlib
import dnnlib as short
from training import config
from training.config import (
    values,
)
from training_else import x
text = 'from dnnlib import y'

def late(): from dnnlib.util import z; import train
'''
INSIDE = '''"""from training import nothing."""
import torch, train_else
from stylegan2_ada import dnnlib
from stylegan2_ada import dnnlib as short
from stylegan2_ada.training import config
from stylegan2_ada.training.config import (
    values,
)
from training_else import x
text = 'from dnnlib import y'

def late(): from stylegan2_ada.dnnlib.util import z; from stylegan2_ada import train
'''


def rewrite(source):
    """Exit status, result and error message."""
    done = subprocess.run([sys.executable, '-c', PROGRAM], input=source, cwd=ROOT, capture_output=True,
                          text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_only_imports_of_our_modules_change_and_can_be_changed_back():
    assert rewrite(SOURCE) == (0, INSIDE, '')
    assert naming.source_in_checkout(INSIDE) == SOURCE


@pytest.mark.parametrize('line', ['import training.config', 'import os, dnnlib'])
def test_imports_that_cannot_be_changed_end_the_build(line):
    status, _, message = rewrite(f'x = 1\n{line}\n')
    assert status == 1 and f'SetupError: line 2: write `{line}` as' in message
