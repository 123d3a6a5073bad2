# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: the repository root on the path, and a `device` that is cpu and, where there is one,
cuda.
"""
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

# The shapes of tests are too small to share; and busy threads of two test runs would starve each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
FAILURE_LINES = 12  # the end of what pytest shows of a failure
_failures = {'path': None}


def pytest_addoption(parser):
    parser.addoption('--failures', type=Path, help='append a JSON line to this file at each failure')


def pytest_runtest_logreport(report):
    path = _failures['path']
    if path is not None and report.failed:
        lines = report.longreprtext.strip().splitlines()
        text = {'test': report.nodeid, 'when': report.when, 'end': lines[-FAILURE_LINES:]}
        with open(path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(text) + '\n')


def pytest_configure(config):
    # With several workers only the first process, which gets all reports, writes.
    _failures['path'] = None if hasattr(config, 'workerinput') else config.getoption('--failures')


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
def ctrl_c():
    """train.main() sets a handler for Ctrl-C, which must not stay with pytest."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
