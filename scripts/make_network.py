# SPDX-License-Identifier: Apache-2.0
"""Make the bundled network: python -m scripts.make_network network-snapshot-003000.pkl [emoji32.safetensors]

G_ema in float16 with the options of its run and its licence; D, too, if the file stays below 6 MB.
"""
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import UserError
from scripts.make_emoji32 import CLASS_NAMES
from training.formats import safetensors_file
from training.formats.load import NETWORK_FOLDER, load_network
from training.report.ticks import nimg_of_name
from training.run.folder import OPTIONS_FILE, read_json

DEST = NETWORK_FOLDER / 'emoji32.safetensors'
KEPT = ('G_ema', 'D')
MAX_BYTES = 5_950_000  # of tensors
LICENCE = ('Apache-2.0. Trained by stylegan2-ada-clean on training/datasets/emoji32.zip, which is made from '
           'Noto Emoji, Copyright Google LLC, Apache License 2.0.')
MACHINE = ('run_dir', 'device', 'keep')  # options of a run that say nothing about the network


def options_of_run(snapshot: Path) -> dict[str, Any]:
    """The options beside a snapshot, without paths of the machine. Raises UserError if there are none."""
    options = read_json(snapshot.parent / OPTIONS_FILE)
    if not options:
        raise UserError(f'{snapshot}: no {OPTIONS_FILE} beside it; give a snapshot in its run directory')
    options['training_set_kwargs'] = bundled_data(options['training_set_kwargs'])
    return {name: value for name, value in options.items() if name not in MACHINE}


def bundled_data(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of the dataset by its name instead of a path, with the names of its classes."""
    return {**kwargs, 'path': 'emoji32', 'class_names': list(CLASS_NAMES)}


def in_half(net: torch.nn.Module, name: str) -> torch.nn.Module:
    """The network in float16. Raises UserError if a number is beyond its range."""
    net.half()
    wrong = [key for key, tensor in net.state_dict().items() if not tensor.isfinite().all()]
    if wrong:
        raise UserError(f'{name}: {wrong[0]} does not fit float16')
    return net


def write_network(snapshot: Path, dest: Path) -> Path:
    """Write the networks of a snapshot to `dest`; returns it. Raises UserError."""
    options = options_of_run(snapshot)
    found = load_network(str(snapshot), only=KEPT)
    if found.G_ema is None:
        raise UserError(f'{snapshot}: contains no G_ema')
    networks = {name: in_half(found[name], str(snapshot)) for name in KEPT if found[name] is not None}
    tensors = [tensor for net in networks.values() for tensor in net.state_dict().values()]
    if sum(tensor.nbytes for tensor in tensors) > MAX_BYTES:
        networks.pop('D', None)
    contents = {**networks, 'training_set_kwargs': options['training_set_kwargs']}
    return safetensors_file.write(dest, contents, {
        'licence': LICENCE, 'kimg': str((nimg_of_name(snapshot.name, '') or 0) // 1000),
        'training_options': json.dumps(options)})


def main(args: list[str]) -> int:
    """Command line; returns the exit status."""
    if not 1 <= len(args) <= 2 or args[0].startswith('-'):
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    try:
        dest = write_network(Path(args[0]), Path(args[1]) if len(args) == 2 else DEST)
        found = load_network(str(dest))
    except UserError as error:
        print(f'Error: {error}', file=sys.stderr)
        return 2
    held = ', '.join(name for name in KEPT if found[name] is not None)
    print(f'{dest}: {held}, {dest.stat().st_size / 1e6:.1f} MB')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
