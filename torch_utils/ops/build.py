# SPDX-License-Identifier: Apache-2.0
"""Compile all kernels ahead of time into the cache that launches read: `python -m torch_utils.ops.build`.

Uses nvcc and ninja if installed and of the CUDA release that launches use, else NVRTC.
"""
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from dnnlib.cli import run_command
from dnnlib.progress import progress
from dnnlib.util import UserError
from torch_utils import custom_ops
from torch_utils.custom_ops import Kernel
from torch_utils.kernels import nvrtc, nvrtc_process
from torch_utils.kernels.cubin_cache import CubinCache
from torch_utils.ops.variants import all_variants

COMPILERS = ('auto', 'nvcc', 'nvrtc')
MAX_FAILURES_SHOWN = 5
NINJA_RULE = '''ninja_required_version = 1.3
rule cubin
  command = {nvcc} -cubin --std={std} $options -I {folder} -o $out $in
  description = $out
'''
Job = tuple[Kernel, str]  # what to compile, and for which architecture
Failure = tuple[Job, str]  # and the compiler's message


@dataclass(frozen=True)
class Toolkit:
    """nvcc, the ninja that runs it, and the CUDA release such as '13.0'."""

    nvcc: str
    ninja: str
    release: str


@dataclass(frozen=True)
class Plan:
    """What to build, from which sources and into which cache."""

    jobs: tuple[Job, ...]
    cache: CubinCache
    folder: Path = custom_ops.SOURCE_FOLDER

    def missing(self, release: str) -> list[Job]:
        """The jobs whose result is not in the cache yet."""
        return [job for job in self.jobs if self.cache.load(self.key(job, release)) is None]

    def key(self, job: Job, release: str) -> str:
        """Name of a result in the cache."""
        return custom_ops.key(*job, release, self.folder)


def parse_archs(text: str) -> list[str]:
    """'sm_80,sm_90' as a list without repetitions. Raises UserError."""
    archs = list(dict.fromkeys(part.strip() for part in text.split(',') if part.strip()))
    wrong = [arch for arch in archs if not re.fullmatch(r'sm_\d{2,3}[af]?', arch)]
    if wrong or not archs:
        raise UserError(f'--arch={text}: {wrong[0] if wrong else "nothing"} is not an architecture; '
                        f'give names such as sm_80,sm_90')
    return archs


def archs_here() -> list[str]:
    """The architectures of this machine's GPUs. Raises UserError if there are none."""
    if not torch.cuda.is_available():
        raise UserError('--arch is missing, and there is no GPU to take it from; give --arch=sm_80,sm_90')
    devices = [torch.device('cuda', i) for i in range(torch.cuda.device_count())]
    return list(dict.fromkeys(custom_ops.architecture_of(device) for device in devices))


@functools.cache
def find_toolkit() -> Toolkit | str:
    """nvcc (in CUDA_HOME or on the path) and ninja, or a line that says what is missing."""
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    nvcc = shutil.which('nvcc', path=os.path.join(home, 'bin')) if home else None
    nvcc = nvcc or shutil.which('nvcc')
    if nvcc is None:
        return 'there is no nvcc in CUDA_HOME or on the path'
    beside_python = os.path.dirname(sys.executable)  # where pip puts it, on the path or not
    ninja = shutil.which('ninja') or shutil.which('ninja', path=beside_python)
    if ninja is None:
        return 'there is no ninja; run: pip install ninja'
    output = subprocess.run([nvcc, '--version'], capture_output=True, text=True, check=False).stdout
    release = re.search(r'release (\d+\.\d+)', output)
    return Toolkit(nvcc, ninja, release[1]) if release else f'{nvcc} --version does not name its release'


def choose(compiler: str) -> tuple[Toolkit | None, str]:
    """(nvcc's toolkit, or None for NVRTC; one line about the choice). Raises UserError if there is neither.

    Launches search the cache for the release of their own NVRTC, so auto uses nvcc only if its release is the
    same.
    """
    toolkit, problem = find_toolkit(), nvrtc.problem()
    if compiler == 'nvcc' and isinstance(toolkit, str):
        raise UserError(f'--compiler=nvcc: {toolkit}')
    if compiler == 'nvrtc' and problem:
        raise UserError(f'--compiler=nvrtc: {problem}')
    if isinstance(toolkit, str):
        if problem:
            raise UserError(f'no compiler: {toolkit}; {problem}')
        return None, f'NVRTC of CUDA {nvrtc.release()}' + (f' ({toolkit})' if compiler == 'auto' else '')
    differs = not problem and nvrtc.release() != toolkit.release
    note = f'launches here look for what CUDA {nvrtc.release()} compiled' if differs else ''
    if compiler == 'nvrtc' or (compiler == 'auto' and differs):
        why = f' (nvcc is of CUDA {toolkit.release}; {note})' if differs and compiler == 'auto' else ''
        return None, f'NVRTC of CUDA {nvrtc.release()}{why}'
    return toolkit, f'nvcc of CUDA {toolkit.release} under ninja' + (f'; {note}' if note else '')


def build(plan: Plan, toolkit: Toolkit | None, jobs: int) -> tuple[int, list[Failure]]:
    """Compile missing kernels with `jobs` processes; returns (number of kernels built, failures)."""
    release = nvrtc.release() if toolkit is None else toolkit.release
    missing = plan.missing(release)
    if not missing:
        return 0, []
    failures = (
        _with_nvrtc(plan, missing, jobs) if toolkit is None else _with_nvcc(plan, missing, toolkit, jobs))
    return len(missing) - len(failures), failures


