# SPDX-License-Identifier: Apache-2.0
"""Endless batches of training images from any position of the stream, from memory or by workers."""
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib.progress import progress, write
from dnnlib.util import UserError
from torch_utils.host_draws import to_device
from training.dataset import Dataset, SeekableSampler

GPU_SHARE = 0.1  # of a GPU's memory that cache='auto' may take,
FREE_SHARE = 0.5  # and of what is free of it
CHUNK = 1024  # images moved at once
Pair = tuple[torch.Tensor, torch.Tensor]


def fits_on_gpu(num_bytes: int, free: int, total: int) -> bool:
    """Whether a decoded dataset is small compared to the memory of a GPU, all in bytes."""
    return num_bytes <= min(GPU_SHARE * total, FREE_SHARE * free)


class Upload:
    """Copies batches to the device. On a GPU, copies run on a separate stream, from pinned memory, and
    overlap earlier work; only kernels that need the batch wait for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The same tensors on the device."""
        if self._stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            moved = [to_device(tensor, self.device) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(current)
        return moved


class ResidentImages:
    """All images of a preloaded dataset in the memory of a device.

    pixels: uint8 [number of raw images, C, H, W].  Raises torch.OutOfMemoryError if they do not fit.
    """

    def __init__(self, dataset: Dataset, device: torch.device, show_progress: bool = True):
        self.dataset, self.device = dataset, device
        source = dataset.decoded()
        self.pixels = torch.empty(source.shape, dtype=torch.uint8, device=device)
        with progress(total=len(source), desc='To the GPU', unit='img', show=show_progress) as bar:
            for start in range(0, len(source), CHUNK):
                part = torch.from_numpy(source[start:start + CHUNK])
                self.pixels[start:start + CHUNK].copy_(part)
                bar.update(len(part))

    def batches(self, order: Iterator[int], size: int) -> Iterator[Pair]:
        """(pixels uint8 [size, C, H, W], labels [size, c_dim]) of the items in this order, on the device."""
        while True:
            items = np.fromiter(itertools.islice(order, size), dtype=np.int64, count=size)
            rows, is_mirrored = (to_device(torch.from_numpy(array), self.device)
                                 for array in self.dataset.rows_of(items))
            pixels = self.pixels.index_select(0, rows)
            labels = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in items]))
            yield (torch.where(is_mirrored[:, None, None, None], pixels.flip(3), pixels),
                   to_device(labels, self.device))


RAM_SHARE = 0.25  # of the machine's memory that cache='auto' may take
FULL_SHARE = 0.9  # of what is free on a GPU that cache='gpu' may take
MAX_RESTARTS = 3  # of the workers within RESTART_BATCHES: beyond, the cause is permanent
RESTART_BATCHES = 1000
STALL_SEC = 300  # without a batch: workers are stopped, or wait for a disk that does not answer


def fits_in_ram(num_bytes: int) -> bool:
    """Whether a decoded dataset of this size is small compared to the memory of the machine."""
    try:
        total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):  # not a POSIX system: only what is small anywhere
        total = 2 ** 31
    return num_bytes <= RAM_SHARE * total


def _decided(cache: str, num_bytes: int, device: torch.device) -> str:
    """'off', 'ram' or 'gpu'. Raises UserError if --cache=gpu is impossible."""
    if cache == 'gpu' and device.type != 'cuda':
        raise UserError(f'--cache=gpu: the device is {device.type}; use --cache=ram')
    if device.type == 'cuda' and cache in ('auto', 'gpu'):
        free, total = torch.cuda.mem_get_info(device)
        if cache == 'gpu' and num_bytes > FULL_SHARE * free:
            raise UserError(f'--cache=gpu: the decoded images take {num_bytes / 2 ** 30:.1f} GiB, but only '
                            f'{free / 2 ** 30:.1f} GiB of the GPU are free; use --cache=auto')
        if cache == 'gpu' or (fits_on_gpu(num_bytes, free, total) and fits_in_ram(num_bytes)):
            return 'gpu'
    if cache == 'auto':
        return 'ram' if fits_in_ram(num_bytes) else 'off'
    return cache


@dataclass(frozen=True)
class Unreadable:
    """Replaces an image or batch that a worker could not read.  reason: one line."""

    reason: str


