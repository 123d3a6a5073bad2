# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver without a GPU: driver_stand_in.cpp, loaded in place of libcuda."""
import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix('.cpp')
COMPILER = shutil.which('g++')


class Launch(ctypes.Structure):
    """What reached cuLaunchKernel."""

    _fields_ = (('function', ctypes.c_void_p), ('geometry', ctypes.c_uint * 7), ('stream', ctypes.c_void_p),
                ('words', ctypes.c_uint64 * 16))


def is_possible():
    """Whether this machine has what it takes."""
    return COMPILER is not None and sys.platform == 'linux'


def build(folder):
    """The library, compiled into `folder`."""
    target = Path(folder) / 'libcuda.so.1'
    subprocess.run(
        [COMPILER, '-std=c++17', '-O1', '-fPIC', '-shared', str(SOURCE), '-o', str(target)], check=True)
    return target


class Driver:
    """Switches of the stand-in and what it has recorded."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def set(self, **switches):
        """is_capturing, launch_status, init_status, num_words, num_launches: integers."""
        for name, value in switches.items():
            ctypes.c_int.in_dll(self.library, name).value = value

    @property
    def launches(self):
        """All that was launched since num_launches was set to 0."""
        count = ctypes.c_int.in_dll(self.library, 'num_launches').value
        return list((Launch * 64).in_dll(self.library, 'launches'))[:count]


def words(launch, letters):
    """The arguments of a launch: q for a long long, d for a double."""
    return [struct.unpack(letter, struct.pack('Q', word))[0]
            for letter, word in zip(letters, launch.words, strict=False)]
