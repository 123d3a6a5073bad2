# SPDX-License-Identifier: Apache-2.0
"""Adaptive discriminator augmentation: how much to augment, from how sure D is about the training images.

The mean sign of D's output for real images (r_t; ADA, Sec. 3) is near 0 as long as D cannot tell them from
generated ones, and near 1 once it has memorised them. Above the target p grows, below it p shrinks, steadily.
"""
import torch

from torch_utils import distributed

HIGH_P = 0.8  # leaks of the augmentation into generated images become likely (ADA, Sec. 2.2)
HIGH_KIMG = 20  # p crosses HIGH_P for a moment in healthy runs too


@torch.no_grad()
def next_p(
    p: torch.Tensor, mean_sign: torch.Tensor | float, *, batch_size: int, interval: int, target: float,
    kimg: float,
) -> torch.Tensor:
    """p moved by batch_size * interval / (1000 * kimg) towards more or less augmentation, kept within [0, 1].

    p: float32 scalar.  mean_sign: r_t in [-1, 1]; if it equals `target` or is not a number, p stays.
    interval: iterations between updates.  kimg: thousand images in which p can go from 0 to 1.
    Published: no upper limit, so that p winds up to any height and takes as long to come back.
    """
    excess = torch.as_tensor(mean_sign, dtype=torch.float32, device=p.device) - target
    direction = torch.nan_to_num(excess.sign(), nan=0.0)
    return (p + direction * (batch_size * interval / (kimg * 1000))).clamp(0, 1)


class AdaController:
    """Gathers signs and moves p every few iterations; nothing here waits for a GPU.

    target: wanted r_t.  batch_size: images per iteration over all processes.  interval: iterations between
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
        """Take in signs of D's logits for real images, of any shape, from each phase that computes them."""
        total = signs.detach().sum(dtype=torch.float32)
        self.pending += torch.stack([total, torch.full_like(total, signs.numel())])

    def is_due(self, num_iterations: int) -> bool:
        """Whether p is updated after this many completed iterations."""
        return num_iterations > 0 and num_iterations % self.interval == 0

    @torch.no_grad()
    def update(self, p: torch.Tensor) -> torch.Tensor:
        """Change p (float32 scalar) in place by the signs of all processes, forget them, and return r_t.

        Without any sign r_t is NaN and p stays. All processes must call.
        """
        total, count = distributed.all_reduce_sum(self.pending)
        mean_sign = total / count
        p.copy_(next_p(p, mean_sign, batch_size=self.batch_size, interval=self.interval, target=self.target,
                       kimg=self.kimg))
        self.pending.zero_()
        return mean_sign

    def warning(self, p: float, cur_nimg: int) -> str | None:
        """What to tell the user, once, when p has stayed above HIGH_P for HIGH_KIMG; else None.

        Call it at every tick, with p read then.
        """
        if p <= HIGH_P:
            self.high_since_nimg, self.has_warned = None, False
            return None
        if self.high_since_nimg is None:
            self.high_since_nimg = cur_nimg
        if self.has_warned or cur_nimg - self.high_since_nimg < HIGH_KIMG * 1000:
            return None
        self.has_warned = True
        return (f'Augmentation probability p = {p:.2f} has been above {HIGH_P} for {HIGH_KIMG} kimg: there '
                'are few images for this network, and rotations or tints may leak into those it generates. '
                'Remedies: more images or --mirror=1, --resume from a trained network, or milder '
                'augmentations (--augpipe=bg leaves colours alone, blit only flips, turns and shifts).')

    def state_dict(self) -> dict[str, object]:
        """What an exact continuation needs besides p."""
        return {'pending': self.pending.clone(), 'high_since_nimg': self.high_since_nimg,
                'has_warned': self.has_warned}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what state_dict() returned; settings are not part of it."""
        self.pending = torch.as_tensor(state['pending']).to(self.pending, copy=True)
        self.high_since_nimg, self.has_warned = state['high_since_nimg'], state['has_warned']
