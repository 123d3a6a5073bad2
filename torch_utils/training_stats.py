# SPDX-License-Identifier: Apache-2.0
"""Statistics of a run: `report` adds values from anywhere; a Collector gives their count, mean and std.

Moments (count, sum, sum of squares) accumulate in float64 on the device of the values; only an update
synchronizes with a GPU.
"""
import math
import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from torch_utils import distributed

TABLE_ROWS = 64  # names per table; a run has about 30
NO_MOMENTS = (0.0, 0.0, 0.0)
Moments = tuple[float, float, float]  # count, sum, sum of squares


class _Table:
    """Moments of up to TABLE_ROWS names on one device; reading and clearing take one operation each."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == 'mps' else torch.float64  # MPS has no float64
        # Created outside inference mode, so that reports inside and outside of it can add to them.
        with torch.inference_mode(mode=False):
            self.moments = torch.zeros([TABLE_ROWS, 3], dtype=dtype, device=device)
            self.exponents = torch.arange(3, dtype=dtype, device=device)
            self.rows = self.moments.unbind()
        self.names: list[str] = []

    def take(self) -> dict[str, Moments]:
        """Moments of all names with values since the last call; synchronizes with the device."""
        if not self.names:
            return {}
        values = self.moments[:len(self.names)].tolist()
        self.moments.zero_()
        return {name: tuple(row) for name, row in zip(self.names, values, strict=True) if row[0]}


class Store:
    """Accumulates reported values. A run owns one; the functions of this module use a default one.

    rank: of this process.  sync_device: of the all-reduce of updates; None for no communication.
    """

    def __init__(self, rank: int = 0, sync_device: torch.device | None = None) -> None:
        self.rank = rank
        self.sync_device = sync_device
        self._names: dict[str, None] = {}  # an ordered set
        self._rows: dict[tuple[str, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: dict[torch.device, list[_Table]] = {}
        self._collectors: weakref.WeakSet[Collector] = weakref.WeakSet()

    @property
    def names(self) -> list[str]:
        """All names reported so far, in order of first use."""
        return list(self._names)

    def report(self, name: str, value: Any) -> Any:
        """Add a scalar, list, array or tensor of any shape to the statistic `name`; returns `value`.

        Values are converted to float32. An empty value only registers the name. All processes must report
        the same names in the same order.
        """
        x = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        # A column, which the exponents broadcast to three columns.
        x = x.float().reshape(-1, 1)
        found = self._rows.get((name, x.device))
        row, exponents = self._add_row(name, x.device) if found is None else found
        # Powers 0, 1 and 2 in float64, added in place: three operations and a fixed address.
        row.add_(x.pow(exponents).sum(0))
        return value

    def report0(self, name: str, value: Any) -> Any:
        """`report` on rank 0; elsewhere only register the name. Returns `value`."""
        # The empty value registers the name, so that all processes agree on the list of names.
        self.report(name, value if self.rank == 0 else [])
        return value

    def _add_row(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        tables = self._tables.setdefault(device, [])
        if not tables or len(tables[-1].names) == TABLE_ROWS:
            tables.append(_Table(device))
        table = tables[-1]
        row = table.rows[len(table.names)], table.exponents
        table.names.append(name)
        self._names[name] = None
        self._rows[name, device] = row
        return row

    def state_dict(self) -> dict[str, Any]:
        """Names, and what has been reported since the last update, as plain values. Waits for the device."""
        rows = [[name, device.type == 'cpu', *row.tolist()]
                for (name, device), (row, _) in self._rows.items()]
        return {'names': self.names, 'rows': rows}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what state_dict() returned.  device: replaces the one that is not the CPU."""
        for name in state['names']:
            self._names[name] = None
        for name, on_cpu, *moments in state['rows']:
            place = torch.device('cpu') if on_cpu else device
            row = self._rows[name, place][0] if (name, place) in self._rows else self._add_row(name, place)[0]
            row.copy_(torch.tensor(moments, dtype=row.dtype))

    def tensors(self) -> list[torch.Tensor]:
        """The accumulated moments, not copies."""
        return [table.moments for tables in self._tables.values() for table in tables]

    def _hand_out(self) -> None:
        """Move the accumulated moments from the devices to all matching collectors."""
        # Each collector keeps its own sums, so a NaN affects only the update that saw it.
        for table in (table for tables in self._tables.values() for table in tables):
            for name, moments in table.take().items():
                for collector in self._collectors:
                    collector._receive(name, moments)


