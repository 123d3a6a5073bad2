# SPDX-License-Identifier: Apache-2.0
"""Map a function over many pictures in worker processes, in order, with bounded memory."""
import collections
import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dnnlib.util import UserError
from training.datasets.sources import SourceImage

BATCH_IMAGES = 32
BATCH_BYTES = 4 << 20
SERIAL_BELOW = 256  # pictures; starting processes takes longer than so few
Result = TypeVar('Result')


def num_workers(requested: int | None, num_images: int) -> int:
    """How many processes to use: as requested (0: none), else one a CPU, or none for few pictures."""
    if requested is not None:
        return requested
    if num_images < SERIAL_BELOW:
        return 0
    # In a container this is what the process may use, not what the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def map_images(
    function: Callable[[SourceImage], Result], images: Iterable[SourceImage], workers: int,
) -> Iterator[Result]:
    """function(image) for every image, in order, computed in `workers` processes (0: in this one).

    Reads at most a few batches ahead. Raises what `function` raises, and UserError if a process is killed.
    """
    if workers == 0:
        yield from map(function, images)
        return
    # Spawned, not forked: the same on every system, and safe in a program that has threads.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'))
    try:
        pending: collections.deque[concurrent.futures.Future[list[Result]]] = collections.deque()
        for batch in _batches(images):
            # Whole batches travel: for small pictures the journey costs more than the work.
            pending.append(pool.submit(_map_batch, function, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError('a worker process was killed, perhaps for want of memory; try '
                        f'--workers={workers // 2}') from error
    finally:
        pool.shutdown(cancel_futures=True)


def _map_batch(function: Callable[[SourceImage], Result], batch: list[SourceImage]) -> list[Result]:
    return [function(image) for image in batch]


def _batches(images: Iterable[SourceImage]) -> Iterator[list[SourceImage]]:
    batch: list[SourceImage] = []
    num_bytes = 0
    for image in images:
        batch.append(image)
        num_bytes += 0 if image.data is None else memoryview(image.data).nbytes
        if len(batch) == BATCH_IMAGES or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


