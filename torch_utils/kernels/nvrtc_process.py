# SPDX-License-Identifier: Apache-2.0
"""One compilation by NVRTC, here or in a separate process: `python -m torch_utils.kernels.nvrtc_process`.

NVRTC compiles one program at a time per process, whatever the number of threads. The process starts in a
third of a second because it does not import torch. It reads requests and writes answers until its input ends:
one line of JSON each, followed by the code if there is any.
"""
import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

COMMAND = (sys.executable, '-m', __name__)
ROOT = Path(__file__).resolve().parents[__name__.count('.')]
END_SEC = 10  # for a process to exit after the end of its input


class CompileError(RuntimeError):
    """A kernel cannot be compiled or loaded; the message is one line."""


@dataclass(frozen=True)
class Job:
    """CUDA C++ `text`, called `name` in messages, and the compiler's options.  is_ptx: compile to PTX."""

    text: str
    name: str
    options: tuple[str, ...]
    is_ptx: bool = False

    def run(self, report: Callable[[str], object] | None = None) -> bytes:
        """The machine code, or PTX. report(text): called with the compiler's log after success.

        Raises CompileError with the compiler's first error, and import errors of NVRTC.
        """
        api = _bindings()
        options = [option.encode() for option in self.options]
        program = _checked(api.nvrtcCreateProgram(self.text.encode(), self.name.encode(), 0, [], []))
        try:
            (status,) = api.nvrtcCompileProgram(program, len(options), options)
            log = _buffer(api.nvrtcGetProgramLogSize, api.nvrtcGetProgramLog, program)
            log = log.decode(errors='replace').rstrip('\0')
            if status != api.nvrtcResult.NVRTC_SUCCESS:
                raise CompileError(f'{complaint(log)} ({status.name})')
            if report is not None:
                report(log)
            if self.is_ptx:
                return _buffer(api.nvrtcGetPTXSize, api.nvrtcGetPTX, program)
            return _buffer(api.nvrtcGetCUBINSize, api.nvrtcGetCUBIN, program)
        finally:
            api.nvrtcDestroyProgram(program)


def run_all(
    jobs: Sequence[Job], num_processes: int,
    finished: Callable[[int, bytes | CompileError], object] = lambda i, result: None,
) -> list[bytes | CompileError]:
    """The result of each job, or its error. All processes have exited on return, also after an error.

    finished(i, result): called when job i is done, by one thread at a time; if it raises, all work stops.
    """
    results: list[bytes | CompileError] = [CompileError('not compiled')] * len(jobs)
    waiting, lock = iter(range(len(jobs))), threading.Lock()  # shared by all threads

    def serve() -> None:
        with _Compiler() as compiler:
            for i in waiting:
                results[i] = compiler.run(jobs[i])
                with lock:
                    finished(i, results[i])

    with ThreadPoolExecutor(max(num_processes, 1)) as pool:
        threads = [pool.submit(serve) for _ in range(min(num_processes, len(jobs)))]
        try:
            for thread in threads:
                thread.result()
        finally:
            for _ in waiting:  # after an error or an interrupt: start no further job
                pass
    return results


def complaint(log: str) -> str:
    """The first line with an error in a compiler's output."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r'\berror\b', line)]
    return (errors or lines or ['no output'])[0]


def main() -> None:
    """Serve requests from stdin until it ends."""
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            code, error = Job(**{**request, 'options': tuple(request['options'])}).run(), None
        except (ImportError, AttributeError, RuntimeError, OSError) as failure:
            code, error = b'', (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        sys.stdout.buffer.write(json.dumps({'size': len(code), 'error': error}).encode() + b'\n' + code)
        sys.stdout.buffer.flush()


class _Compiler:
    """A process that compiles one job after another; it exits at the end of this context."""

    def __enter__(self) -> '_Compiler':
        try:
            # In the folder of the package, so that it can be imported however this program was started.
            self._process = subprocess.Popen(
                COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError:
            self._process = None
        return self

    def run(self, job: Job) -> bytes | CompileError:
        """Compile a job in the process."""
        try:
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b'\n')
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            code = self._process.stdout.read(answer['size'])
        except (OSError, ValueError, AttributeError):
            return CompileError('the compiler process has exited')
        return code if answer['error'] is None else CompileError(answer['error'])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        try:
            self._process.communicate(timeout=END_SEC)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def _bindings() -> ModuleType:
    return importlib.import_module('cuda.bindings.nvrtc')


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call that returns (status, value)."""
    status, value = result
    if status.value:
        raise CompileError(f'NVRTC: {status.name}')
    return value


def _buffer(size_of: Callable[..., Any], read: Callable[..., Any], program: Any) -> bytes:
    """Data of a program, by the pair of functions that return its size and copy it."""
    data = bytes(_checked(size_of(program)))
    # The bindings write into the object itself.
    read(program, data)
    return data


if __name__ == '__main__':
    main()
