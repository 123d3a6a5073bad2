# SPDX-License-Identifier: Apache-2.0
"""The work of dataset_tool: read a source, transform every picture, write the canonical layout."""
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dnnlib.progress import progress
from dnnlib.util import UserError
from training.datasets.files import LABEL_FILE
from training.datasets.images import DECODE_ERRORS, ImageError, encode_png
from training.datasets.labels import Label, LabelError, label_array
from training.datasets.sources import Source, SourceImage
from training.datasets.transforms import Shape, ShapeRule, TransformSettings
from training.datasets.writer import Write, check_dest, dataset_writer

BATCH_IMAGES = 32
BATCH_BYTES = 4 << 20
SERIAL_BELOW = 256  # images; starting processes takes longer than so few
Result = TypeVar('Result')


def archive_name(index: int) -> str:
    """The canonical name of picture `index`: a thousand pictures a folder."""
    digits = f'{index:08d}'
    return f'{digits[:5]}/img{digits}.png'


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


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """A picture ready to be written: PNG bytes and shape. png None: too small, dropped. error: unreadable."""

    name: str
    label: Label | None
    png: bytes | None = None
    shape: Shape | None = None
    error: str | None = None
    is_stretched: bool = False


@dataclasses.dataclass
class Summary:
    """What a conversion did. Numbers of pictures; `unreadable` holds a line for each that was skipped."""

    num_written: int = 0
    num_dropped: int = 0
    num_stretched: int = 0
    num_unlabelled: int = 0
    label_problem: str | None = None
    unreadable: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """The summary in words: what was written, then what the user should know."""
        lines = [f'Wrote {self.num_written} pictures.']
        if self.num_dropped:
            lines.append(f'Dropped {self.num_dropped} that are smaller than the output; numbering keeps gaps '
                         'for them.')
        if self.num_stretched:
            lines.append(f'Resizing changed the proportions of {self.num_stretched}; --transform=center-crop '
                         'keeps them.')
        if 0 < self.num_unlabelled < self.num_written:
            lines.append(f'No labels written: {self.num_unlabelled} pictures have none.')
        if self.label_problem is not None:
            lines.append('Warning: the labels were copied, but --cond=1 will refuse them: '
                         f'{self.label_problem}')
        if self.unreadable:
            lines.append(f'Skipped {len(self.unreadable)} unreadable:')
        return lines + [f'  {line}' for line in self.unreadable]


def prepare_image(settings: TransformSettings, image: SourceImage) -> PreparedImage:
    """Decode, transform and encode one picture; what cannot be read becomes an `error`."""
    try:
        source_pixels = image.decode()
        pixels = settings.apply(source_pixels)
    except ImageError as error:
        return PreparedImage(image.name, image.label, error=str(error))
    # Resizing, too, fails on odd input, such as a picture of no height.
    except DECODE_ERRORS as error:
        return PreparedImage(image.name, image.label, error=f'cannot be transformed ({error})')
    if pixels is None:
        return PreparedImage(image.name, image.label)
    return PreparedImage(image.name, image.label, encode_png(pixels), pixels.shape,
                         is_stretched=settings.is_stretching(source_pixels.shape))


def convert_dataset(
    source: Source, dest: str, settings: TransformSettings, *, max_images: int | None = None,
    any_shape: bool = False, on_error: str | None = None, workers: int | None = None,
) -> Summary:
    """Write the pictures of `source` to `dest`, a folder or zip that appears only when complete.

    on_error: 'stop' or 'skip' at unreadable pictures, None as the source prefers. workers: processes, None
    for one a CPU. The output does not depend on `workers`. Raises UserError for anything that does not fit.
    """
    total = len(source) if max_images is None else min(max_images, len(source))
    # Cheap refusals first: nothing is read or written before them.
    on_error = on_error or source.on_error
    check_dest(dest)
    _check_headers(source, settings, total, ShapeRule(any_shape=any_shape), on_error)
    with dataset_writer(dest) as write:
        # A rule of its own: headers may lie, the pixels decide.
        conversion = _Conversion(write, ShapeRule(any_shape=any_shape), on_error)
        results = map_images(functools.partial(prepare_image, settings), source, num_workers(workers, total))
        # Closing stops the workers at once when a picture is refused or enough are written.
        with contextlib.closing(results), progress(total=total, desc='Converting', unit='img') as bar:
            for prepared in results:
                conversion.add(prepared)
                bar.update(1)
                if conversion.num_delivered == max_images:
                    break
        conversion.finish()
    return conversion.summary


def _check_headers(
    source: Source, settings: TransformSettings, total: int, rule: ShapeRule, on_error: str,
) -> None:
    """Find a picture that does not fit before hours of work rather than after."""
    headers = (header for header in source.headers() if on_error == 'stop' or not isinstance(header[1], str))
    for name, shape in progress(itertools.islice(headers, total), total=total, desc='Checking', unit='img'):
        if isinstance(shape, str):
            raise _unreadable(name, shape)
        output_shape = settings.output_shape(shape)
        if output_shape is not None:
            rule.check(name, output_shape)


def _unreadable(name: str, error: str) -> UserError:
    return UserError(f'{name} {error}; remove it, or leave it out with --on-error=skip')


class _Conversion:
    """Checks, numbers and writes prepared pictures one by one.

    A picture's number counts all that could be read, so those that are dropped leave gaps (as published).
    """

    def __init__(self, write: Write, rule: ShapeRule, on_error: str) -> None:
        self.write, self.rule, self.on_error = write, rule, on_error
        self.num_delivered = 0
        self.labels: list[tuple[str, Label | None]] = []
        self.summary = Summary()

    def add(self, prepared: PreparedImage) -> None:
        if prepared.error is not None:
            self._add_unreadable(prepared)
            return
        if prepared.png is None:
            self.summary.num_dropped += 1
        else:
            self._write_image(prepared)
        self.num_delivered += 1  # also for dropped ones: they leave a gap

    def _add_unreadable(self, prepared: PreparedImage) -> None:
        if self.on_error == 'stop':
            raise _unreadable(prepared.name, prepared.error)
        self.summary.unreadable.append(f'{prepared.name} {prepared.error}')

    def _write_image(self, prepared: PreparedImage) -> None:
        self.rule.check(prepared.name, prepared.shape)
        name = archive_name(self.num_delivered)  # not num_written, see above
        self.write(name, prepared.png)
        self.labels.append((name, prepared.label))
        self.summary.num_written += 1
        self.summary.num_stretched += prepared.is_stretched
        self.summary.num_unlabelled += prepared.label is None

    def finish(self) -> None:
        if not self.labels:
            raise UserError(f'nothing to write: {self.summary.num_dropped} pictures are too small and '
                            f'{len(self.summary.unreadable)} unreadable')
        # Half-labelled data would fail at training; as published, it becomes unlabelled.
        labels = None if self.summary.num_unlabelled else self.labels
        if labels is not None:
            try:
                label_array([name for name, _ in labels], dict(labels), LABEL_FILE)
            except LabelError as error:
                self.summary.label_problem = str(error)
        self.write(LABEL_FILE, json.dumps({'labels': labels}).encode())
