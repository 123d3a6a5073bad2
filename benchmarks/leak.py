# SPDX-License-Identifier: Apache-2.0
"""Does memory grow while training? Real training that decodes images at each use, watched from outside.

python benchmarks/leak.py --json=leak.json          # 2,000 steps, a few minutes on two CPU cores
Exit status 1 if the resident size of the training process or of its readers grows.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import common
import numpy as np

from dnnlib.cli import run_command
from dnnlib.util import UserError

POLL_SEC = 1.0
WARM_UP = 0.25  # share of the steps in which memory may still grow: pools fill, code is loaded
MAX_GROWTH = 0.02  # per 2,000 steps; what is left is noise of the allocator
BATCH = 4


def resident_mib(pid):
    """Memory that a process holds, MiB; 0 once it has ended."""
    try:
        pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20


def children_mib(pid):
    """Memory that all processes started by a process hold, MiB; pages that they share count for each."""
    total = 0.0
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rpartition(')')[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid:
            child = int(stat.parent.name)
            total += resident_mib(child) + children_mib(child)
    return total


def watch(steps, workers, folder):
    """(fraction of the run, MiB of the process, MiB of its children) during `steps` training steps."""
    kimg = max(round(steps * BATCH / 1000), 1)
    command = [
        sys.executable, common.ROOT / 'train.py', f'--outdir={folder}', '--data=emoji32', '--cfg=demo',
        '--cbase=128', '--cmax=16', f'--batch={BATCH}', f'--kimg={kimg}', '--snap=100000', '--metrics=none',
        '--tick=0.1', '--cache=off', f'--workers={workers}', '--device=cpu']
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(POLL_SEC)
            done = sum(1 for stats in Path(folder).glob('*/stats.jsonl') for _ in stats.open())
            samples.append((done / (kimg * 10), resident_mib(process.pid), children_mib(process.pid)))
    if process.returncode != 0:
        raise UserError(f'train.py failed with status {process.returncode}; see its message above')
    return samples[:-2]  # the last ones are of a process that is ending


def growth(shares, sizes):
    """Relative growth over the whole run, from a straight line through what follows the warm-up."""
    slope, start = np.polyfit(shares, sizes, 1)
    return slope / max(start + slope * WARM_UP, 1.0)


@click.command(context_settings={'show_default': True})
@click.option('--steps', default=2000, help='Training steps.')
@click.option('--workers', default=2, help='Readers, as in train.py.')
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def main(steps, workers, json_path):
    """Print how the memory of a training develops."""
    with tempfile.TemporaryDirectory() as folder:
        samples = np.array(watch(steps, workers, folder))
    steady = samples[samples[:, 0] > WARM_UP]
    if len(steady) < 5:
        raise UserError(f'--steps={steps}: too few to tell; use at least 500')
    rows = []
    for name, sizes in [('training process', steady[:, 1]), ('its readers', steady[:, 2])]:
        rows.append({'what': name, 'steps': steps, 'samples': len(sizes), 'first_mib': float(sizes[0]),
                     'last_mib': float(sizes[-1]), 'max_mib': float(sizes.max()),
                     'growth_percent': 100 * float(growth(steady[:, 0], sizes))})
    common.write_json(json_path, 'cpu', rows)
    common.print_table(rows)
    if any(row['growth_percent'] > 100 * MAX_GROWTH * steps / 2000 for row in rows):
        sys.exit(1)


if __name__ == '__main__':
    run_command(main)
