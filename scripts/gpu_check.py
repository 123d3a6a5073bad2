# SPDX-License-Identifier: Apache-2.0
"""Tests and benchmarks for a machine with a GPU: python scripts/gpu_check.py [--out=gpu-check-out]

Needs no installation and no network: the Python it is started with must have torch and pytest. Every step has
a time limit and none stops the others. Full results go to the folder, a short table to the end of the output.
"""
import argparse
import collections
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SEC = 560  # below ten minutes with what the machine itself needs to start and stop


@dataclass(frozen=True)
class Step:
    """One program: its command line after `python`, and the seconds that it may take.

    {out} in the command stands for the folder of results. A benchmark writes {out}/<name>.json.
    """

    name: str
    limit_sec: int
    command: tuple[str, ...]


def benchmark(name: str, limit_sec: int, program: str, *options: str) -> Step:
    """A program of benchmarks/ on the GPU."""
    return Step(name, limit_sec, (
        f'benchmarks/{program}.py', '--device=cuda', f'--json={{out}}/{name}.json', *options))


# New checks are added here. The limits together stay below TOTAL_SEC.
STEPS = (
    Step('doctor', 30, ('-m', 'torch_utils.doctor')),
    Step('tests', 160, (
        '-m', 'pytest', '-m', 'gpu', '--continue-on-collection-errors', '--durations=20', '-rfE',
        '-p', 'no:cacheprovider', '--junitxml={out}/tests.xml')),
    benchmark('ops', 70, 'ops'),
    benchmark('first-tick', 45, 'first_tick', '--cfg=auto', '--resolution=256'),
    benchmark('train-demo-32', 25, 'train_step', '--cfg=demo', '--resolution=32', '--graphs', '--cycles=2'),
    benchmark('train-auto-256', 60, 'train_step', '--cfg=auto', '--resolution=256', '--precision=fp16',
              '--graphs', '--cycles=2'),
    benchmark('train-auto-256-torch', 30, 'train_step', '--cfg=auto', '--resolution=256', '--precision=fp16',
              '--ops=torch', '--cycles=1'),
    benchmark('train-auto-1024', 65, 'train_step', '--cfg=auto', '--resolution=1024', '--cycles=1'),
    benchmark('generate-auto-256', 25, 'generate', '--cfg=auto', '--resolution=256'),
    benchmark('generate-auto-1024', 25, 'generate', '--cfg=auto', '--resolution=1024', '--batch=1,8'),
    benchmark('snapshot', 20, 'snapshot', '--repeats=2'),
)
COLUMNS = ('step', 'result', 'seconds', 'summary')
TESTS_SUMMARY = re.compile(r'\d+ (?:passed|failed|errors?|skipped|deselected).* in [\d.]+s')
# A row of the doctor's table: operator, error, time, what it runs by; and what is wrong.
DOCTOR_ROW = re.compile(r'^\w+ +\S+ +\d+\.\d  (\S.*)$', re.MULTILINE)
DOCTOR_PROBLEM = re.compile(r'^Problem: (.+)$', re.MULTILINE)
MAX_SUMMARY = 200  # characters of a line that is quoted
PROBE = """
import json, sys, torch
ok = torch.cuda.is_available()
print(json.dumps({'python': sys.version.split()[0], 'torch': torch.__version__, 'cuda': torch.version.cuda,
                  'cudnn': torch.backends.cudnn.version(), 'gpus': torch.cuda.device_count() if ok else 0,
                  'gpu': torch.cuda.get_device_name(0) if ok else None}))
"""


def output_of(command: Sequence[str]) -> str:
    """What a program prints, stripped; '' if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ''
    return done.stdout.strip()


def environment() -> dict[str, object]:
    """Versions of Python, torch, CUDA and driver, the GPU, and the commit; 'gpu' is None without one."""
    found = output_of([sys.executable, '-c', PROBE])
    versions = json.loads(found.splitlines()[-1]) if found else {'gpu': None, 'torch': None}
    driver = output_of(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'])
    return {**versions, 'driver': driver, 'commit': output_of(['git', 'describe', '--always', '--dirty']),
            'started': time.strftime('%Y-%m-%d %H:%M:%S')}


def run_step(step: Step, out: Path, limit_sec: float) -> dict[str, object]:
    """Run a step with its output in <name>.log; a row of the table."""
    command = [sys.executable, *(part.format(out=out) for part in step.command)]
    start = time.monotonic()
    with open(out / f'{step.name}.log', 'wb') as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=max(limit_sec, 0))
            result = 'ok' if status == 0 else f'failed ({status})'
        except subprocess.TimeoutExpired:
            result = 'out of time'
        finally:
            _end(process)
    return {'step': step.name, 'result': result, 'seconds': round(time.monotonic() - start, 1),
            'summary': summary(step.name, out)}


def _end(process: subprocess.Popen) -> None:
    """End a step with all that it started; nothing if it has ended by itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summary(name: str, out: Path) -> str:
    """The numbers of a benchmark, the counts of a test run, what the operators run by in the doctor's output,
    or else the last line.
    """
    try:
        return _numbers(json.loads((out / f'{name}.json').read_text(encoding='utf-8'))['rows'])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # no benchmark, or one that was cut short
    log = (out / f'{name}.log').read_text(encoding='utf-8', errors='replace')
    implementations = DOCTOR_ROW.findall(log)
    if implementations:
        return _doctor(implementations, DOCTOR_PROBLEM.findall(log))
    lines = log.split('\n')
    for line in reversed(lines):
        if TESTS_SUMMARY.search(line):
            return line.strip('= ')
    return next((line.strip()[:MAX_SUMMARY] for line in reversed(lines) if line.strip()), '')


