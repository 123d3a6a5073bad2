# SPDX-License-Identifier: Apache-2.0
"""Pivotal tuning (Roich et al. 2021): fine-tunes a generator so that given ws produce given images."""
import copy

import torch

from dnnlib.progress import progress
from dnnlib.util import UserError
from training.projection.distance import Distance, visible

LEARNING_RATE = 3e-4  # Roich et al. 2021
BETAS = (0.9, 0.999)
PIXEL_WEIGHT = 1.0  # of the mean squared error of pixels in [-1, 1], added to the distance
SHOW_INTERVAL = 10  # steps between progress updates: each synchronizes with the device


def tune(
    G: torch.nn.Module, ws: torch.Tensor, targets: torch.Tensor, distance: Distance, num_steps: int,
    batch: int = 1,
) -> torch.nn.Module:
    """A copy of G whose synthesis, with its saved noise, maps ws [N, num_ws, w_dim] to the targets.

    targets: [N, C, H, W] in [0, 255].  batch: targets per step, taken in turn.  Mapping, noise and G
    itself are not modified. Raises UserError if memory runs out.
    """
    device = next(G.parameters()).device
    tuned = copy.deepcopy(G)
    synthesis = tuned.synthesis.requires_grad_(requires_grad=True)
    optimizer = torch.optim.Adam(synthesis.parameters(), lr=LEARNING_RATE, betas=BETAS)
    turns = torch.arange(len(ws)).split(batch)
    with torch.no_grad():
        described = [distance.describe(targets[rows].to(device, torch.float32)) for rows in turns]
    with progress(total=num_steps, desc='Tuning', unit='step') as bar:
        for step in range(num_steps):
            rows = turns[step % len(turns)]
            try:
                img = synthesis(ws[rows].to(device), noise_mode='const', force_fp32=True)
                loss = _loss(img, targets[rows].to(device), distance, described[step % len(turns)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            except torch.OutOfMemoryError as error:
                raise UserError(f'--tune: {len(rows)} targets at once do not fit into the memory of the GPU; '
                                'try a smaller --batch, or --device=cpu') from error
            optimizer.step()
            if step % SHOW_INTERVAL == 0:
                bar.set_postfix_str(f'loss {loss.item():.4f}')
            bar.update(1)
    return tuned.eval().requires_grad_(requires_grad=False)


def _loss(
    img: torch.Tensor, targets: torch.Tensor, distance: Distance, described: torch.Tensor,
) -> torch.Tensor:
    images = (img + 1) * 127.5
    apart = distance.between(distance.describe(images), described)
    error = (visible(images) - targets) / 127.5
    return apart.mean() + PIXEL_WEIGHT * error.square().mean()
