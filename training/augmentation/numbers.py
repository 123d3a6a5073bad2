# SPDX-License-Identifier: Apache-2.0
"""The numbers behind the parameters of the augmentation: random ones, or a quantile of their kind."""
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, StatisticsError
from typing import Any

import numpy as np
import torch

from dnnlib.util import UserError

UNIFORM, NORMAL, HALF_NORMAL = 'uniform', 'normal', 'half-normal'

# What takes the place of a random number at debug_percentile = q. As published, these are erfinv(2 q - 1) and
# erfinv(q), which lack a factor sqrt(2) against the true quantiles.
QUANTILES: dict[str, Callable[[float], float]] = {
    UNIFORM: lambda q: q,
    NORMAL: lambda q: NormalDist().inv_cdf(q) / math.sqrt(2),
    HALF_NORMAL: lambda q: NormalDist().inv_cdf((1 + q) / 2) / math.sqrt(2),
}


class Numbers:
    """Where the parameters of one call come from.

    changes_nothing: whether it is certain beforehand that all pictures stay as they are.
    """

    changes_nothing = False

    def parameter(self, pipe: Any, row: Any) -> np.ndarray:
        """t [count, N] of a row; pictures that are not to get it have the neutral value."""
        gate = self.gate(row, row.strength(pipe))  # [1 or count, N]
        return np.where(gate, row.value(pipe, self.take(row)), row.neutral)


class RandomNumbers(Numbers):
    """Random parameters: all numbers of a call are drawn at once, then handed out row by row."""

    def __init__(self, rows: Sequence[Any], num: int, p: float):
        self.p, self.changes_nothing = p, p <= 0
        # At most `count` gates a row; a few spare numbers cost nothing.
        num_uniform = sum(row.count * (2 if row.source == UNIFORM else 1) for row in rows)
        num_normal = sum(row.count for row in rows if row.source != UNIFORM)
        self.uniform = torch.rand([num_uniform, num], device='cpu').double().numpy()
        self.normal = torch.randn([num_normal, num], device='cpu').double().numpy()

    def gate(self, row: Any, strength: np.ndarray) -> np.ndarray:
        """Which pictures get the row: bool [1 or count, N]. strength: of its independent parts."""
        return self._next_uniform(len(strength)) < row.chance(strength * self.p)[:, None]

    def take(self, row: Any) -> np.ndarray:
        """The numbers r [count, N] of a row."""
        if row.source == UNIFORM:
            return self._next_uniform(row.count)
        numbers, self.normal = self.normal[:row.count], self.normal[row.count:]
        return np.abs(numbers) if row.source == HALF_NORMAL else numbers

    def _next_uniform(self, count: int) -> np.ndarray:
        numbers, self.uniform = self.uniform[:count], self.uniform[count:]
        return numbers


class QuantileNumbers(Numbers):
    """The same parameters for every picture, from one quantile of their distributions."""

    def __init__(self, quantile: float, num: int):
        if not 0 <= quantile < 1:
            raise UserError(f'debug_percentile={quantile} must be at least 0 and below 1; 0.5 is the median')
        self.quantile, self.num = quantile, num

    def gate(self, row: Any, strength: np.ndarray) -> np.ndarray:
        """Which pictures get the row: bool [1 or count, N]. strength: of its independent parts."""
        return np.tile((strength > 0)[:, None] & row.has_quantile, [1, self.num])

    def take(self, row: Any) -> np.ndarray:
        """The numbers r [count, N] of a row."""
        try:
            return np.full([row.count, self.num], QUANTILES[row.source](self.quantile))
        except StatisticsError:
            raise UserError(f'debug_percentile={self.quantile} has no finite value for {row.name}; '
                            'use one between 0 and 1') from None