def _doctor(implementations: list[str], problems: list[str]) -> str:
    """How many operators run by what, and the first thing that is wrong."""
    counts = collections.Counter(implementations).most_common()
    text = ', '.join(f'{count} operators by {name}' for name, count in counts)
    return text + (f'; {problems[0][:MAX_SUMMARY]}' if problems else '')


def _numbers(rows: list[dict[str, object]]) -> str:
    """What matters in the rows of a benchmark."""
    if 'stall_sec' in rows[0]:
        stall, write = (statistics.median(row[key] for row in rows[1:]) for key in ('stall_sec', 'write_sec'))
        return f'stands still for {stall:.3f} s of {write:.2f} s, {rows[0]["MiB"]:.0f} MiB'
    if 'first_tick_sec' in rows[0]:
        times = [f'{row["first_tick_sec"]:.1f} s with the cache {row["cache"]}' for row in rows]
        return f'first tick after {", ".join(times)}'
    if 'case' in rows[0]:
        return _operators(rows)
    return '; '.join(_speed(row) for row in rows)


def _operators(rows: list[dict[str, object]]) -> str:
    """Medians over the cases that have a kernel, and the slowest of them."""
    timed = [row for row in rows if 'copy_percent' in row]
    kernels = [row for row in timed if row['by'] == 'kernel']
    if not kernels:
        return f'none of {len(timed)} cases by kernels'
    compiled = [row['us'] / 1e6 for row in rows if 'copy_percent' not in row]
    slowest = min(kernels, key=lambda row: row['copy_percent'])
    share, speedup = (statistics.median(row[key] for row in kernels) for key in ('copy_percent', 'speedup'))
    text = (f'{len(kernels)} of {len(timed)} cases by kernels: {share:.0f} % of the speed of a copy (least: '
            f'{slowest["copy_percent"]:.0f} %, {slowest["case"]}), {speedup:.1f} x the references')
    return text + (f'; {len(compiled)} compiled in {sum(compiled):.2f} s' if compiled else '')


def _speed(row: dict[str, object]) -> str:
    text = f'{row.get("variant", "")}: {row["img_per_sec"]:.1f} img/s'
    text += f', {row["sec_per_kimg"]:.2f} s/kimg' if 'sec_per_kimg' in row else ''
    return text + (f', captured in {row["capture_sec"]:.1f} s' if row.get('capture_sec') else '')


def print_table(rows: list[dict[str, object]]) -> None:
    """Rows with the keys COLUMNS, aligned."""
    cells = [list(COLUMNS), *([str(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for line in cells:
        print('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def run_all(steps: Sequence[Step], out: Path, total_sec: float = TOTAL_SEC) -> list[dict[str, object]]:
    """Run the steps one after the other, each within its limit and all within total_sec."""
    end, rows = time.monotonic() + total_sec, []
    for step in steps:
        print(f'{step.name}: at most {step.limit_sec} s ...', flush=True)
        rows.append(run_step(step, out, min(step.limit_sec, end - time.monotonic())))
        print(f'{step.name}: {rows[-1]["result"]}, {rows[-1]["seconds"]} s', flush=True)
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns 0 if all steps succeed, 1 if one fails, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description='Run the tests and benchmarks that need a GPU.')
    parser.add_argument('--out', default='gpu-check-out', type=Path, help='folder for the results')
    parser.add_argument('--only', default='', help='names of steps, joined by commas; default: all')
    options = parser.parse_args(args)
    names = options.only.split(',') if options.only else [step.name for step in STEPS]
    unknown = set(names) - {step.name for step in STEPS}
    if unknown:
        parser.error(f'--only={options.only}: steps are {", ".join(step.name for step in STEPS)}')
    versions = environment()
    if versions['gpu'] is None:
        print(f'Error: {sys.executable} sees no CUDA device (torch {versions["torch"]}); nothing to check. '
              'Choose another Python with make gpu-check PYTHON=...', file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = run_all([step for step in STEPS if step.name in names], out)
    results = {'environment': versions, 'steps': rows, 'programs': [asdict(step) for step in STEPS]}
    (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    print(f'\n{versions["gpu"]}, torch {versions["torch"]}, CUDA {versions["cuda"]}, '
          f'driver {versions["driver"]}, commit {versions["commit"]}; full results in {out}')
    print_table(rows)
    return 0 if all(row['result'] == 'ok' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
