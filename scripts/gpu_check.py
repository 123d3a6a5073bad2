# SPDX-License-Identifier: Apache-2.0
"""Tests and benchmarks for a machine with a GPU: python scripts/gpu_check.py [--stage=first] [--out=FOLDER]

Needs no installation and no network: the Python it is started with must have torch and pytest. Every step
has a time limit and none stops the others. results.json is written anew after every step and holds all that
was measured so far, so that whatever ends the machine leaves that; logs.tar has the whole output of each
step. A short table comes last.
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
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SEC = 560  # of a stage: below ten minutes with what the machine itself needs to start and stop
TAIL_CHARS = 4000  # of a log in results.json
FAILURES = 'failures.jsonl'  # of the tests, a line each, written as they happen
RESULTS, LOGS = 'results.json', 'logs.tar'


@dataclass(frozen=True)
class Step:
    """One program: its command line after `python`, and the seconds that it may take.

    {out} in the command stands for the folder of results, {name} for the name. A benchmark writes
    {out}/{name}.json.
    """

    name: str
    limit_sec: int
    command: tuple[str, ...]


def benchmark(name: str, limit_sec: int, program: str, *options: str) -> Step:
    """A program of benchmarks/ on the GPU."""
    return Step(name, limit_sec, (
        f'benchmarks/{program}.py', '--device=cuda', '--json={out}/{name}.json', *options))


def train_step(name: str, limit_sec: int, cfg: str, side: int, variants: str, *options: str) -> Step:
    """The training step, with the kernels of the first variant."""
    return benchmark(name, limit_sec, 'train_step', f'--cfg={cfg}', f'--resolution={side}',
                     f'--variants={variants}', '--profile={out}/{name}-profile.json', *options)


# What comes first is known whatever happens later. The limits of a stage together stay below TOTAL_SEC.
STAGES = {
    # Ten minutes with a machine: does it work, and where does the time go?
    'first': (
        benchmark('ceilings', 40, 'ceilings'),
        Step('doctor', 40, ('-m', 'torch_utils.doctor')),
        train_step('train-auto-256', 90, 'auto', 256, 'graphs,graphs+ada,eager', '--cycles=3'),
        benchmark('ops', 60, 'ops', '--dtype=fp16'),
        Step('tests', 100, (
            '-m', 'pytest', '-m', 'gpu and not slow', '--continue-on-collection-errors',
            '-p', 'no:cacheprovider', '-n', '12', '--failures={out}/' + FAILURES)),
        train_step('train-auto-1024', 90, 'auto', 1024, 'graphs', '--cycles=1'),
        Step('profile-256', 60, ('profile_step.py', '--cfg=auto', '--resolution=256', '--rows=40',
                                 '--aug=noaug', '--json={out}/{name}.json')),
    ),
    # The rest, once the first stage is right.
    'second': (
        train_step('train-auto-256', 90, 'auto', 256, 'graphs,nchw+graphs,ieee+graphs', '--cycles=3'),
        train_step('train-auto-512', 60, 'auto', 512, 'graphs', '--cycles=2'),
        benchmark('ceilings', 40, 'ceilings'),
        benchmark('first-tick', 60, 'first_tick', '--cfg=auto', '--resolution=256'),
        benchmark('generate-auto-256', 30, 'generate', '--cfg=auto', '--resolution=256'),
        benchmark('generate-auto-1024', 30, 'generate', '--cfg=auto', '--resolution=1024', '--batch=1,8'),
        benchmark('snapshot', 25, 'snapshot', '--repeats=2'),
        Step('profile-256', 60, ('profile_step.py', '--cfg=auto', '--resolution=256', '--rows=40',
                                 '--aug=noaug', '--json={out}/{name}.json')),
        Step('slow-tests', 80, (
            '-m', 'pytest', '-m', 'gpu and slow', '-p', 'no:cacheprovider', '-n', '8',
            '--failures={out}/' + FAILURES)),
    ),
    # After a change of kernels: what it brought, and whether it is right.
    'third': (
        train_step('train-auto-256', 60, 'auto', 256, 'graphs', '--cycles=3'),
        train_step('train-auto-256-ada', 30, 'auto', 256, 'graphs+ada', '--cycles=2'),
        train_step('train-auto-1024', 45, 'auto', 1024, 'graphs', '--cycles=1'),
        benchmark('ops', 30, 'ops', '--dtype=fp16'),
        Step('kernel-tests', 60, (
            '-m', 'pytest', '-m', 'gpu and not slow', '-p', 'no:cacheprovider', '-n', '14',
            'tests/torch_utils', '--failures={out}/' + FAILURES)),
        benchmark('generate-auto-256', 25, 'generate', '--cfg=auto', '--resolution=256'),
        benchmark('first-tick', 60, 'first_tick', '--cfg=auto', '--resolution=256'),
    ),
}
# What makes a step one for a CPU and seconds.
REHEARSAL = (
    (r'--device=cuda', '--device=cpu'), (r'--resolution=\d+', '--resolution=16'),
    (r'--cfg=auto', '--cfg=demo'),
    (r'\+?(graphs|ada)(?=[,+]|$)', ''), (r'--cycles=\d+', '--cycles=1'),
    (r'--dtype=fp16', '--size=1x8x16x16'),
    (r'--batch=1,8', '--batch=1'), (r'^12$', '2'))
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


def rehearsed(step: Step) -> Step:
    """The step as it runs without a GPU: a rehearsal finds what would fail for other reasons."""
    command = step.command
    for pattern, text in REHEARSAL:
        command = tuple(re.sub(pattern, text, part) for part in command)
    return Step(step.name, step.limit_sec, command)


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
    """Run a step with its output in <name>.log; a row of the table, with what it measured."""
    command = [sys.executable, *(part.format(out=out, name=step.name) for part in step.command)]
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
            'summary': summary(step.name, out), **measured(step.name, out)}


def measured(name: str, out: Path) -> dict[str, object]:
    """The JSON files of a step by their names, the tests that failed, and the end of its log."""
    found: dict[str, object] = {}
    for path in sorted(out.glob(f'{name}*.json')):
        with contextlib.suppress(OSError, ValueError):  # cut short
            found[path.name] = json.loads(path.read_text(encoding='utf-8'))
    with contextlib.suppress(OSError):
        failures = (out / FAILURES).read_text(encoding='utf-8', errors='replace').splitlines()
        found.update({'failures': failures} if 'tests' in name else {})
    log = (out / f'{name}.log').read_text(encoding='utf-8', errors='replace')
    return {'measured': found, 'log_tail': log[-TAIL_CHARS:]}


def write_results(out: Path, versions: dict[str, object], steps: Sequence[Step], rows: list) -> None:
    """results.json and logs.tar, each replaced as a whole."""
    results = {'environment': versions, 'steps': rows, 'programs': [asdict(step) for step in steps]}
    temporary = out / (RESULTS + '.tmp')
    temporary.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    os.replace(temporary, out / RESULTS)
    temporary = out / (LOGS + '.tmp')
    with tarfile.open(temporary, 'w') as archive:
        for path in sorted(out.glob('*.log')):
            archive.add(path, arcname=path.name)
    os.replace(temporary, out / LOGS)


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


def run_all(
    steps: Sequence[Step], out: Path, versions: dict[str, object], total_sec: float = TOTAL_SEC,
) -> list[dict[str, object]]:
    """Run the steps in turn, each within its limit and all within total_sec; write results after each."""
    end, rows = time.monotonic() + total_sec, []
    for step in steps:
        print(f'{step.name}: at most {step.limit_sec} s ...', flush=True)
        rows.append(run_step(step, out, min(step.limit_sec, end - time.monotonic())))
        write_results(out, versions, steps, rows)
        row = rows[-1]
        print(f'{step.name}: {row["result"]}, {row["seconds"]} s: {row["summary"]}', flush=True)
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns 0 if all steps succeed, 1 if one fails, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description='Run the tests and benchmarks that need a GPU.')
    parser.add_argument('--stage', default='first', choices=STAGES, help='which steps')
    parser.add_argument('--out', default='gpu-check-out', type=Path, help='folder for the results')
    parser.add_argument('--only', default='', help='names of steps, joined by commas; default: all')
    parser.add_argument('--total', default=TOTAL_SEC, type=float, help='seconds for all steps together')
    parser.add_argument('--rehearse', action='store_true', help='run all steps on a CPU, with tiny networks')
    options = parser.parse_args(args)
    stage = [rehearsed(step) if options.rehearse else step for step in STAGES[options.stage]]
    names = options.only.split(',') if options.only else [step.name for step in stage]
    unknown = set(names) - {step.name for step in stage}
    if unknown:
        parser.error(f'--only={options.only}: steps are {", ".join(step.name for step in stage)}')
    versions = environment()
    if versions['gpu'] is None and not options.rehearse:
        print(f'Error: {sys.executable} sees no CUDA device (torch {versions["torch"]}); nothing to check. '
              'Choose another Python with make gpu-check PYTHON=...', file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = run_all([step for step in stage if step.name in names], out, versions, options.total)
    print(f'\n{versions["gpu"]}, torch {versions["torch"]}, CUDA {versions.get("cuda")}, '
          f'driver {versions["driver"]}, commit {versions["commit"]}; full results in {out}')
    print_table(rows)
    return 0 if all(row['result'] == 'ok' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
