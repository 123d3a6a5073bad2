# SPDX-License-Identifier: Apache-2.0
"""Parameters of the augmentation: random, or a quantile of their distribution."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Sequence

import numpy as np
import torch

from dnnlib import util

# Other programs that open snapshots do not have UserError.
UserError = getattr(util, 'UserError', ValueError)
UNIFORM, NORMAL, HALF_NORMAL = 'uniform', 'normal', 'half-normal'

# Replace random numbers at debug_percentile = q. As published, these are erfinv(2 q - 1) and erfinv(q), which
# lack a factor sqrt(2) compared to the true quantiles.
QUANTILES: Dict[str, Callable[[float], float]] = {
    UNIFORM: lambda q: q,
    NORMAL: lambda q: _erfinv(2 * q - 1),
    HALF_NORMAL: lambda q: _erfinv(q),
}


def _erfinv(x: float) -> float:
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64)))


class Numbers:
    """Source of the parameters of one call.

    changes_nothing: known in advance to change no image.
    """

    changes_nothing = False

    def parameters(self, pipe: Any, rows: Sequence[Any]) -> list[np.ndarray]:
        """t [count, N] of each row, with the neutral value where it is not applied."""
        if not rows:
            return []
        layout = _layout(tuple((row, getattr(pipe, row.name), *row.parts(pipe)) for row in rows))
        # Applied to all rows at once: NumPy needs a microsecond for any array as small as these.
        values = np.concatenate([row.value(pipe, r) for row, r in zip(rows, self.take(layout))])
        t = np.where(self.gates(layout), values, layout.neutral)
        return [t[part] for part in layout.parts]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Positions of each row's numbers among those of a call.

    parts: of each row, among the K parameters of all rows.  neutral, strength: [K, 1].  kinds: of each row,
    its source and the slice of the numbers of that kind.  gates: [K], which uniform number decides.
    """

    rows: tuple[Any, ...]
    parts: list[slice]
    neutral: np.ndarray
    strength: np.ndarray
    kinds: list[tuple[str, slice]]
    gates: np.ndarray

    @functools.lru_cache(maxsize=8)  # noqa: B019 (few layouts, which are kept anyway)
    def chances(self, p: float) -> np.ndarray:
        """The probability of each parameter [K, 1]."""
        return np.concatenate([row.chance(self.strength[part] * p)
                               for row, part in zip(self.rows, self.parts)])


@functools.lru_cache(maxsize=8)
def _layout(settings: tuple[tuple, ...]) -> _Layout:
    """settings: of each row itself, its multiplier, and the factors of its parts."""
    parts, kinds, gates, strength, num_uniform, num_normal = [], [], [], [], 0, 0
    for row, multiplier, *factors in settings:
        parts.append(slice(len(gates), len(gates) + row.count))
        strength += np.broadcast_to(multiplier * np.asarray(factors, dtype=np.float64), [row.count]).tolist()
        gates += np.broadcast_to(num_uniform + np.arange(len(factors)), [row.count]).tolist()
        num_uniform += len(factors)
        if row.source == UNIFORM:
            kinds.append((row.source, slice(num_uniform, num_uniform + row.count)))
            num_uniform += row.count
        else:
            kinds.append((row.source, slice(num_normal, num_normal + row.count)))
            num_normal += row.count
    rows = tuple(row for row, *_ in settings)
    neutral = np.repeat([float(row.neutral) for row in rows], [row.count for row in rows])
    return _Layout(rows, parts, neutral[:, None], np.array(strength)[:, None], kinds, np.array(gates))


class RandomNumbers(Numbers):
    """Random parameters: all numbers of a call are drawn at once."""

    def __init__(self, rows: Sequence[Any], num: int, p: float):
        self.p, self.changes_nothing = p, p <= 0
        # At most `count` gates per row; a few unused numbers cost nothing.
        num_uniform = sum(row.count * (2 if row.source == UNIFORM else 1) for row in rows)
        num_normal = sum(row.count for row in rows if row.source != UNIFORM)
        self.uniform = torch.rand([num_uniform, num], device='cpu').double().numpy()
        self.normal = torch.randn([num_normal, num], device='cpu').double().numpy()

    def gates(self, layout: _Layout) -> np.ndarray:
        """Which images get which parameter: bool [K, N]."""
        return self.uniform[layout.gates] < layout.chances(self.p)

    def take(self, layout: _Layout) -> list[np.ndarray]:
        """The numbers r [count, N] of each row."""
        found = [self.uniform[part] if kind == UNIFORM else self.normal[part] for kind, part in layout.kinds]
        return [np.abs(r) if kind == HALF_NORMAL else r
                for r, (kind, _) in zip(found, layout.kinds)]


class QuantileNumbers(Numbers):
    """The same parameters for every image, from one quantile of their distributions."""

    def __init__(self, quantile: float, num: int):
        if not 0 <= quantile < 1:
            raise UserError(f'debug_percentile={quantile} must be at least 0 and below 1; 0.5 is the median')
        self.quantile, self.num = quantile, num

    def gates(self, layout: _Layout) -> np.ndarray:
        """Which images get which parameter: bool [K, N]."""
        has_quantile = np.concatenate([np.full([row.count, 1], row.has_quantile) for row in layout.rows])
        return np.tile((layout.strength > 0) & has_quantile, [1, self.num])

    def take(self, layout: _Layout) -> list[np.ndarray]:
        """The numbers r [count, N] of each row."""
        return [self._take(row) for row in layout.rows]

    def _take(self, row: Any) -> np.ndarray:
        value = QUANTILES[row.source](self.quantile)
        if not math.isfinite(value):
            raise UserError(f'debug_percentile={self.quantile} has no finite value for {row.name}; '
                            'use one between 0 and 1')
        return np.full([row.count, self.num], value)
