# SPDX-License-Identifier: Apache-2.0
"""Where the processes of a run find each other: the key-value store of their launcher.

The store outlives a restart of the processes, so the keys of each start have a prefix of their own; values
for later starts are kept beside them.
"""
import functools
import hashlib
import json
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dnnlib.util import UserError

WAIT_SEC = 600  # for all processes of a start to appear, and for the decision of rank 0
POLL_SEC = 0.05
REFUSED = 2  # exit status after an error that another rank has already reported


@dataclass(frozen=True)
class Rendezvous:
    """The processes of one start.

    name: of the start.  store: keys of this start.  launch: keys that outlive a restart of the processes.
    """

    rank: int
    world_size: int
    name: str
    store: dist.Store
    launch: dist.Store

    def reconnect(self, timeout_sec: float) -> dist.Store:
        """The store of this start through another connection, for a thread that must not block on others."""
        return dist.PrefixStore(self.name, _of_launch(open_store(timeout_sec)))

    def from_first(self, decide: Callable[[], Any]) -> Any:
        """Rank 0's decide(), which must be picklable. All processes must call.

        If it raises on rank 0, the others exit silently.
        """
        if self.rank == 0:
            message = pickle.dumps(None)
            try:
                value = decide()
                message = pickle.dumps((value,))
            finally:
                self.store.set('decision', message)
            return value
        try:
            decision = pickle.loads(self.store.get('decision'))
        except dist.DistError as error:
            raise UserError(f'process {self.rank} has not heard from process 0 for {WAIT_SEC} seconds; check '
                            'that it is running') from error
        if decision is None:
            sys.exit(REFUSED)
        return decision[0]

    def is_first_to_say(self, text: str) -> bool:
        """Whether no other process of this start has printed this text; True if the launcher is gone."""
        key = f'said/{hashlib.sha256(text.encode()).hexdigest()}'
        try:
            return self.store.compare_set(key, '', str(self.rank)) == str(self.rank).encode()
        except dist.DistError:  # the launcher is gone
            return True

    def remember(self, **values: Any) -> None:
        """Keep plain values for later starts within this launch."""
        self.launch.set('memory', json.dumps(values))

    def recall(self) -> dict[str, Any]:
        """The values kept by an earlier start within this launch; empty at the first.

        Raises UserError if there was an earlier one but its values are lost.
        """
        if self.launch.check(['memory']):
            return json.loads(self.launch.get('memory'))
        if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0:
            raise UserError('--max-restarts: the launcher has lost its store with the run directory; '
                            'start again with --resume=latest')
        self.remember()
        return {}


def open_store(timeout_sec: float = WAIT_SEC) -> dist.TCPStore:
    """A new connection to the store of the launch, which rank 0 hosts if there is no agent.

    timeout_sec: for the store, and for each key.  Raises UserError if there is no store.
    """
    address, port, rank = (os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT', 'RANK'))
    has_agent = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    keeps = not has_agent and rank == '0'
    try:
        return dist.TCPStore(address, int(port), wait_for_workers=False, is_master=keeps,
                             timeout=timedelta(seconds=timeout_sec), multi_tenant=not has_agent)
    except (dist.DistError, ValueError) as error:
        raise UserError(f'MASTER_PORT={port} of MASTER_ADDR={address}: process {rank} cannot '
                        f'{"listen there" if keeps else "reach it"} ({reason_of(error)}); '
                        f'{"choose another port" if keeps else "check that process 0 runs"}') from error


def reason_of(error: Exception) -> str:
    """First line of a PyTorch error; the rest is its C++ stack."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_first_to_say(text: str) -> bool:
    """As the method; True before, or after a failed, rendezvous."""
    return not meet.cache_info().currsize or meet().is_first_to_say(text)


@functools.cache
def meet() -> Rendezvous:
    """Wait for all processes of this start. Raises UserError if some do not appear."""
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    launch = _of_launch(open_store())
    name = _host(launch, world_size) if rank == 0 else _join(launch, rank)
    return Rendezvous(rank, world_size, name, dist.PrefixStore(name, launch), launch)


def _of_launch(store: dist.Store) -> dist.Store:
    return dist.PrefixStore(f'launch/{os.environ.get("TORCHELASTIC_RUN_ID", "")}', store)


def _join(launch: dist.Store, rank: int) -> str:
    """Name of the start, which rank 0 sends in answer to a request with a fresh nonce."""
    nonce = uuid.uuid4().hex
    launch.set(f'asks/{rank}', nonce)
    try:
        name = launch.get(f'answer/{nonce}').decode()
    except dist.DistError as error:
        raise UserError(f'process {rank} waited {WAIT_SEC} seconds for process 0; check that it is '
                        'running') from error
    launch.set(f'{name}/here/{rank}', '')
    return name


def _host(launch: dist.Store, world_size: int) -> str:
    """Create a name for the start, and answer requests until all processes have it.

    Requests of earlier starts are answered as well, which is harmless.
    """
    name, missing = uuid.uuid4().hex, set(range(1, world_size))
    deadline_sec = time.monotonic() + WAIT_SEC
    while missing:
        for rank in [r for r in missing if launch.check([f'asks/{r}'])]:
            launch.set(f'answer/{launch.get(f"asks/{rank}").decode()}', name)
        missing -= {r for r in missing if launch.check([f'{name}/here/{r}'])}
        if missing and time.monotonic() > deadline_sec:
            raise UserError(f'processes {", ".join(map(str, sorted(missing)))} of {world_size} did not '
                            f'appear within {WAIT_SEC} seconds; check their nodes')
        time.sleep(POLL_SEC if missing else 0)
    return name
