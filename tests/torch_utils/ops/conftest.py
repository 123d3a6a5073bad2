# SPDX-License-Identifier: Apache-2.0
"""The fixture that lets operators on the CPU run through their CUDA kernels, emulated."""
import pytest
from cuda_emulation import launcher

from torch_utils import custom_ops
from torch_utils.ops._registry import OPS


@pytest.fixture
def emulated(monkeypatch):
    """Kernels instead of references for all operators on the CPU; the value lists the kernels launched."""
    if not launcher.is_possible():
        pytest.skip('the emulation of kernels needs g++ on Linux')
    monkeypatch.setattr(custom_ops, 'launch', launcher.launch)
    monkeypatch.setattr(custom_ops, 'is_available', lambda device: True)
    for op in OPS.values():
        if op.native is not None:
            monkeypatch.setitem(op.kernels, 'cpu', op.run_native)
    launcher.launched.clear()
    return launcher.launched
