# SPDX-License-Identifier: Apache-2.0
"""Where else a network can be used: which constructor arguments the published networks know.

Every snapshot opens with pickle.load in other programs of the StyleGAN2-ADA lineage. Editors among them build
a generator of their own from init_kwargs and copy tensors by name: theirs must have the same arguments.
"""
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from training.formats.rebuild import shown

Names = dict[str, 'Names | None']  # of arguments; of dictionaries, what may be in them
_LAYERS: Names = dict.fromkeys(
    ['num_layers', 'embed_features', 'layer_features', 'activation', 'lr_multiplier', 'w_avg_beta'])
_COMMON: Names = dict.fromkeys(['c_dim', 'img_resolution', 'img_channels'])
_CHANNELS: Names = dict.fromkeys(
    ['architecture', 'channel_base', 'channel_max', 'num_fp16_res', 'conv_clamp'])
_BLOCK: Names = dict.fromkeys(['activation', 'resample_filter', 'fp16_channels_last'])
ARGUMENTS: dict[str, Names] = {
    'Generator': {
        **_COMMON, 'z_dim': None, 'w_dim': None, 'mapping_kwargs': _LAYERS,
        'synthesis_kwargs': {**_CHANNELS, **_BLOCK, 'use_noise': None, 'kernel_size': None}},
    'Discriminator': {
        **_COMMON, **_CHANNELS, 'cmap_dim': None, 'mapping_kwargs': _LAYERS,
        'block_kwargs': {**_BLOCK, 'freeze_layers': None},
        'epilogue_kwargs': dict.fromkeys(['mbstd_group_size', 'mbstd_num_channels', 'activation'])},
}


def obstacles(net: torch.nn.Module, arguments: Mapping[str, Any]) -> list[str]:
    """What the published constructors do not accept in the arguments of a network; empty: they build it."""
    known = ARGUMENTS.get(type(net).__name__)
    if known is None:
        return [type(net).__name__]
    return list(_unknown(known, arguments))


def _unknown(known: Names, arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        inner = known.get(name)
        if name not in known:
            yield f'{name}={shown(value)}'
        elif inner is not None and isinstance(value, Mapping):
            yield from _unknown(inner, value)
        elif name == 'img_resolution' and not _is_power_of_two(value):
            yield f'{name}={shown(value)}'


def _is_power_of_two(value: Any) -> bool:
    return isinstance(value, int) and value >= 4 and value & (value - 1) == 0
