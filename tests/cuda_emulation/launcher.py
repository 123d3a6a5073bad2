# SPDX-License-Identifier: Apache-2.0
"""Stands in for custom_ops: kernels are built by a C++ compiler and run on CPU tensors.

Every tensor is copied between guard zones of NaN, at an address as aligned as its own: what a kernel writes
outside is found, and what it reads outside spoils its result.
"""
import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / 'torch_utils' / 'ops' / 'csrc'
COMPILER = shutil.which('g++')
CACHE = Path(tempfile.gettempdir()) / f'kernel_emulation_{os.getuid() if hasattr(os, "getuid") else 0}'
GUARD, ALIGNMENT = 1024, 256  # bytes
FAILURES = {1: 'other arguments than the kernel takes', 2: 'a misaligned vector access', 3: 'a deadlock',
            4: 'a shuffle that not all lanes of a warp take part in', 5: 'a block of more than 1024 threads'}
_entries = {}
launched = []  # kernels in order, for tests that ask which one was taken


def is_possible():
    """Whether this machine has what it takes."""
    return COMPILER is not None and sys.platform == 'linux'


def _source_text():
    files = [*sorted(CSRC.glob('*.cu*')), *sorted(HERE.glob('*.h'))]
    return b''.join(f.read_bytes() for f in files)


SOURCES_KEY = hashlib.sha256(_source_text()).hexdigest()


def _build(kernel):
    key = hashlib.sha256(repr((SOURCES_KEY, kernel)).encode()).hexdigest()[:24]
    target = CACHE / f'{key}.so'
    if target.is_file():
        return target
    CACHE.mkdir(mode=0o700, exist_ok=True)
    text = (f'#include "{CSRC / kernel.source}"\n'
            f'extern "C" int start(const uint64_t* words, const char* letters, '
            f'const unsigned* grid, const unsigned* block) '
            f'{{ return emulation::launch({kernel.entry}, words, letters, grid, block); }}\n')
    part = target.with_suffix(f'.{os.getpid()}.part')
    defines = [f'-D{name}={value}' for name, value in kernel.defines]
    subprocess.run(
        [COMPILER, '-std=c++17', '-O1', '-w', '-fno-rtti', '-fno-exceptions', '-fPIC', '-shared',
         '-fno-strict-aliasing', f'-I{HERE}', f'-I{CSRC}',
         '-include', 'cuda_emulation.h', *defines, '-x', 'c++', '-', '-o', str(part),
         '-nodefaultlibs', '-lm', '-lc', '-lgcc'],
        input=text.encode(), check=True)
    os.replace(part, target)
    return target


def entry_of(kernel):
    """The compiled kernel as a function of words, letters, grid and block."""
    if kernel not in _entries:
        # With the interpreter's lock held: fibers must not be interrupted by another launch.
        _entries[kernel] = ctypes.PyDLL(str(_build(kernel))).start
    return _entries[kernel]


class Guarded:
    """A copy of a tensor's memory between guard zones."""

    def __init__(self, tensor):
        self.tensor = tensor
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in pairs)
        self.size = extent * tensor.element_size()
        self.memory = np.full(self.size + 2 * GUARD + ALIGNMENT, 0xff, dtype=np.uint8)
        base = self.memory.ctypes.data + GUARD
        self.start = GUARD + (tensor.data_ptr() - base) % ALIGNMENT
        self.before = np.frombuffer(ctypes.string_at(tensor.data_ptr(), self.size), dtype=np.uint8)
        self.memory[self.start:self.start + self.size] = self.before
        self.address = self.memory.ctypes.data + self.start

    def finish(self, kernel):
        """Check the zones and copy what was written back to the tensor."""
        inside = self.memory[self.start:self.start + self.size]
        outside = np.concatenate([self.memory[:self.start], self.memory[self.start + self.size:]])
        assert (outside == 0xff).all(), f'{kernel} wrote outside {list(self.tensor.shape)}'
        if not np.array_equal(inside, self.before):
            ctypes.memmove(self.tensor.data_ptr(), self.address, self.size)


def launch(kernel, grid, block, args, device, shared_bytes=0):
    """As custom_ops.launch(), on CPU tensors."""
    assert shared_bytes == 0 and all(1 <= n for n in (*grid, *block))
    launched.append(kernel)
    words, letters, guarded = [], '', []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            guarded.append(Guarded(arg))
        is_pointer = arg is None or isinstance(arg, torch.Tensor)
        letters += 'p' if is_pointer else 'd' if isinstance(arg, float) else 'i'
        value = 0 if arg is None else guarded[-1].address if is_pointer else arg
        words.append(struct.pack('<d' if letters[-1] == 'd' else '<q', value))
    failure = entry_of(kernel)(
        b''.join(words), letters.encode(), (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block))
    assert failure == 0, f'{kernel}: {FAILURES[failure]}'
    for each in guarded:
        each.finish(kernel)
