# SPDX-License-Identifier: Apache-2.0
"""Runs under torchrun: rank 0 decides for all, and what it decided is kept for when torchrun starts again.

A start after a failure (--max-restarts), or with other machines (--nnodes=1:2), resumes the run in its
directory, from its last complete snapshot. The number of processes may change then, if it divides the
batch: the same images are seen in the same order, and gradients are the same to rounding, but latents and
augmentation are drawn anew for each process, so that with another number the run is not the same to the bit.
"""
import dataclasses
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib.launched import STOPPED
from dnnlib.util import UserError
from torch_utils.processes.rendezvous import Rendezvous, meet
from training.config import TrainConfig, fitting_group
from training.run.folder import FLAGS_FILE, OPTIONS_FILE, read_json, save_options
from training.run.resume import ResumeRequest, newest_state

Plan = tuple[TrainConfig, ResumeRequest | None]
SHARED_SEC = 30.0  # network file systems may show a new directory late


def with_world_size(flags: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The flags with --gpus as torchrun has it. Raises UserError if another number was given."""
    given = flags.get('gpus')
    if given is not None and given != world_size:
        raise UserError(f'--gpus={given}, but the launcher started {world_size} processes; omit --gpus')
    return {**flags, 'gpus': world_size}


def plan_together(plan: Callable[[int], Plan | None]) -> Plan | None:
    """What all processes of this start train, None for nothing.

    plan(number of processes): called on rank 0, in the first start of a launch only.  Leaves with STOPPED if
    the time limit of the launch is over. Raises UserError, on rank 0 alone or where its folder is not seen.
    """
    rendezvous = meet()
    made = rendezvous.from_first(lambda: _plan(rendezvous, plan))
    if made is not None:
        check_shared(made[0].run_dir)
    return made


def check_shared(run_dir: str, wait_sec: float = SHARED_SEC) -> None:
    """Raise UserError if the files of rank 0 in the run directory do not become visible here."""
    deadline_sec = time.monotonic() + wait_sec
    while not Path(run_dir, OPTIONS_FILE).is_file():
        if time.monotonic() > deadline_sec:
            raise UserError(f'--outdir: {run_dir} does not exist on {socket.gethostname()}; all nodes need '
                            'it under the same path on a shared disk')
        time.sleep(0.1)


def _plan(rendezvous: Rendezvous, plan: Callable[[int], Plan | None]) -> Plan | None:
    memory = rendezvous.recall()
    if memory:
        return _plan_again(memory, rendezvous.world_size)
    made = plan(rendezvous.world_size)
    if made is not None:
        run, limit_sec = made[0], made[0].time_limit_sec
        # The limit is that of the launch, however often it starts again.
        rendezvous.remember(
            run_dir=run.run_dir, deadline=None if limit_sec is None else time.time() + limit_sec)
    return made


def _plan_again(memory: dict[str, Any], num_gpus: int) -> Plan:
    """The plan of a later start: the same run, from its last snapshot."""
    if memory['deadline'] is not None and time.time() >= memory['deadline']:
        sys.exit(STOPPED)
    folder = Path(memory['run_dir'])
    before = TrainConfig.from_options(read_json(folder / OPTIONS_FILE))
    config = fit_layout(before, num_gpus)
    # None without a snapshot: from the beginning, in the same directory.
    request, notes = newest_state(folder)
    for note in notes:
        print(f'Note: {note}', flush=True)
    if request is not None:
        config = request.fit(config, 'cpu', ('allow_changes',))
    source = '' if request is None else f' from {Path(request.state_path).name}'
    print(f'Note: Restarted by the launcher with {num_gpus} processes: resuming in {folder}{source}.',
          flush=True)
    if num_gpus != before.num_gpus:
        print(f'Note: There were {before.num_gpus} processes before; random numbers differ from '
              'here on.', flush=True)
        save_options(config, {**read_json(folder / FLAGS_FILE), 'gpus': num_gpus})
    if memory['deadline'] is not None:
        config = dataclasses.replace(config, time_limit_sec=memory['deadline'] - time.time())
    return config, request


def fit_layout(config: TrainConfig, num_gpus: int) -> TrainConfig:
    """The same run on another number of processes.

    Raises UserError if the batch cannot be divided accordingly without changing the groups of the minibatch
    standard deviation, which are a part of the network.
    """
    if num_gpus == config.num_gpus:
        return config
    share, rest = divmod(config.batch_size, num_gpus)
    if rest or not share:
        raise UserError(f'--batch={config.batch_size} is not divisible by the {num_gpus} processes that the '
                        'launcher started now; choose --nnodes so that every possible number divides it')
    group = config.D.mbstd_group_size
    fitting = [n for n in range(1, min(share, config.batch_gpu) + 1)
               if share % n == 0 and fitting_group(group, n) == group
               and min(group, n) == min(group, config.batch_gpu)]
    if not fitting:
        raise UserError(f'--batch={config.batch_size} leaves {share} images for each of the {num_gpus} '
                        f'processes that the launcher started now, but the minibatch standard deviation '
                        f'needs groups of {group}; start fewer processes')
    return dataclasses.replace(config, num_gpus=num_gpus, batch_gpu=max(fitting))
