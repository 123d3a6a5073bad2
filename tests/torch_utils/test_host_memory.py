# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again costs no page faults."""
import os
import resource
import subprocess
import sys

import pytest
import torch

from torch_utils import misc
from torch_utils.misc import keep_freed_memory

BYTES = 2 ** 26  # more than glibc ever keeps by itself
TIMES = 6
SKIPPED = 77


def faults():
    """Of the system, for a large tensor that is made and dropped, once there is a place for it."""
    counts = []
    for _ in range(TIMES):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(BYTES // 4).add_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


def compare():
    """Status of a process that does so without and with what it freed."""
    each_page = BYTES // os.sysconf('SC_PAGE_SIZE')
    if faults() < each_page or not keep_freed_memory(torch.device('cpu')):
        return SKIPPED
    return 0 if faults() < each_page / 100 else 1


def test_freed_memory_is_used_again_without_a_page_fault():
    # In a fresh process, for it cannot be undone, and a training may have done it in this one.
    status = subprocess.run([sys.executable, __file__], check=False).returncode
    if status == SKIPPED:
        pytest.skip('a system with large pages, or a C library without mallopt')
    assert status == 0


def test_a_gpu_is_no_reason_to_keep_memory(monkeypatch):
    monkeypatch.setattr(misc.ctypes, 'CDLL', lambda name: pytest.fail('asked the C library'))
    assert not keep_freed_memory(torch.device('cuda'))


if __name__ == '__main__':
    torch.set_num_threads(1)
    sys.exit(compare())
