# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of the generator, G_ema."""
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_beta(cur_nimg: int, batch_size: int, ema_kimg: float, ema_rampup: float | None) -> float:
    """Share of the old average that one iteration keeps: 0.5 ^ (batch_size / half-life).

    cur_nimg: pictures shown before this iteration.  ema_kimg: half-life in thousand pictures.
    ema_rampup: limits the half-life to this share of cur_nimg, None for no limit; the first beta is then 0.
    """
    half_life_nimg = ema_kimg * 1000
    if ema_rampup is not None:
        half_life_nimg = min(half_life_nimg, cur_nimg * ema_rampup)
    return 0.5 ** (batch_size / max(half_life_nimg, 1e-8))


@torch.no_grad()
def update_ema(G_ema: torch.nn.Module, G: torch.nn.Module, beta: float) -> None:
    """Move the parameters of G_ema towards those of G by 1 - beta; copy the buffers (w_avg, noise maps)."""
    averages, currents = list(G_ema.parameters()), list(G.parameters())
    assert len(averages) == len(currents), f'G_ema has {len(averages)} parameters, G {len(currents)}'
    if averages:
        get_ema_multi_avg_fn(beta)(averages, currents, None)  # all tensors in few kernels on a GPU
    for average, current in zip(G_ema.buffers(), G.buffers(), strict=True):
        average.copy_(current)
