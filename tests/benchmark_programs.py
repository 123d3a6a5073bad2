# SPDX-License-Identifier: Apache-2.0
"""The programs of benchmarks/: to run, and to import without leaving their folder on the path."""
import contextlib
import importlib
import subprocess
import sys

import pytest
from golden_cases import ROOT


def run_benchmark(name, *args):
    """The finished process of benchmarks/<name>.py."""
    command = [sys.executable, f'benchmarks/{name}.py', *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def benchmark_module(name):
    """benchmarks/<name>.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'benchmarks')
        yield importlib.import_module(name)
