# SPDX-License-Identifier: Apache-2.0
"""Stripes: horizontal over vertical gradient energy of real images and of the fakes of every snapshot.

python benchmarks/anisotropy.py runs/00000-smileys-mirror-demo
"""
from pathlib import Path

import click
import common
import numpy as np
import torch

from dnnlib.cli import run_command
from dnnlib.util import UserError
from training.dataset import ImageFolderDataset
from training.formats.load import load_network
from training.report.ticks import nimg_of_name
from training.run.folder import OPTIONS_FILE, read_json

BATCH = 32


def anisotropy(images):
    """Mean square of horizontal over that of vertical differences of neighbours; images: [N, C, H, W].

    Vertical stripes give more than 1, horizontal ones less.
    """
    images = images.double()
    across, down = images.diff(dim=3).square().mean(), images.diff(dim=2).square().mean()
    return float(across / down)


def reals(dataset, count):
    """(images [N, C, H, W] in [-1, 1], their labels) of a random part of a dataset."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    images, labels = zip(*[dataset[int(i)] for i in order], strict=True)
    return torch.from_numpy(np.stack(images)) / 127.5 - 1, torch.from_numpy(np.stack(labels))


@torch.inference_mode()
def fakes(G, labels):
    """One image per label, always of the same latents."""
    z = torch.randn([len(labels), G.z_dim], generator=torch.Generator().manual_seed(0))
    batches = zip(z.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([G(z, c, noise_mode='const', force_fp32=True) for z, c in batches]).clamp(-1, 1)


@click.command(context_settings={'show_default': True})
@click.argument('runs', nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option('--images', default=400, help='Images per snapshot.')
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def main(runs, images, json_path):
    """Print the ratio for the training images and the snapshots of run directories."""
    rows = []
    for run in runs:
        data = read_json(run / OPTIONS_FILE).get('training_set_kwargs')
        snapshots = sorted(run.glob('network-snapshot-*.pkl'))
        if data is None or not snapshots:
            raise UserError(f'{run}: no run directory with {OPTIONS_FILE} and network-snapshot-*.pkl')
        dataset = ImageFolderDataset(**{key: data[key] for key in ('path', 'use_labels', 'xflip')})
        real, labels = reals(dataset, images)
        rows.append({'run': run.name, 'kimg': 'real images', 'anisotropy': anisotropy(real)})
        for path in snapshots:
            G = load_network(str(path), only=['G_ema']).G_ema
            kimg = nimg_of_name(path.name, 'network-snapshot-') / 1000
            rows.append({'run': run.name, 'kimg': kimg, 'anisotropy': anisotropy(fakes(G, labels))})
    common.write_json(json_path, 'cpu', rows)
    common.print_table(rows)


if __name__ == '__main__':
    run_command(main)
