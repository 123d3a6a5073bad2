# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its number, and the files that say what the run is."""
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dnnlib.util import UserError, replace_file
from training.config import TrainConfig

RUN_NUMBER = re.compile(r'\d+')
CLAIM_ATTEMPTS = 1000
OPTIONS_FILE, FLAGS_FILE = 'training_options.json', 'training_flags.json'
# What is there before the first picture.
FIRST_FILES = {OPTIONS_FILE, FLAGS_FILE, '.lock', 'log.txt', 'stats.jsonl'}


def existing_numbers(outdir: Path) -> Iterator[int]:
    """The numbers that the sub-folders of `outdir` begin with."""
    if outdir.is_dir():
        for path in outdir.iterdir():
            match = RUN_NUMBER.match(path.name)
            if match and path.is_dir():
                yield int(match[0])


def next_run_number(outdir: Path) -> int:
    """One above the highest number in use, 0 in a new folder."""
    return max(existing_numbers(outdir), default=-1) + 1


def discard_unstarted(run_dir: str | os.PathLike) -> None:
    """Remove the folder of a run that was refused before it made anything; one that holds more stays."""
    folder = Path(run_dir)
    # Where files are locked or gone, a left-over folder harms nobody.
    with contextlib.suppress(OSError):
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        if files.keys() <= FIRST_FILES and not files.get('stats.jsonl'):
            shutil.rmtree(folder)


def claim_run_dir(outdir: Path, description: str) -> Path:
    """Create the folder <number>-<description> with a number that no other run has, even one started right
    now.

    Raises UserError if that cannot be done.
    """
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        for _ in range(CLAIM_ATTEMPTS):
            # The bare number is the claim: creating a folder either succeeds for one process or fails.
            number = next_run_number(outdir)
            claim = outdir / f'{number:05d}'
            try:
                claim.mkdir()
            except FileExistsError:
                continue
            # Between our look and our claim another run may have finished claiming this number.
            if list(existing_numbers(outdir)).count(number) == 1:
                return claim.rename(outdir / f'{number:05d}-{description}')
            claim.rmdir()
    except OSError as error:
        raise UserError(f'--outdir={outdir}: cannot create a run folder ({error.strerror}); choose a folder '
                        'that you can write to') from error
    raise UserError(f'--outdir={outdir}: too many runs start at once; try again')


def save_options(config: TrainConfig, flags: Mapping[str, Any]) -> None:
    """Write training_options.json and, for --resume, the flags into the run folder, whole or not at all."""
    given = {name: value for name, value in flags.items() if value is not None and name != 'allow_changes'}
    for name, data in ((OPTIONS_FILE, config.to_options()), (FLAGS_FILE, given)):
        with replace_file(Path(config.run_dir, name)) as partial:
            partial.write_text(json.dumps(data, indent=2) + '\n', encoding='utf-8')


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file of a run; empty if there is no such file."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f'--resume: {path} cannot be read; move it away and give all options as for a '
                        'new run') from error
