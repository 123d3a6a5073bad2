# SPDX-License-Identifier: Apache-2.0
"""Write what the container image installs: wanted.txt, the requirements of pyproject.toml, and pinned.txt,
their versions from requirements.lock. Needs only Python 3.11.
"""
import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomllib

# A build of PyTorch depends on exact versions of these.
OF_TORCH = re.compile(r'(torch|cuda|nvidia)\b', re.IGNORECASE)


def wanted(project: dict[str, Any], extras: Sequence[str], torch: str = '') -> list[str]:
    """Requirements of a [project] table with some of its extras.

    torch: its version, '' for any. Raises KeyError for an unknown extra.
    """
    optional = project['optional-dependencies']
    lines = [*project['dependencies'], *(line for extra in extras for line in optional[extra])]
    return [f'torch=={torch}' if torch and re.match(r'torch\b', line) else line for line in lines]


def pinned(lock: str, torch: str = '') -> list[str]:
    """The pins of a lock file, without PyTorch and its CUDA packages if `torch` names another version."""
    lines = [line for line in lock.splitlines() if line and not line.startswith('#')]
    return [line for line in lines if not (torch and OF_TORCH.match(line))]


def main(args: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--extras', default='', help='Extras of pyproject.toml, separated by commas.')
    parser.add_argument('--torch', default='', help='Version instead of the locked one, e.g. 2.13.0+cu126.')
    parser.add_argument('--out', type=Path, required=True, help='Output folder.')
    options = parser.parse_args(args)
    project = tomllib.loads(Path('pyproject.toml').read_text(encoding='utf-8'))['project']
    extras = [extra for extra in options.extras.split(',') if extra]
    if missing := set(extras) - set(project['optional-dependencies']):
        parser.error(f'--extras: {", ".join(sorted(missing))} not in pyproject.toml')
    lock = Path('requirements.lock').read_text(encoding='utf-8')
    files = {'wanted.txt': wanted(project, extras, options.torch), 'pinned.txt': pinned(lock, options.torch)}
    for name, lines in files.items():
        (options.out / name).write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