class Collector:
    """Count, mean and standard deviation, per update, of the statistics whose full name matches `regex`.

    Covers values reported after its construction; collectors are independent of each other.
    keep_previous: a name without new values keeps its previous numbers; otherwise it becomes empty.
    """

    def __init__(self, regex: str = '.*', keep_previous: bool = True, store: Store | None = None) -> None:
        self._regex = re.compile(regex)
        self._keep_previous = keep_previous
        self._store = DEFAULT_STORE if store is None else store
        self._pending: dict[str, Moments] = {}
        self._moments: dict[str, Moments] = {}
        # Earlier values belong to earlier collectors only.
        self._store._hand_out()
        self._store._collectors.add(self)

    def _receive(self, name: str, moments: Moments) -> None:
        if self._regex.fullmatch(name):
            self._pending[name] = _add(self._pending.get(name, NO_MOMENTS), moments)

    def names(self) -> list[str]:
        """All names so far that match, in order of first use."""
        return [name for name in self._store.names if self._regex.fullmatch(name)]

    def update(self) -> None:
        """Publish the values reported since the last update. Collective if the store has a sync_device."""
        self._store._hand_out()
        names = self.names()
        rows = [self._pending.get(name, NO_MOMENTS) for name in names]
        self._pending.clear()
        if names and self._store.sync_device is not None:
            rows = _sum_over_processes(rows, self._store.sync_device)
        for name, row in zip(names, rows, strict=True):
            # A count of 0: no process reported anything.
            if row[0] or not self._keep_previous:
                self._moments[name] = row

    def _moments_of(self, name: str) -> Moments:
        assert self._regex.fullmatch(name), f'{name!r} does not match the expression {self._regex.pattern!r}'
        return self._moments.get(name, NO_MOMENTS)

    def num(self, name: str) -> int:
        """Number of scalars in the last update."""
        return int(self._moments_of(name)[0])

    def mean(self, name: str) -> float:
        """Their mean; NaN if there are none."""
        count, total, _ = self._moments_of(name)
        return total / count if count else math.nan

    def std(self, name: str) -> float:
        """Their population standard deviation: 0 for a single scalar, NaN for none or non-finite ones."""
        count, total, squares = self._moments_of(name)
        if not count or not math.isfinite(total):
            return math.nan
        # Rounding would give a tiny value instead.
        if count == 1:
            return 0.0
        return math.sqrt(max(squares / count - (total / count) ** 2, 0.0))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """{name: {'num', 'mean', 'std'}} for all names()."""
        return {name: {'num': self.num(name), 'mean': self.mean(name), 'std': self.std(name)}
                for name in self.names()}

    def __getitem__(self, name: str) -> float:
        return self.mean(name)


def _add(a: Moments, b: Moments) -> Moments:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _sum_over_processes(rows: list[Moments], device: torch.device) -> list[Moments]:
    dtype = torch.float32 if torch.device(device).type == 'mps' else torch.float64
    table = torch.tensor(rows, dtype=dtype, device=device)
    return [tuple(row) for row in distributed.all_reduce_sum(table).tolist()]


DEFAULT_STORE = Store()


def init_multiprocessing(rank: int, sync_device: torch.device | None) -> None:
    """Set rank and communication device (None: none) of the default store; call before any update."""
    DEFAULT_STORE.rank = rank
    DEFAULT_STORE.sync_device = sync_device


def report(name: str, value: Any) -> Any:
    """`Store.report` on the default store."""
    return DEFAULT_STORE.report(name, value)


def report0(name: str, value: Any) -> Any:
    """`Store.report0` on the default store."""
    return DEFAULT_STORE.report0(name, value)