def write_ninja_file(folder: Path, plan: Plan, jobs: Sequence[Job], toolkit: Toolkit) -> None:
    """build.ninja in `folder`: job number i makes <i>.cubin."""
    lines = [NINJA_RULE.format(
        nvcc=_shell_path(toolkit.nvcc), std=nvrtc.CXX_STANDARD, folder=_shell_path(plan.folder))]
    for i, (kernel, arch) in enumerate(jobs):
        defines = ' '.join(f'-D{name}={value}' for name, value in kernel.defines)
        fast = ' --use_fast_math' if nvrtc.FAST_MATH else ''
        lines.append(f'build {i}.cubin: cubin {_ninja_path(plan.folder / kernel.source)}\n'
                     f'  options = -arch={arch} {defines}{fast}\n')
    (folder / 'build.ninja').write_text('\n'.join(lines), encoding='utf-8')


@click.command()
@click.option('--arch', metavar='SM,...', help='Such as sm_80,sm_90  [default: of the GPUs here]')
@click.option('--cache', metavar='DIR', type=click.Path(file_okay=False),
              help='Cache folder  [default: that of launches]')
@click.option('--jobs', metavar='N', type=click.IntRange(min=1), default=os.cpu_count() or 1,
              show_default='all cores', help='Compilations at a time')
@click.option('--compiler', type=click.Choice(COMPILERS), default='auto', show_default=True,
              help='auto: nvcc under ninja if its release is that of NVRTC, else NVRTC')
def command(arch: str | None, cache: str | None, jobs: int, compiler: str) -> None:
    """Compile all kernels ahead of time, so that runs do not have to."""
    archs = archs_here() if arch is None else parse_archs(arch)
    target = CubinCache(cache) if cache else custom_ops.default_cache()
    plan = Plan(tuple((kernel, name) for name in archs for kernel in all_variants()), target)
    toolkit, note = choose(compiler)
    click.echo(f'{len(plan.jobs)} kernels for {", ".join(archs)} into {target.folder}, by {note}')
    try:
        built, failures = build(plan, toolkit, jobs)
    except OSError as error:
        raise UserError(f'{target.folder}: {error.strerror}; set --cache to a writable folder') from error
    click.echo(f'{built} kernels built, {len(plan.jobs) - built - len(failures)} already existed.')
    for (kernel, name), why in failures[:MAX_FAILURES_SHOWN]:
        click.echo(f'{kernel} for {name}: {why}', err=True)
    if failures:
        raise UserError(f'{len(failures)} of {len(plan.jobs)} kernels failed to compile, see above')


def main() -> None:
    """Entry point."""
    run_command(command)


def _with_nvrtc(plan: Plan, jobs: Sequence[Job], processes: int) -> list[Failure]:
    keys, failures = [plan.key(job, nvrtc.release()) for job in jobs], []
    with progress(total=len(jobs), desc='Compiling', unit='kernel') as bar:
        def finished(i: int, result: bytes | nvrtc.CompileError) -> None:
            bar.update(1)
            if isinstance(result, bytes):
                plan.cache.store(keys[i], result)
            else:
                failures.append((jobs[i], str(result)))
        nvrtc_process.run_all([custom_ops.job_for(*job, plan.folder) for job in jobs], processes, finished)
    return failures


def _with_nvcc(plan: Plan, jobs: Sequence[Job], toolkit: Toolkit, processes: int) -> list[Failure]:
    with tempfile.TemporaryDirectory(prefix='kernels-') as name:
        folder = Path(name)
        # Of what is compiled now, even if a source is edited meanwhile.
        keys = [plan.key(job, toolkit.release) for job in jobs]
        write_ninja_file(folder, plan, jobs, toolkit)
        output = _run_ninja(toolkit, folder, processes, len(jobs))
        failures = []
        for i, job in enumerate(jobs):
            result = folder / f'{i}.cubin'
            if result.is_file():
                plan.cache.store(keys[i], result.read_bytes())
            else:
                failures.append((job, _nvcc_complaint(output, result.name)))
    return failures


def _run_ninja(toolkit: Toolkit, folder: Path, processes: int, total: int) -> str:
    """Run every job, also after a failure; returns all output."""
    # -k 0 continues after failures; status lines start with a marker that no compiler prints.
    command_line = [toolkit.ninja, '-C', str(folder), '-j', str(processes), '-k', '0']
    environment = {**os.environ, 'NINJA_STATUS': '@done ', 'TERM': 'dumb'}
    lines = []
    process = subprocess.Popen(
        command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    with process, progress(total=total, desc='Compiling', unit='kernel') as bar:
        for line in process.stdout:
            lines.append(line)
            bar.update(line.startswith('@done '))
    return ''.join(lines)


def _nvcc_complaint(output: str, target: str) -> str:
    """What ninja printed about one failed target."""
    section = output.partition(f'FAILED: {target}')[2] or output.partition(f'] {target}')[2]
    return nvrtc.complaint(section.partition('@done ')[0] or output)


def _shell_path(path: str | Path) -> str:
    """A path inside a command of build.ninja."""
    return shlex.quote(str(path)).replace('$', '$$')


def _ninja_path(path: str | Path) -> str:
    """A path as an input of a target."""
    return str(path).replace('$', '$$').replace(' ', '$ ').replace(':', '$:')


if __name__ == '__main__':
    main()
