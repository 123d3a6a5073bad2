# SPDX-License-Identifier: Apache-2.0
"""What augmentation needs of torch_utils, by what the whole lineage has; see torch_utils.bundle."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d
from torch_utils.ops.grid_sample_gradfix import grid_sample


class PlainDraws:
    """In place of torch_utils.host_draws: every draw is made when it is needed."""

    @dataclass(frozen=True)
    class Draw:
        """See there."""

        form: Any = ()
        values: Sequence[torch.Tensor] = ()

    @staticmethod
    def take(source: Callable[[], PlainDraws.Draw], device: torch.device) -> tuple[Any, list[torch.Tensor]]:
        """(form, values on `device`) of a draw."""
        draw = source()
        return draw.form, [value.to(device) for value in draw.values]

    @staticmethod
    def is_static(device: torch.device) -> bool:
        """Whether operations should not depend on the values."""
        return False


class PlainWarp:
    """In place of torch_utils.ops.warp: the same numbers, one operation after the other."""

    @staticmethod
    def is_small(size: Sequence[int], device: torch.device) -> bool:
        """Whether images are resampled by matrix products."""
        return False

    @staticmethod
    def continued(x: torch.Tensor, margins: Sequence[int]) -> torch.Tensor:
        """Continue x by reflection, [x0, x1, y0, y1] pixels."""
        return F.pad(x, list(margins), mode='reflect')

    @staticmethod
    def warp(
        x: torch.Tensor, f: torch.Tensor, matrix: torch.Tensor, size: Sequence[int], margins: Sequence[int],
    ) -> torch.Tensor:
        """x [N, C, H, W] continued, up-sampled by 2, and sampled at matrix [N, 3, 3] @ position."""
        x = upfirdn2d.upsample2d(PlainWarp.continued(x, margins), f, up=2)
        grid = F.affine_grid(matrix[:, :2], [*x.shape[:2], *size], align_corners=False)
        return grid_sample(x, grid)
