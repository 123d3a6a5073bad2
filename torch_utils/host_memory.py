# SPDX-License-Identifier: Apache-2.0
"""How the C library treats the memory of tensors on a CPU."""
import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
LIMIT = 2 ** 31 - 1  # bytes, the most that an int says


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process, if its device is the CPU, keep up to 2 GiB that it frees, for the next tensors.

    By default glibc may return large blocks to the system at once, so that each training step gets the same
    thousands of pages anew, cleared one by one; how many depends on where blocks happen to lie.

    Returns whether it does: not with a GPU, and not every C library can.
    """
    if device.type != 'cpu' or not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LIMIT)) and bool(mallopt(M_TRIM_THRESHOLD, LIMIT))
