# SPDX-License-Identifier: Apache-2.0
"""Snapshots of networks so small that tests can make them by the dozen."""
from pathlib import Path

import torch

from training import networks
from training.formats import pickled
from training.report.ticks import nimg_of_name

SYNTHESIS = {'channel_base': 64, 'channel_max': 8}


def small_generator(**changes):
    """A generator of 16x16 images with active noise and an average w; a function of the arguments."""
    torch.manual_seed(7)
    kwargs = {'z_dim': 8, 'c_dim': 0, 'w_dim': 8, 'img_resolution': 16, 'img_channels': 3,
              'mapping_kwargs': {'num_layers': 2}, 'synthesis_kwargs': SYNTHESIS, **changes}
    G = networks.Generator(**kwargs).eval()
    with torch.no_grad():
        for name, parameter in G.named_parameters():
            if name.endswith('noise_strength'):
                parameter.fill_(0.3)
        if 'w_avg' in dict(G.mapping.named_buffers()):
            G.mapping.w_avg.normal_()
    return G


def small_discriminator(**changes):
    """A discriminator of 16x16 images, always the same for the same arguments."""
    torch.manual_seed(8)
    kwargs = {'c_dim': 0, 'img_resolution': 16, 'img_channels': 3, **SYNTHESIS, **changes}
    return networks.Discriminator(**kwargs).eval()


def save_small_network(path, **changes):
    """Write a snapshot with a small generator alone."""
    return pickled.save_network_snapshot(path, G=None, D=None, G_ema=small_generator(**changes))


def without_end():
    """Values that are short to pickle, and could be printed or compared by nobody."""
    doubled, inside_itself = [], []
    for _ in range(60):
        doubled = [doubled, doubled]
    inside_itself.append(inside_itself)
    return [doubled, inside_itself]


def last_snapshot(run_dir):
    """The path of the network pickle that a run wrote last."""
    return str(max(Path(run_dir).glob('network-snapshot-*.pkl'),
                   key=lambda path: nimg_of_name(path.name, 'network-snapshot-')))
