# SPDX-License-Identifier: Apache-2.0
"""What the names of TrainConfig.system stand for: networks, losses, and the phases of a step."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from training import networks
from training.config import TrainConfig
from training.loss import StyleGAN2Loss
from training.phases import Phase, PhaseSource, build_phases
from training.systems import dcgan, stylegan1
from training.systems.dcgan_loss import DCGANLoss, dcgan_phases

Report = Callable[[str, torch.Tensor], object]


@dataclass(frozen=True)
class System:
    """build_phases(loss, G's source, D's source): the phases of an iteration, in order."""

    generator: Callable[..., torch.nn.Module]
    discriminator: Callable[..., torch.nn.Module]
    loss: Callable[..., Any]
    build_phases: Callable[[Any, PhaseSource, PhaseSource], list[Phase]]


SYSTEMS = {
    'stylegan2': System(networks.Generator, networks.Discriminator, StyleGAN2Loss, build_phases),
    'stylegan1': System(
        stylegan1.StyleGAN1Generator, networks.Discriminator, StyleGAN2Loss, build_phases),
    'dcgan': System(
        dcgan.DCGANGenerator, dcgan.DCGANDiscriminator, DCGANLoss, dcgan_phases),
}


def make_networks(
    config: TrainConfig, label_dim: int, channels: int,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(G, D), fresh, on the current default device. label_dim, channels: of the dataset."""
    system = SYSTEMS[config.system]
    shape = {'c_dim': label_dim, 'img_resolution': config.data.resolution, 'img_channels': channels}
    return system.generator(**config.G_kwargs(), **shape), system.discriminator(**config.D_kwargs(), **shape)


def make_loss(
    config: TrainConfig, G: torch.nn.Module, D: torch.nn.Module,
    augment_pipe: Callable[[torch.Tensor], torch.Tensor] | None, report: Report,
) -> Any:
    """The losses of a run: StyleGAN2Loss or DCGANLoss."""
    return SYSTEMS[config.system].loss(G, D, augment_pipe, **config.loss_kwargs(), report=report)


def make_phases(config: TrainConfig, loss: Any, g: PhaseSource, d: PhaseSource) -> list[Phase]:
    """The phases of an iteration, in order."""
    return SYSTEMS[config.system].build_phases(loss, g, d)
