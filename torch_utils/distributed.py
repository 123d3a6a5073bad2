# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: launch, rank, world size, and the few collective operations.

Without a process group there is one process, of rank 0.
Processes are started by PyTorch's own launcher, either torchrun or launch() below, which sets the environment
variables that torch.distributed reads. torchrun itself exits with status 1 whatever the status of its
processes, which it reports.
"""
import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dnnlib.launched import is_launched
from dnnlib.util import UserError
from torch_utils.processes.rendezvous import REFUSED, is_first_to_say, meet, reason_of
from torch_utils.processes.watchdog import GRACE_SEC, HERE, Watchdog

TIMEOUT_SEC = 600  # a process that stalls the others for longer aborts the run
SIGNALS = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGUSR1')  # stop a program; the last one, a run
START_METHOD = 'spawn'  # of launch(): CUDA cannot be used in a forked process


class LostContactError(Exception):
    """Another process is gone. Not meant to be caught."""


def is_initialized() -> bool:
    """Whether this process belongs to a process group; never in torch builds without distributed support."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process in the run, 0 .. world_size() - 1."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if is_initialized() else 1


def note_phase(name: str) -> None:
    """Set the phase that the watchdog reports if this process stalls."""
    HERE.phase = name


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around every collective: counts it, and turns the loss of another process into LostContactError."""
    HERE.entered += 1
    try:
        yield
    except RuntimeError as error:
        # Give the launcher time to report the process that failed first.
        HERE.finish()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SEC)
        raise LostContactError(f'process {rank()} lost the others in the phase {HERE.phase}: '
                               f'{reason_of(error)}') from error


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its sum over all processes, in place, and return it. All processes must call."""
    if world_size() > 1:
        with _together():
            dist.all_reduce(tensor)
    return tensor


def start_max(value: int) -> Callable[[], int]:
    """Start an asynchronous maximum over all processes; the returned function waits for the result.

    Does not synchronize with a GPU. All processes must call, in the same order among all collectives.
    """
    if world_size() == 1:
        return lambda: value
    box = torch.tensor([value])
    with _together():
        work = dist.all_reduce(box, op=dist.ReduceOp.MAX, async_op=True)

    def finish() -> int:
        with _together():
            work.wait()
        return int(box)
    return finish


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place, with one all-reduce. All must call."""
    if world_size() == 1 or not tensors:
        return
    flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors])) / world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def broadcast_value(value: Any) -> Any:
    """Rank 0's value, which must be picklable. All processes must call."""
    if world_size() == 1:
        return value
    box = [value]
    with _together():
        dist.broadcast_object_list(box)
    return box[0]


