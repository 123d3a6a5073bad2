# SPDX-License-Identifier: Apache-2.0
"""The imports of a wheel's modules."""
import pytest
from setuptools.errors import SetupError

from dnnlib import naming
from scripts.wheel_layout import inside_package

OWN = {'training', 'dnnlib', 'train'}
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


def test_only_imports_of_our_modules_change_and_can_be_changed_back():
    assert inside_package(SOURCE, OWN) == INSIDE
    assert naming.source_in_checkout(INSIDE) == SOURCE


@pytest.mark.parametrize('line', ['import training.config', 'import os, dnnlib'])
def test_imports_that_cannot_be_changed_end_the_build(line):
    with pytest.raises(SetupError, match='line 2'):
        inside_package(f'x = 1\n{line}\n', OWN)