class Batches:
    """Real images and labels for one process, as float32 in [-1, 1] on `device`.

    Iterating yields (img [batch, C, H, W], c [batch, c_dim]); the item at a position of the stream
    depends only on (seed, position).  batch: images of this process in each step.  cache: where decoded
    images stay: 'ram', 'gpu' (in the memory of `device`), 'off' or 'auto'.
    """

    def __init__(  # noqa: PLR0913 (the layout of a run)
        self, dataset: Dataset, batch: int, device: torch.device, *, start: int = 0, seed: int = 0,
        rank: int = 0, num_replicas: int = 1, cache: str = 'auto', num_workers: int = 0,
    ):
        self.dataset, self.batch, self.device, self.num_workers = dataset, batch, device, num_workers
        self.start, self.num_replicas = start, num_replicas
        self._order = {'size': len(dataset), 'seed': seed, 'rank': rank, 'num_replicas': num_replicas}
        cache = _decided(cache, dataset.num_bytes, device)
        self.in_ram = cache != 'off'
        if self.in_ram:
            dataset.preload(show_progress=rank == 0)
        self.resident = ResidentImages(dataset, device, show_progress=rank == 0) if cache == 'gpu' else None

    def __iter__(self) -> Iterator[Pair]:
        for pixels, labels in self._uploaded() if self.resident is None else self._resident():
            yield pixels.to(torch.float32) / 127.5 - 1, labels

    def _uploaded(self) -> Iterator[Pair]:
        upload = Upload(self.device)
        for pixels, labels in self._from_ram() if self.in_ram else self._from_files():
            yield tuple(upload(pixels, labels))

    def _resident(self) -> Iterator[Pair]:
        return self.resident.batches(iter(SeekableSampler(**self._order, start=self.start)), self.batch)

    def _from_ram(self) -> Iterator[Pair]:
        order = iter(SeekableSampler(**self._order, start=self.start))
        while True:
            pixels, labels = zip(*[self.dataset[next(order)] for _ in range(self.batch)], strict=True)
            yield torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels))

    def _from_files(self) -> Iterator[Pair]:
        """Batches from this process or its workers, which are restarted if one dies."""
        position, restarts = self.start, []
        while True:
            try:
                for item in self._load(position):
                    yield _readable(item)
                    position += self.batch * self.num_replicas
            except (RuntimeError, OSError, EOFError) as error:
                restarts = [p for p in restarts if position - p < RESTART_BATCHES * self.batch]
                self._explain_restart(error, len(restarts))
                restarts.append(position)

    def _explain_restart(self, error: Exception, num_restarts: int) -> None:
        """Report that workers died. Raises other errors again, and UserError if workers die too often."""
        cause = _death_of_worker(error) if self.num_workers else None
        if cause is None:
            raise error
        if num_restarts >= MAX_RESTARTS:
            raise UserError(f'--workers={self.num_workers}: workers die repeatedly ({cause}), usually for '
                            'lack of memory; use --workers=0 or --cache=off') from error
        write(f'A data loader process died ({cause}) and is being restarted.')

    def _load(self, position: int) -> Iterator[Pair | Unreadable]:
        workers = {'num_workers': self.num_workers, 'prefetch_factor': 2} if self.num_workers else {}
        batches = iter(torch.utils.data.DataLoader(
            _Reading(self.dataset), sampler=SeekableSampler(**self._order, start=position),
            batch_size=self.batch, collate_fn=_collate, pin_memory=self.device.type == 'cuda', **workers))
        _ignore_deaths_meanwhile()
        return _killed_if_stalled(batches) if workers else batches


class _Reading(torch.utils.data.Dataset):
    """A dataset that returns errors as values, since exceptions of workers arrive with long tracebacks."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray] | Unreadable:
        try:
            return self.dataset[idx]
        except (UserError, OSError) as error:
            return Unreadable(' '.join(str(error).split()))


def _collate(items: list) -> Pair | Unreadable:
    for item in items:
        if isinstance(item, Unreadable):
            return item
    return torch.utils.data.default_collate(items)


def _readable(item: Pair | Unreadable) -> Pair:
    """The batch. Raises UserError with the reason if it is unreadable."""
    if isinstance(item, Unreadable):
        raise UserError(f'--data: {item.reason}')
    return item


def _killed_if_stalled(batches: Iterator[Pair | Unreadable]) -> Iterator[Pair | Unreadable]:
    """The batches of workers that are killed, which the next batch reports, if they send none for STALL_SEC.

    A limit of the loader itself ends no wait for a stopped worker that holds the memory of a sent batch.
    """
    def kill() -> None:
        write(f'Data loader processes sent nothing for {STALL_SEC:g} seconds (stopped, or waiting for a disk '
              'that does not answer) and are killed.')
        for worker in batches._workers:
            worker.kill()

    while True:
        timer = threading.Timer(STALL_SEC, kill)
        timer.daemon = True
        timer.start()
        try:
            batch = next(batches)
        finally:
            timer.cancel()
        yield batch


def _ignore_deaths_meanwhile() -> None:
    """Make dead workers raise only when the next batch is taken.

    PyTorch's signal handler would raise anywhere, for example in the middle of an optimizer step.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, '__module__', '').startswith('torch.utils.data'):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _death_of_worker(error: Exception) -> str | None:
    """PyTorch's message about a dead worker; None for other errors."""
    text = ' '.join(str(error).split()).rstrip('.')
    if not isinstance(error, RuntimeError):
        # It died while sending a batch; file errors arrive as values.
        return text or type(error).__name__
    return text if text.startswith('DataLoader worker (pid') else None


def draw_labels(dataset: Dataset, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Labels of uniformly random items [count, c_dim] float32: the labels of generated images."""
    if dataset.label_dim == 0:
        return torch.zeros([count, 0])
    return torch.from_numpy(
        np.stack([dataset.get_label(int(i)) for i in rng.integers(len(dataset), size=count)]))


Batch = tuple[torch.Tensor, torch.Tensor]
AHEAD = 2  # the stop decision of Interrupt lags two iterations behind


class Lookahead:
    """Prefetches up to `ahead` batches of an iterator, so that its end is known before it is reached.

    error: why the iterator ended, None as long as there are batches.
    """

    def __init__(self, batches: Iterator[Batch], ahead: int = 0) -> None:
        self._batches, self._ahead = batches, ahead
        self._waiting: deque[Batch] = deque()
        self.error: UserError | None = None

    def take(self) -> Batch:
        """The next batch. Raises the iterator's UserError once there is none left."""
        while self.error is None and len(self._waiting) <= self._ahead:
            try:
                self._waiting.append(next(self._batches))
            except UserError as error:
                self.error = error
        if not self._waiting:
            raise self.error
        return self._waiting.popleft()
