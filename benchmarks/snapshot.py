# SPDX-License-Identifier: Apache-2.0
"""What a snapshot costs: how long training stands still, against how long the files take to write.

python benchmarks/snapshot.py --json=snapshot.json      # the default networks for 256x256 images
The goal is a stall below 10 % of the time of writing; the exit status is 1 if it is missed.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import common
import torch

from dnnlib.cli import run_command
from torch_utils.misc import pick_device
from torch_utils.training_stats import Store
from training.config import DatasetInfo, resolve
from training.formats.pickled import HostCopies, copy_networks
from training.run.manifest import read_manifest
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload
from training.state import build_state

GOAL = 0.1


def build(resolution, cfg, device):
    """(state, options) of a run after an optimizer step: Adam has its moments, half of what is written."""
    info = DatasetInfo('images', 1000, resolution, resolution, 3, has_labels=False, label_dim=0)
    config = resolve({'cfg': cfg, 'data': 'images', 'outdir': '.'}, info).for_device(device.type)
    state = build_state(config, 0, 3, device, Store())
    for opt in (state.G_opt, state.D_opt):
        for group in opt.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.zeros_like(parameter)
        opt.step()
        opt.zero_grad()
    return state, config.to_options()


def start_snapshot(writer, copies, state, options, number):
    """What the loop does at a snapshot; training stands still meanwhile."""
    copies.begin()
    networks = {'G': state.G, 'D': state.D, 'G_ema': state.G_ema, 'augment_pipe': state.augment_pipe}
    held = copy_networks(copies, networks)
    payload = copies.tree(make_payload(options, **state.state_dict()))
    writer.save(Snapshot(1000 * number, payload, copies, held, f'network-snapshot-{number:06d}.pkl'))


def measure(writer, copies, state, options, number):
    """A row: seconds of stall and of writing, bytes written."""
    device = state.loss.pl_mean.device
    common.synchronize(device)
    start_sec = time.perf_counter()
    start_snapshot(writer, copies, state, options, number)
    common.synchronize(device)
    stall_sec = time.perf_counter() - start_sec
    writer.wait()
    total_sec = time.perf_counter() - start_sec
    problems = writer.take_problems()
    assert not problems, problems
    size = sum(file.size for file in read_manifest(writer.run_dir)[-1].files.values())
    return {'snapshot': number, 'stall_sec': stall_sec, 'write_sec': total_sec - stall_sec,
            'stall / write': stall_sec / (total_sec - stall_sec), 'MiB': size / 2 ** 20}


@click.command(context_settings={'show_default': True})
@click.option('--resolution', type=click.IntRange(min=8), default=256, help='Side of the images.')
@click.option('--cfg', default='auto', help='Preset of the networks.')
@click.option('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto', help='Where they are.')
@click.option('--repeats', type=click.IntRange(min=1), default=5, help='Snapshots after the first.')
@click.option('--folder', type=click.Path(file_okay=False), help='Where to write; else a temporary folder.')
@click.option('--json', 'json_path', type=click.Path(dir_okay=False), help='Write the measurement here.')
def command(resolution, cfg, device, repeats, folder, json_path):
    """Measure how long training stands still for a snapshot."""
    device = pick_device(device)
    state, options = build(resolution, cfg, device)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        # The first one also pays for memory that later ones find again.
        writer, copies = SnapshotWriter(Path(place), keep=1), HostCopies()
        rows = [measure(writer, copies, state, options, number) for number in range(1, repeats + 2)]
    common.print_table(rows)
    common.write_json(json_path, device, rows)
    share = statistics.median(row['stall / write'] for row in rows[1:])
    print(f'Training stands still for {share:.1%} of the time that writing takes (goal: below {GOAL:.0%}).')
    sys.exit(share >= GOAL)


if __name__ == '__main__':
    run_command(command)