def gather_values(value: Any) -> list[Any]:
    """The picklable values of all processes, by rank. All processes must call."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with _together():
        dist.all_gather_object(values, value)
    return values


class Group:
    """Context manager: membership of this process in the process group of a run.

    NCCL between GPUs; gloo between CPUs, with the cores divided among the processes.  device: of this
    process.  timeout_sec: a process that stalls the others for longer aborts the run.  advice: appended to
    that error message.  Does nothing for num_processes = 1.
    """

    def __init__(
        self, device: torch.device, num_processes: int, timeout_sec: float = TIMEOUT_SEC, advice: str = '',
    ) -> None:
        self.device = device
        self._watch = None
        if num_processes > 1:
            self.device = join(device.type, timeout_sec)
            self._watch = Watchdog(meet(), timeout_sec, advice)

    def __enter__(self) -> 'Group':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        if self._watch is None:
            return
        try:
            if isinstance(error, LostContactError):
                raise error
            if kind is None:
                leave()
            else:
                self._watch.say_failed()
        except LostContactError as lost:
            raise UserError(str(lost)) from lost
        finally:
            self._watch.stop()
            HERE.finish = lambda: None


def join(device_type: str, timeout_sec: float = TIMEOUT_SEC) -> torch.device:
    """Join the process group of the launcher, and select the device of this process; see Group.

    Call once, before any collective. Raises UserError if there are fewer GPUs than processes.
    """
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by launch()
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    # Longer than the watchdog's time-out, so that the watchdog reports first and names the hung rank.
    settings = {'timeout': timedelta(seconds=1.25 * timeout_sec + 30), 'store': meet().store,
                'rank': meet().rank, 'world_size': meet().world_size}
    if device_type == 'cuda':
        available = torch.cuda.device_count()
        if local_rank >= available:
            raise UserError(f'process {meet().rank} is number {local_rank + 1} on its node, which has '
                            f'{available} GPUs; start one process per GPU')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
        # gloo, too: small messages between CPUs must not wait for work queued on the GPUs.
        dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device, **settings)
        return device
    dist.init_process_group('gloo', **settings)
    # Several processes with all threads each would oversubscribe the cores.
    torch.set_num_threads(max(torch.get_num_threads() // local_world_size(), 1))
    return torch.device('cpu')


def local_world_size() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def leave() -> None:
    """Leave the process group after a barrier; does nothing without one."""
    if is_initialized():
        with _together():
            dist.barrier()
        dist.destroy_process_group()


class Reporting:
    """Context manager for a process of torchrun: records its error in torchrun's report, and prints each
    UserError on one process only. Does nothing without torchrun.
    """

    def __enter__(self) -> 'Reporting':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        if not is_launched() or not isinstance(error, Exception):
            return
        # Optional in builds of torch, and slow to import.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
        place = f'process {os.environ["RANK"]}'
        if not isinstance(error, UserError):
            print(f'Error in {place}:', file=sys.stderr)
            return
        if not is_first_to_say(str(error)):
            sys.exit(REFUSED)
        raise UserError(f'{error}' if os.environ['RANK'] == '0' else f'{place}: {error}') from error


def launch(
    function: Callable[..., None], args: tuple, num_processes: int, stopped_status: int = 1,
) -> None:
    """Run function(*args) in num_processes processes on this machine, each of which calls join().

    If one fails, the others are stopped. Raises its UserError; for any other failure, prints it and exits
    with its status.

    stopped_status: exit status after SIGTERM, SIGINT or SIGUSR1. These are forwarded to all processes, which
    have 30 seconds to stop.
    """
    # Optional in builds of torch, and slow to import.
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    # The launcher's failure reports would bury the line that names the cause; each logger has its own level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(('torch.distributed.elastic', 'torch.multiprocessing')):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, _usr1_as_term(), _interrupts_held_back():
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=num_processes, rdzv_backend='c10d',
            rdzv_endpoint='localhost:0', run_id='train', max_restarts=0, start_method=START_METHOD,
            logs_specs=DefaultLogsSpecs(log_dir=folder))
        try:
            elastic_launch(config, function)(*args)
        except SignalException:
            sys.exit(stopped_status)
        except ChildFailedError as error:
            _stop(*error.get_first_failure())


@contextlib.contextmanager
def _usr1_as_term() -> Iterator[None]:
    """Turn SIGUSR1 into SIGTERM, since the launcher does not forward SIGUSR1.

    Restores all handlers afterwards, some of which the launcher replaces and does not restore.
    """
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started within this context have SIGINT blocked until join(); this one still receives it.

    Ctrl-C reaches all processes, and one that is still importing would print a traceback.
    """
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    is_over = threading.Event()
    # Processes inherit the mask of the main thread; this thread stays unblocked and receives the signal.
    open_thread = threading.Thread(target=is_over.wait, name='interrupts', daemon=True)
    open_thread.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        is_over.set()
        open_thread.join()


def _stop(rank: int, failure: Any) -> None:
    """Exit as the failed process did, with its UserError, its traceback, or the signal that killed it."""
    details = failure.message if isinstance(failure.message, dict) else {}
    kind, _, text = details.get('message', '').partition(': ')
    if kind == UserError.__name__:
        raise UserError(text) from None
    if details:
        trace = details.get('extraInfo', {}).get('py_callstack', details['message'])
        print(f'Process {rank} of the run failed:\n{trace}', file=sys.stderr)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f'Error: process {rank} was killed by {name}, so the others were stopped; the usual cause is '
              'lack of host memory', file=sys.stderr)
    sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
