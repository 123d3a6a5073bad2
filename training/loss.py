# SPDX-License-Identifier: Apache-2.0
"""The loss terms of StyleGAN2-ADA: non-saturating logistic loss, path length regularisation, R1.

Every method named after a phase takes a MicroBatch and yields per-sample losses [n]. The caller averages,
scales and differentiates each before it requests the next, so that only one graph is alive.
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
    """Input of a phase in one round of gradient accumulation.

    real_img [n, C, H, W] in [-1, 1], real_c [n, c_dim]; gen_z [n, z_dim], gen_c [n, c_dim]: latents and
    labels.
    """

    real_img: torch.Tensor
    real_c: torch.Tensor
    gen_z: torch.Tensor
    gen_c: torch.Tensor


@dataclass
class StyleGAN2Loss:
    """Losses of G and D. Their only state is pl_mean, the running mean of path lengths.

    augment_pipe: applied to every image that D sees, real and generated; None for none.
    style_mixing_prob: probability that a batch mixes the styles of two latents.  r1_gamma: weight of R1.
    pl_weight, pl_decay, pl_batch_shrink: weight, averaging speed and batch divisor of path length
    regularisation.
    report(name, values): receives statistics.  ada: receives D's signs on real images; None unless p is
    adaptive.  compiled: compiled forms of differentiated_once(), by name.
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
        """Modules in losses that are differentiated only once (no gradient of a gradient)."""
        return {'synthesis': self.G.synthesis, 'D': self.D}

    def generator_main(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """softplus(-D(G(z))): the non-saturating logistic loss (Goodfellow et al. 2014, Sec. 3)."""
        img, _ = self._generate(batch.gen_z, batch.gen_c, once=True)
        logits = self._discriminate(img, batch.gen_c, once=True)
        self._report_logits('fake', logits)
        loss = F.softplus(-logits)
        self.report('Loss/G/loss', loss)
        yield loss

    def path_length(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """(|J_w^T y| - a)^2 with y ~ N(0, I), a: running mean (StyleGAN2, Sec. 3.2, Eq. 4; App. B)."""
        if self.pl_weight == 0:
            return
        n = max(len(batch.gen_z) // self.pl_batch_shrink, 1)
        img, ws = self._generate(batch.gen_z[:n], batch.gen_c[:n])
        y = torch.randn_like(img) / math.sqrt(img.shape[2] * img.shape[3])
        with no_weight_gradients():
            (grad,) = torch.autograd.grad((img * y).sum(), ws, create_graph=True)  # [n, num_ws, w_dim]
        lengths = grad.square().sum(dim=2).mean(dim=1).sqrt()
        # Inside the penalty the mean is differentiated; only the stored copy is detached.
        pl_mean = self.pl_mean.lerp(lengths.mean(), self.pl_decay)
        self.pl_mean.copy_(pl_mean.detach())
        penalty = (lengths - pl_mean).square()
        self.report('Loss/pl_penalty', penalty)
        self.report('Loss/G/reg', penalty * self.pl_weight)
        yield penalty * self.pl_weight

    def discriminator_main(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """softplus(D(G(z))) + softplus(-D(x)), both in one pass through D (Goodfellow et al. 2014, Eq. 1)."""
        fake_img, real_img = self._fakes(batch), self._augmented(batch.real_img)
        fake_logits, real_logits = pass_together(
            self._network('D', once=True), (fake_img, batch.gen_c), (real_img, batch.real_c),
            self.D.samples_seen_together)
        fake = self._discriminator_fake(fake_logits)
        yield fake + self._discriminator_real(real_logits, fake.detach())

    def r1(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """r1_gamma / 2 * |grad_x D(x)|^2 (R1; Mescheder et al. 2018, Eq. 9); x: before augmentation."""
        if self.r1_gamma != 0:
            logits, penalty = self._gradient_penalty(batch)
            self._report_logits('real', logits)
            yield penalty

    def generator_both(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """generator_main and path_length, without lazy regularisation."""
        yield from self.generator_main(batch)
        yield from self.path_length(batch)

    def discriminator_both(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """discriminator_main and r1 with one pass over the real images, without lazy regularisation."""
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
        """(img, ws) with style mixing, one crossover for the whole batch (StyleGAN, Sec. 3.1).

        once: the loss is differentiated only once.
        """
        ws = self.G.mapping(z, c)
        if self.style_mixing_prob > 0:
            ws = self._mixed(ws, z, c)
        return self._network('synthesis', once)(ws), ws

    def _mixed(self, ws: torch.Tensor, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """ws with those of other latents from a random crossover layer on."""
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
        """Augmented generated images without gradients of G."""
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
    """Draw the crossover layer of style mixing: 1 ... num_ws - 1 with probability `chance`, else num_ws (no
    mixing).

    Always drawn on the host, so that no GPU has to be waited for. The form is the cut; if is_static, it is
    (), and the value a mask [1, num_ws, 1] of the styles to keep.
    """
    cut = int(torch.randint(1, num_ws, [])) if float(torch.rand([])) < chance else num_ws
    if not is_static:
        return host_draws.Draw(cut)
    return host_draws.Draw((), ((torch.arange(num_ws) < cut)[None, :, None],))


def pass_together(
    D: Callable[..., torch.Tensor], fake: tuple[torch.Tensor, torch.Tensor],
    real: tuple[torch.Tensor, torch.Tensor], group: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """D's logits of two batches of equal size, each (images, labels), in one pass: half the calls, and the
    same numbers.

    group: samples_seen_together of D. Rows are ordered such that no group of the minibatch standard deviation
    mixes both batches; if there is no such order, D runs once per batch.
    """
    if group is None or len(fake[0]) % group != 0:
        return D(*fake), D(*real)
    # Row k of each of the m groups of a batch, then row k of each group of the other: remainders by 2 * m.
    rows = [torch.cat([t.unflatten(0, [group, -1]) for t in pair], dim=1).flatten(0, 1)
            for pair in zip(fake, real, strict=True)]
    fake_logits, real_logits = D(*rows).unflatten(0, [group, -1]).chunk(2, dim=1)
    return fake_logits.flatten(0, 1), real_logits.flatten(0, 1)
