# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: the environment of a measurement, its JSON file, a table, a comparison of two
files.
"""
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def environment(device):
    """Device, versions, commit and date: without these a time means nothing."""
    device = torch.device(device)
    commit = subprocess.run(
        ['git', '-C', str(ROOT), 'describe', '--always', '--dirty'], capture_output=True, text=True,
        check=False)
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'commit': commit.stdout.strip() or 'unknown',
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        'threads': torch.get_num_threads(), 'python': platform.python_version(), 'torch': torch.__version__,
        'cuda': torch.version.cuda if device.type == 'cuda' else None,
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
    }


def cpu_name():
    """The model name of the processor."""
    info = Path('/proc/cpuinfo')
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor() or 'unknown CPU'


def synchronize(device):
    """Wait for the device, if it computes on its own."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def print_table(rows):
    """Rows (dicts with the same keys) as an aligned table."""
    if not rows:
        return
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f'{v:.4g}' if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_json(path, device, rows):
    """Write the measurement with its environment, if a path was given."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({'environment': environment(device), 'rows': rows}, indent=2) + '\n')


def compare(old_path, new_path, key, value):
    """Print old, new and their ratio for every row of two files that has the same key."""
    rows = [json.loads(Path(path).read_text())['rows'] for path in (old_path, new_path)]
    old, new = ({row[key]: float(row[value]) for row in measured} for measured in rows)
    both = [k for k in old if new.get(k)]
    print_table([{key: k, 'old': old[k], 'new': new[k], 'old / new': old[k] / new[k]} for k in both])
