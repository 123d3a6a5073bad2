# SPDX-License-Identifier: Apache-2.0
"""The losses of DCGAN (Radford et al. 2016): binary cross-entropy, D on real images, then on fakes, then G.

The methods are those of a phase: see training.loss.
"""
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from torch_utils import training_stats
from training.augmentation.ada import AdaController
from training.loss import MicroBatch
from training.phases import FlatGradients, Phase, PhaseSource


@dataclass
class DCGANLoss:
    """Losses of G and D.

    augment_pipe: applied to every image that D sees, real and generated; None for none.
    report(name, values): receives statistics.  ada: receives D's signs on real images; None unless p is
    adaptive.  pl_mean: always 0 (no path lengths); training states have a field for it.
    compiled: compiled forms of differentiated_once(), by name.
    """

    G: torch.nn.Module
    D: torch.nn.Module
    augment_pipe: Callable[[torch.Tensor], torch.Tensor] | None = None
    report: Callable[[str, torch.Tensor], object] = training_stats.report
    ada: AdaController | None = None
    compiled: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.pl_mean = torch.zeros([], device=next(self.G.parameters()).device)

    def differentiated_once(self) -> dict[str, torch.nn.Module]:
        """Modules in losses that are differentiated only once: here, all."""
        return {'G': self.G, 'D': self.D}

    def discriminator_main(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """-log D(x), then -log(1 - D(G(z))), each with its own batch statistics."""
        logits = self._discriminate(batch.real_img, 'real')
        real_loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction='none')
        yield real_loss
        with torch.no_grad():
            img = self.compiled.get('G', self.G)(batch.gen_z, batch.gen_c)
        logits = self._discriminate(img, 'fake')
        fake_loss = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction='none')
        self.report('Loss/D/loss', real_loss.detach() + fake_loss)
        yield fake_loss

    def generator_main(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """-log D(G(z))."""
        img = self.compiled.get('G', self.G)(batch.gen_z, batch.gen_c)
        logits = self._discriminate(img, 'fake')
        loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction='none')
        self.report('Loss/G/loss', loss)
        yield loss

    def _discriminate(self, img: torch.Tensor, kind: str) -> torch.Tensor:
        D = self.compiled.get('D', self.D)
        logits = D(img if self.augment_pipe is None else self.augment_pipe(img))
        signs = logits.sign()
        if kind == 'real' and self.ada is not None:
            self.ada.add(signs)
        self.report(f'Loss/scores/{kind}', logits)
        self.report(f'Loss/signs/{kind}', signs)
        return logits


def dcgan_phases(loss: DCGANLoss, g: PhaseSource, d: PhaseSource) -> list[Phase]:
    """The phases of an iteration in order: Dmain, Gmain. There is no regularisation."""
    table = [('Dmain', d, loss.discriminator_main), ('Gmain', g, loss.generator_main)]
    return [
        Phase(name, losses, source.module, source.opt,
              FlatGradients([p for group in source.opt.param_groups for p in group['params']]))
        for name, source, losses in table]
