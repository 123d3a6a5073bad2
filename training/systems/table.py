# SPDX-License-Identifier: Apache-2.0
"""The systems of TrainConfig.system by name: networks, losses, and the phases of an iteration."""
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


@dataclass(frozen=True)
class System:
    """A row of the table.

    generator, discriminator: network classes.  loss: class of the loss terms, called with (G, D,
    augment_pipe, **config.loss_kwargs(), report=...).  phase_list: (loss, source of G, source of D) -> phases
    in order.
    """

    generator: Callable[..., torch.nn.Module]
    discriminator: Callable[..., torch.nn.Module]
    loss: Callable[..., Any]
    phase_list: Callable[[Any, PhaseSource, PhaseSource], list[Phase]]

    def networks(
        self, config: TrainConfig, label_dim: int, channels: int,
    ) -> tuple[torch.nn.Module, torch.nn.Module]:
        """(G, D), freshly initialised on the default device. label_dim, channels: of the dataset."""
        shape = {'c_dim': label_dim, 'img_resolution': config.data.resolution, 'img_channels': channels}
        return self.generator(**config.G_kwargs(), **shape), self.discriminator(**config.D_kwargs(), **shape)

    def phases(
        self, config: TrainConfig, loss: Any, G_opt: torch.optim.Optimizer, D_opt: torch.optim.Optimizer,
    ) -> list[Phase]:
        """The phases of an iteration, in order; they share the loss, its networks and the optimizers."""
        return self.phase_list(loss, PhaseSource(loss.G, G_opt, config.G_reg_interval),
                               PhaseSource(loss.D, D_opt, config.D_reg_interval))


SYSTEMS = {
    'stylegan2': System(networks.Generator, networks.Discriminator, StyleGAN2Loss, build_phases),
    'stylegan1': System(
        stylegan1.StyleGAN1Generator, networks.Discriminator, StyleGAN2Loss, build_phases),
    'dcgan': System(
        dcgan.DCGANGenerator, dcgan.DCGANDiscriminator, DCGANLoss, dcgan_phases),
}
