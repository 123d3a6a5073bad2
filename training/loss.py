# SPDX-License-Identifier: Apache-2.0
"""The loss terms of StyleGAN2-ADA: non-saturating logistic loss, path length regularisation, R1.

Every method named after a phase takes a MicroBatch and yields per-sample losses [n], to be averaged, scaled
and differentiated one after the other before the next is asked for: each yield frees the graph of the one
before.
"""
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from torch_utils import host_draws, training_stats
from torch_utils.ops.conv2d_gradfix import no_weight_gradients
from training.augmentation.ada import AdaController


@dataclass(frozen=True)
class MicroBatch:
    """What one phase sees in one round of gradient accumulation.

    real_img [n, C, H, W] in [-1, 1], real_c [n, c_dim]; gen_z [n, z_dim], gen_c [n, c_dim]: latents and
    labels.
    """

    real_img: torch.Tensor
    real_c: torch.Tensor
    gen_z: torch.Tensor
    gen_c: torch.Tensor


@dataclass
class StyleGAN2Loss:
    """Losses of G and D, and the only state among them: pl_mean, the running mean of path lengths.

    augment_pipe: applied to every image that D sees, real and generated; None for none.
    style_mixing_prob: chance that a batch mixes the styles of two latents.  r1_gamma: weight of R1.
    pl_weight, pl_decay, pl_batch_shrink: weight, averaging speed and batch divisor of path length
    regularisation.
    report(name, values): where statistics go.  ada: is given D's signs on real images; None unless p is
    adaptive.  compiled: faster forms of differentiated_once(), by name.
    """

    G: torch.nn.Module
    D: torch.nn.Module
    augment_pipe: Callable[[torch.Tensor], torch.Tensor] | None = None
    style_mixing_prob: float = 0.9
    r1_gamma: float = 10
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01
    pl_weight: float = 2
    report: Callable[[str, torch.Tensor], object] = training_stats.report
    ada: AdaController | None = None
    compiled: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.pl_mean = torch.zeros([], device=next(self.G.parameters()).device)

    def differentiated_once(self) -> dict[str, torch.nn.Module]:
        """What runs in losses of which only the gradient is taken."""
        return {'synthesis': self.G.synthesis, 'D': self.D}

    def generator_main(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """Make D take fakes for real: softplus(-D(G(z))) (Goodfellow et al. 2014, non-saturating)."""
        img, _ = self._generate(batch.gen_z, batch.gen_c, once=True)
        logits = self._discriminate(img, batch.gen_c, once=True)
        self._report_logits('fake', logits)
        loss = F.softplus(-logits)
        self.report('Loss/G/loss', loss)
        yield loss

    def path_length(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """Penalise path lengths far from their running mean (StyleGAN2, Sec. 3.2 and App. B)."""
        if self.pl_weight == 0:
            return
        n = max(len(batch.gen_z) // self.pl_batch_shrink, 1)
        img, ws = self._generate(batch.gen_z[:n], batch.gen_c[:n])
        y = torch.randn_like(img) / math.sqrt(img.shape[2] * img.shape[3])
        with no_weight_gradients():
            (grad,) = torch.autograd.grad((img * y).sum(), ws, create_graph=True)  # [n, num_ws, w_dim]
        lengths = grad.square().sum(dim=2).mean(dim=1).sqrt()
        # The mean keeps its gradient inside the penalty; only the stored copy is cut off.
        pl_mean = self.pl_mean.lerp(lengths.mean(), self.pl_decay)
        self.pl_mean.copy_(pl_mean.detach())
        penalty = (lengths - pl_mean).square()
        self.report('Loss/pl_penalty', penalty)
        self.report('Loss/G/reg', penalty * self.pl_weight)
        yield penalty * self.pl_weight

    def discriminator_main(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """Tell generated from real: softplus(D(G(z))) + softplus(-D(x)), both in one pass through D."""
        fake_img, real_img = self._fakes(batch), self._augmented(batch.real_img)
        fake_logits, real_logits = pass_together(
            self._network('D', once=True), (fake_img, batch.gen_c), (real_img, batch.real_c),
            self.D.samples_seen_together)
        fake = self._discriminator_fake(fake_logits)
        yield fake + self._discriminator_real(real_logits, fake.detach())

    def r1(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """Penalise D's gradient at real images (Mescheder et al. 2018, R1), taken before augmentation."""
        if self.r1_gamma != 0:
            logits, penalty = self._gradient_penalty(batch)
            self._report_logits('real', logits)
            yield penalty

    def generator_both(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """generator_main and path_length: a generator without lazy regularisation."""
        yield from self.generator_main(batch)
        yield from self.path_length(batch)

    def discriminator_both(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """discriminator_main and r1 with one pass over the real images: no lazy regularisation."""
        if self.r1_gamma == 0:
            yield from self.discriminator_main(batch)
            return
        fake = self._discriminator_fake(self._network('D', once=True)(self._fakes(batch), batch.gen_c))
        yield fake
        logits, penalty = self._gradient_penalty(batch)
        yield self._discriminator_real(logits, fake.detach()) + penalty

    def _generate(
        self, z: torch.Tensor, c: torch.Tensor, *, once: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(img, ws) with style mixing: one decision and one cut for the whole batch (StyleGAN, Sec. 3.1).

        once: nobody differentiates a gradient.
        """
        ws = self.G.mapping(z, c)
        if self.style_mixing_prob > 0:
            ws = self._mixed(ws, z, c)
        return self._network('synthesis', once)(ws), ws

    def _mixed(self, ws: torch.Tensor, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """ws with those of other latents from a drawn cut on."""
        is_static = host_draws.is_static(ws.device)
        draw = functools.partial(draw_cut, self.style_mixing_prob, ws.shape[1], is_static)
        cut, keep = host_draws.take(draw, ws.device)
        if not is_static and cut == ws.shape[1]:
            return ws
        other = self.G.mapping(torch.randn_like(z), c, skip_w_avg_update=True)
        if is_static:
            return torch.where(keep[0], ws, other)
        return torch.cat([ws[:, :cut], other[:, cut:]], dim=1)

    def _discriminate(self, img: torch.Tensor, c: torch.Tensor, *, once: bool = False) -> torch.Tensor:
        return self._network('D', once)(self._augmented(img), c)

    def _augmented(self, img: torch.Tensor) -> torch.Tensor:
        return img if self.augment_pipe is None else self.augment_pipe(img)

    def _network(self, name: str, once: bool) -> Callable[..., torch.Tensor]:
        network = self.differentiated_once()[name]
        return self.compiled.get(name, network) if once else network

    def _fakes(self, batch: MicroBatch) -> torch.Tensor:
        """Generated images as D sees them, of which G learns nothing."""
        with torch.no_grad():
            img, _ = self._generate(batch.gen_z, batch.gen_c, once=True)
        return self._augmented(img)

    def _discriminator_fake(self, logits: torch.Tensor) -> torch.Tensor:
        self._report_logits('fake', logits)
        return F.softplus(logits)

    def _discriminator_real(self, logits: torch.Tensor, fake_loss: torch.Tensor) -> torch.Tensor:
        self._report_logits('real', logits)
        loss = F.softplus(-logits)
        self.report('Loss/D/loss', fake_loss + loss)
        return loss

    def _gradient_penalty(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [n, 1], weighted penalty [n, 1]) of the real images."""
        real_img = batch.real_img.detach().requires_grad_()
        logits = self._discriminate(real_img, batch.real_c)
        (grad,) = torch.autograd.grad(logits.sum(), real_img, create_graph=True)
        penalty = grad.square().sum(dim=[1, 2, 3])[:, None]
        self.report('Loss/r1_penalty', penalty)
        self.report('Loss/D/reg', penalty * (self.r1_gamma / 2))
        return logits, penalty * (self.r1_gamma / 2)

    def _report_logits(self, kind: str, logits: torch.Tensor) -> None:
        signs = logits.sign()
        if kind == 'real' and self.ada is not None:
            self.ada.add(signs)
        self.report(f'Loss/scores/{kind}', logits)
        self.report(f'Loss/signs/{kind}', signs)


def draw_cut(chance: float, num_ws: int, is_static: bool) -> host_draws.Draw:
    """Draw from where on the styles are those of other latents: num_ws (not at all), or with the given chance
    1 ... num_ws - 1.

    Drawn on the host whatever the device, so that a GPU need not be waited for. The form is the cut; if
    is_static, it is (), and the value a mask [1, num_ws, 1] of the styles to keep.
    """
    cut = int(torch.randint(1, num_ws, [])) if float(torch.rand([])) < chance else num_ws
    if not is_static:
        return host_draws.Draw(cut)
    return host_draws.Draw((), ((torch.arange(num_ws) < cut)[None, :, None],))


def pass_together(
    D: Callable[..., torch.Tensor], fake: tuple[torch.Tensor, torch.Tensor],
    real: tuple[torch.Tensor, torch.Tensor], group: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """D's logits of two batches of the same size, each a pair of images and labels, in one pass: half the
    calls, each with twice the work, and the same numbers.

    group: samples_seen_together of D. The rows alternate such that no group has samples of both batches; if
    there is no such order, D sees one batch after the other.
    """
    if group is None or len(fake[0]) % group != 0:
        return D(*fake), D(*real)
    # Row k of each of the m groups of a batch, then row k of each group of the other: remainders by 2 * m.
    rows = [torch.cat([t.unflatten(0, [group, -1]) for t in pair], dim=1).flatten(0, 1)
            for pair in zip(fake, real, strict=True)]
    fake_logits, real_logits = D(*rows).unflatten(0, [group, -1]).chunk(2, dim=1)
    return fake_logits.flatten(0, 1), real_logits.flatten(0, 1)
