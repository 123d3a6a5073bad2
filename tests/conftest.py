# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: the repository root on the path, and a `device` that is cpu and, where there is one,
cuda.
"""
import sys
from pathlib import Path

import pytest
import torch

# The shapes of tests are too small to share; and busy threads of two test runs would starve each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason='no CUDA device')
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    """Each test that takes this runs on the CPU and, with the marker `gpu`, on CUDA with TF32 off."""
    if request.param == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
