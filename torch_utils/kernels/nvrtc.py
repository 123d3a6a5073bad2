# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's run-time compiler through cuda-bindings: what is installed, what it can do, source to cubin.

Needs no GPU and no CUDA toolkit. The packages are optional and slow to import, so that happens at first use.
"""
import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from dnnlib.util import UserError, first_line
from torch_utils.kernels.nvrtc_process import CompileError, Job, complaint

__all__ = ['CompileError', 'Job', 'complaint']

INSTALL_ALL = "pip install 'cuda-bindings=={0}.*' {1}"
RUNTIME_PACKAGES = {
    '12': 'nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12', '13': 'nvidia-cuda-nvrtc nvidia-cuda-runtime'}
NEWEST_MAJOR = '13'
FAST_MATH = False  # its error is above what the operators' tests allow in float32
CXX_STANDARD = 'c++17'
HALF_HEADER = 'cuda_fp16.h'
# What a missing or half-installed package, or a library that it cannot load, may raise.
IMPORT_ERRORS = (ImportError, AttributeError, RuntimeError, OSError)


def cuda_major() -> str:
    """Major CUDA version that the packages must have: that of torch, else of the bindings."""
    if torch.version.cuda:
        return torch.version.cuda.partition('.')[0]
    return (bindings_version() or NEWEST_MAJOR).partition('.')[0]


def install_command() -> str:
    """The one command that installs everything for the torch that is here."""
    major = cuda_major()
    return INSTALL_ALL.format(major, RUNTIME_PACKAGES.get(major, RUNTIME_PACKAGES[NEWEST_MAJOR]))


def bindings_version() -> str | None:
    """Version of cuda-bindings, None without it."""
    return _version('cuda.bindings')


@functools.cache
def problem() -> str | None:
    """Why kernels cannot be compiled here, with the remedy, in one line; None if they can."""
    bindings = bindings_version()
    if bindings is None:
        return f'cuda-bindings is missing; run: {install_command()}'
    if not bindings.startswith(cuda_major() + '.'):
        return (f'cuda-bindings is {bindings}, but torch {torch.__version__} is built for CUDA '
                f'{torch.version.cuda}; run: {install_command()}')
    try:
        release()
    except IMPORT_ERRORS as error:
        return f'the compiler NVRTC cannot be loaded ({first_line(error)}); run: {install_command()}'
    if include_folder() is None:
        return f'{HALF_HEADER} is in no package of this Python and in no CUDA_HOME; run: {install_command()}'
    return None


@functools.cache
def release() -> str:
    """CUDA release of NVRTC such as '13.0'. Raises one of IMPORT_ERRORS without it."""
    _, major, minor = _bindings().nvrtcVersion()
    return f'{major}.{minor}'


@functools.cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities that NVRTC compiles for, such as (75, 80, 90), ascending."""
    _, numbers = _bindings().nvrtcGetSupportedArchs()
    return tuple(sorted(numbers))


def architecture_for(capability: tuple[int, int]) -> str:
    """What to compile for a device: 'sm_90' (machine code), or for a device newer than the compiler
    'compute_120' (PTX that the driver finishes). Raises CompileError for one older.
    """
    number, known = capability[0] * 10 + capability[1], architectures()
    if number in known:
        return f'sm_{number}'
    older = [n for n in known if n < number]
    if not older:
        raise CompileError(
            f'CUDA {release()} no longer compiles for devices of capability {capability[0]}.{capability[1]}; '
            f'use a torch built for an older CUDA')
    return f'compute_{older[-1]}'


@functools.cache
def include_folder() -> str | None:
    """Folder of cuda_fp16.h: in pip's packages, which torch's wheels bring, or CUDA_HOME; None if nowhere."""
    spec = importlib.util.find_spec('nvidia')
    packages = [Path(p) for p in spec.submodule_search_locations or []] if spec else []
    folders = [root / name for root in packages for name in (f'cu{cuda_major()}', 'cuda_runtime')]
    homes = [os.environ.get(name) for name in ('CUDA_HOME', 'CUDA_PATH', 'CONDA_PREFIX')]
    folders += [Path(home) for home in homes if home] + [Path('/usr/local/cuda')]
    found = [folder / 'include' for folder in folders if (folder / 'include' / HALF_HEADER).is_file()]
    return str(found[0]) if found else None


def job_for(
    text: str, name: str, defines: tuple[tuple[str, str], ...], arch: str, folders: tuple[str, ...],
) -> Job:
    """How CUDA C++ `text` is compiled for arch 'sm_XX', or to PTX for 'compute_XX'.

    folders: of the headers it includes.  Raises UserError if the compiler is not there.
    """
    if problem():
        raise UserError(f'Kernels cannot be compiled: {problem()}')
    options = [f'--gpu-architecture={arch}', f'--std={CXX_STANDARD}', *(f'-D{n}={v}' for n, v in defines),
               *(f'--include-path={os.path.abspath(folder)}' for folder in (*folders, include_folder()))]
    if FAST_MATH:
        options.append('--use_fast_math')
    return Job(text, name, tuple(options), is_ptx=arch.startswith('compute_'))


def compile_source(
    text: str, name: str, defines: tuple[tuple[str, str], ...], arch: str, folders: tuple[str, ...],
    report: Callable[[str], object] | None = None,
) -> bytes:
    """Machine code or PTX; the arguments are those of job_for.

    report(text): called with registers, memory and spills of every kernel in it. Raises CompileError with the
    compiler's first complaint, UserError if the compiler is not there.
    """
    job = job_for(text, name, defines, arch, folders)
    if report is not None:
        job = dataclasses.replace(job, options=(*job.options, '--ptxas-options=-v'))
    return job.run(report)


def _bindings() -> ModuleType:
    return importlib.import_module('cuda.bindings.nvrtc')


def _version(module: str) -> str | None:
    try:
        return getattr(importlib.import_module(module), '__version__', None)
    except IMPORT_ERRORS:
        return None
