# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: how they start, rank, size, the few collective operations.

Without a group there is one process, of rank 0.
Processes come from PyTorch's own launcher, be it torchrun or launch() below; it tells each one its place in
environment variables that torch.distributed reads. torchrun itself leaves with 1 whatever the status of its
processes, which its report names.
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

TIMEOUT_SEC = 600  # a process that does not answer for so long ends the run
SIGNALS = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGUSR1')  # that end a program or, the last, a run
START_METHOD = 'spawn'  # of launch(): a process that has looked for a GPU cannot be forked


class LostContactError(Exception):
    """Another process is gone, which is not this one's fault. No error that someone might want to survive."""


def is_initialized() -> bool:
    """Whether this process belongs to a group; torch builds without distributed support never do."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process in the run, 0 .. world_size() - 1."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if is_initialized() else 1


def note_phase(name: str) -> None:
    """Say what this process is doing, for the line that is written should it never end."""
    HERE.phase = name


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around every operation of all processes: counts it, and tells the loss of others from own errors."""
    HERE.entered += 1
    try:
        yield
    except RuntimeError as error:
        # Whoever is gone is for the launcher to name, which therefore comes first.
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
    """Begin to find the largest value over all processes; the function returned waits for the answer.

    Nobody waits for a GPU. All processes must call, in the same order among the operations here.
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
    """Replace each tensor by its mean over all processes, in place, with one operation. All must call."""
    if world_size() == 1 or not tensors:
        return
    flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors])) / world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def broadcast_value(value: Any) -> Any:
    """The plain value that rank 0 passed. All processes must call."""
    if world_size() == 1:
        return value
    box = [value]
    with _together():
        dist.broadcast_object_list(box)
    return box[0]


def gather_values(value: Any) -> list[Any]:
    """The plain values that the processes passed, by rank. All processes must call."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with _together():
        dist.all_gather_object(values, value)
    return values


class Group:
    """The processes of a run, of which this is one: from entering this context until leaving it.

    NCCL between GPUs, gloo between CPUs, where the cores are shared out.  device: of this process.
    timeout_sec: a process that the others wait for so long ends the run.  advice: the end of the line that
    says so.  With num_processes = 1, all that is nothing.
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
    """Join the group that the launcher prepared, and take the device of this process; see Group.

    Call once, before any collective. Raises UserError if there are fewer GPUs than processes.
    """
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # launch() has held it back
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    # Those who wait are to be told by the watch who it is that hangs.
    how = {'timeout': timedelta(seconds=1.25 * timeout_sec + 30), 'store': meet().store, 'rank': meet().rank,
           'world_size': meet().world_size}
    if device_type == 'cuda':
        available = torch.cuda.device_count()
        if local_rank >= available:
            raise UserError(f'process {meet().rank} is number {local_rank + 1} on its machine, which has '
                            f'{available} GPUs; start as many processes as there are')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
        # Small messages between CPUs must not wait for what the GPUs have to do.
        dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device, **how)
        return device
    dist.init_process_group('gloo', **how)
    # Threads of several processes on the same core would starve each other.
    torch.set_num_threads(max(torch.get_num_threads() // local_world_size(), 1))
    return torch.device('cpu')


def local_world_size() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def leave() -> None:
    """Leave the group, after everyone has come so far; nothing without one."""
    if is_initialized():
        with _together():
            dist.barrier()
        dist.destroy_process_group()


class Reporting:
    """What a process of torchrun says of its errors: in its report, and each once however many find it.

    A context manager, and nothing elsewhere.
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
    """Run function(*args) in so many processes of this machine, each of which calls join().

    If one fails, the others are stopped. Raises UserError if that was its reason; otherwise says what
    happened and leaves with its status.

    stopped_status: to leave with once SIGTERM, SIGINT or SIGUSR1, which are passed on, have stopped all
    processes; they have 30 seconds for it.
    """
    # Optional in builds of torch, and slow to import.
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    # The launcher's own reports of a failure would bury the line that names the cause. Each part has a level.
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
    """The launcher passes on the signals that end a program, of which SIGUSR1 is none.

    Afterwards the handlers are as before, of which it replaces some for good.
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
    """Processes started within this context do not see SIGINT before join(); this one does.

    Ctrl-C reaches all at once, and one that is still importing would show where.
    """
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    resource_tracker.ensure_running()  # whose start would unblock the signal
    is_over = threading.Event()
    # The processes inherit what the main thread blocks; here the signal comes by this other thread.
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
    """Leave as a process left, with its UserError, its traceback, or the signal that killed it."""
    details = failure.message if isinstance(failure.message, dict) else {}
    kind, _, text = details.get('message', '').partition(': ')
    if kind == UserError.__name__:
        raise UserError(text) from None
    if details:
        trace = details.get('extraInfo', {}).get('py_callstack', details['message'])
        print(f'Process {rank} of the run failed:\n{trace}', file=sys.stderr)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f'Error: process {rank} was killed by {name}, so the others were stopped; short memory is the '
              'usual cause', file=sys.stderr)
    sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
