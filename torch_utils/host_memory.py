# SPDX-License-Identifier: Apache-2.0
"""How the C library treats the memory of tensors on a CPU."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3)
NEVER = 2 ** 31 - 1  # bytes


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next tensors. Returns whether the C library can do that.

    By default glibc takes large blocks from the system and returns them at once, so that each training step
    gets the same thousands of pages anew, cleared one by one.
    """
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
