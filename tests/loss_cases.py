# SPDX-License-Identifier: Apache-2.0
"""Networks and batches that the tests of losses and of phases share."""
import torch
from golden_cases import arrays, index

from training import networks
from training.loss import MicroBatch, StyleGAN2Loss


def tensor(group, key):
    return torch.from_numpy(arrays(f'{group}.npz')[key].copy()).float()


def build_networks(group, name):
    """G and D of a recorded pair; only the fixed filters are not part of the record."""
    pair = []
    for which, cls in [('G', networks.Generator), ('D', networks.Discriminator)]:
        module = cls(**index(group)['nets'][name][f'{which}_kwargs'])
        prefix = f'{name}/{which}/'
        state = {k[len(prefix):]: tensor(group, k) for k in arrays(f'{group}.npz') if k.startswith(prefix)}
        missing, unexpected = module.load_state_dict(state, strict=False)
        assert not unexpected and all(k.endswith('resample_filter') for k in missing)
        pair.append(module.train().requires_grad_(False))
    return pair


def tiny_pair(**kwargs):
    common = {'c_dim': 0, 'img_resolution': 8, 'img_channels': 3}
    G = networks.Generator(
        z_dim=4, w_dim=4, synthesis_kwargs={'channel_base': 32, 'channel_max': 4}, **common)
    D = networks.Discriminator(channel_base=32, channel_max=4, **common)
    return StyleGAN2Loss(G.train(), D.train(), report=lambda name, value: None, **kwargs)


def tiny_batch(n):
    return MicroBatch(torch.randn(n, 3, 8, 8), torch.zeros(n, 0), torch.randn(n, 4), torch.zeros(n, 0))
