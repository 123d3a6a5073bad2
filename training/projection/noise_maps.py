# SPDX-License-Identifier: Apache-2.0
"""The saved noise of a synthesis network, by name: read, or replaced for a while."""
import contextlib
from collections.abc import Iterator, Mapping

import torch

SUFFIX = 'noise_const'


def noise_maps(synthesis: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name of the buffer -> noise [H, W] as saved, such as 'b8.conv1.noise_const'; empty if there is none."""
    return {name: buffer for name, buffer in synthesis.named_buffers() if name.endswith(SUFFIX)}


@contextlib.contextmanager
def replaced_noise(synthesis: torch.nn.Module, maps: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let noise_mode='const' mean these maps, [H, W] for all pictures or [N, 1, H, W], inside the block.

    Maps may require gradients. Names that are left out keep their noise.
    """
    saved = {name: synthesis.get_buffer(name) for name in maps}
    try:
        _set(synthesis, maps)
        yield
    finally:
        _set(synthesis, saved)


def _set(synthesis: torch.nn.Module, maps: Mapping[str, torch.Tensor]) -> None:
    for name, value in maps.items():
        owner, _, buffer = name.rpartition('.')
        setattr(synthesis.get_submodule(owner), buffer, value)


def stack_maps(sets: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """N sets of maps [H, W] as one of [N, 1, H, W]."""
    return {name: torch.stack([maps[name] for maps in sets])[:, None] for name in sets[0]}


def noise_penalty(maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[N]: how much neighbours in noise maps [N, 1, H, W] resemble each other (StyleGAN2, Sec. 5).

    Squares of the mean products with the right and with the lower neighbour, summed over maps and over
    halvings of their sides until one is at most 8.
    """
    total: torch.Tensor | float = 0.0
    for value in maps.values():
        while True:
            for axis in (2, 3):
                # Rolling makes the map a torus, so that every value has a neighbour.
                total = total + (value * value.roll(1, dims=axis)).mean(dim=(1, 2, 3)).square()
            if min(value.shape[2:]) <= 8:
                break
            value = torch.nn.functional.avg_pool2d(value, 2)
    return torch.as_tensor(total)


@torch.no_grad()
def normalize_noise_(noise: torch.Tensor) -> None:
    """Give a map mean 0 and root mean square 1, in place."""
    noise -= noise.mean()
    noise *= noise.square().mean().rsqrt()
