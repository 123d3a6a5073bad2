# SPDX-License-Identifier: Apache-2.0
"""Adaptive discriminator augmentation: control of p by the overfitting of D.

The mean sign of D's output for real images (r_t; ADA, Sec. 3, Eq. 1) is near 0 while D cannot tell them from
generated ones, and near 1 once it has memorised them. p rises at a fixed rate while r_t is above the target,
and falls while it is below.
"""
import torch

from torch_utils import distributed

HIGH_P = 0.8  # leaks of the augmentation into generated images become likely (ADA, Sec. 2.2)
HIGH_KIMG = 20  # in healthy runs p exceeds HIGH_P only briefly


@torch.no_grad()
def next_p(
    p: torch.Tensor, mean_sign: torch.Tensor | float, *, batch_size: int, interval: int, target: float,
    kimg: float,
) -> torch.Tensor:
    """clamp(p + sign(r_t - target) * batch_size * interval / (1000 * kimg), 0, 1) (ADA, Sec. 3).

    p: float32 scalar.  mean_sign: r_t in [-1, 1]; if it equals `target` or is NaN, p is unchanged.
    interval: iterations between updates.  kimg: thousand images in which p can go from 0 to 1.
    Published: no upper limit, so that p can wind up far above 1 and takes as long to return.
    """
    excess = torch.as_tensor(mean_sign, dtype=torch.float32, device=p.device) - target
    direction = torch.nan_to_num(excess.sign(), nan=0.0)
    return (p + direction * (batch_size * interval / (kimg * 1000))).clamp(0, 1)


class AdaController:
    """Accumulates signs and updates p every few iterations, without waiting for a GPU.

    target: of r_t.  batch_size: images per iteration over all processes.  interval: iterations between
    updates.  kimg: thousand images in which p can go from 0 to 1.  p itself is a buffer of the AugmentPipe.
    """

    def __init__(
        self, target: float, batch_size: int, interval: int = 4, kimg: float = 500,
        device: torch.device | str = 'cpu',
    ):
        self.target, self.batch_size, self.interval, self.kimg = target, batch_size, interval, kimg
        self.pending = torch.zeros([2], device=device)  # sum and number of the signs since the last update
        self.high_since_nimg: int | None = None
        self.has_warned = False

    @torch.no_grad()
    def add(self, signs: torch.Tensor) -> None:
        """Add signs of D's logits for real images, of any shape; called by each phase that computes them."""
        total = signs.detach().sum(dtype=torch.float32)
        self.pending += torch.stack([total, torch.full_like(total, signs.numel())])

    def is_due(self, num_iterations: int) -> bool:
        """Whether p is updated after this many completed iterations."""
        return num_iterations > 0 and num_iterations % self.interval == 0

    @torch.no_grad()
    def update(self, p: torch.Tensor) -> torch.Tensor:
        """Update p (float32 scalar) in place from the signs of all processes, reset them, and return r_t.

        Without signs r_t is NaN and p is unchanged. All processes must call.
        """
        total, count = distributed.all_reduce_sum(self.pending)
        mean_sign = total / count
        p.copy_(next_p(p, mean_sign, batch_size=self.batch_size, interval=self.interval, target=self.target,
                       kimg=self.kimg))
        self.pending.zero_()
        return mean_sign

    def warning(self, p: float, cur_nimg: int) -> str | None:
        """A warning, once, when p has been above HIGH_P for HIGH_KIMG; else None.

        To be called at every tick, with the current p.
        """
        if p <= HIGH_P:
            self.high_since_nimg, self.has_warned = None, False
            return None
        if self.high_since_nimg is None:
            self.high_since_nimg = cur_nimg
        if self.has_warned or cur_nimg - self.high_since_nimg < HIGH_KIMG * 1000:
            return None
        self.has_warned = True
        return (f'Augmentation probability p = {p:.2f} has been above {HIGH_P} for {HIGH_KIMG} kimg: the '
                'dataset is small for this network, and rotations or tints may leak into generated images. '
                'Remedies: more images or --mirror=1, --resume from a trained network, or milder '
                'augmentation (--augpipe=bg: no colour transforms; blit: only flips and translations).')

    def state_dict(self) -> dict[str, object]:
        """The state needed for an exact resume, besides p."""
        return {'pending': self.pending.clone(), 'high_since_nimg': self.high_since_nimg,
                'has_warned': self.has_warned}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what state_dict() returned; settings are not part of it."""
        self.pending = torch.as_tensor(state['pending']).to(self.pending, copy=True)
        self.high_since_nimg, self.has_warned = state['high_since_nimg'], state['has_warned']
