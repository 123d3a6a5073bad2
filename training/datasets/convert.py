# SPDX-License-Identifier: Apache-2.0
"""Converts a source to a dataset: reads and transforms every image, writes the canonical layout."""
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
from typing import Any, TypeVar

from dnnlib.progress import progress
from dnnlib.util import UserError
from training.datasets.color import UNUSABLE
from training.datasets.deep import Extent
from training.datasets.files import LABEL_FILE
from training.datasets.images import DECODE_ERRORS, ImageError, encode_png, measure
from training.datasets.labels import CLASS_NAMES, Label, LabelError, label_array
from training.datasets.ledger import Ledger
from training.datasets.source_image import DatasetSource, SourceImage
from training.datasets.sources import FileSource
from training.datasets.transforms import Shape, ShapeRule, TransformSettings
from training.datasets.writer import Write, check_dest, dataset_writer

BATCH_IMAGES = 32
BATCH_BYTES = 4 << 20
WORKER_TIMEOUT_SEC = 900  # for BATCH_IMAGES images
SERIAL_BELOW = 256  # images; below this, starting processes takes longer than the work
Result = TypeVar('Result')


def archive_name(index: int) -> str:
    """The canonical name of image `index`: a thousand images per folder."""
    digits = f'{index:08d}'
    return f'{digits[:5]}/img{digits}.png'


def num_workers(requested: int | None, num_images: int) -> int:
    """Number of worker processes: as requested (0: none), else one per CPU, or none for few images."""
    if requested is not None:
        return requested
    if num_images < SERIAL_BELOW:
        return 0
    # The CPUs available to this process, which in a container may be fewer than the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def map_images(
    function: Callable[[SourceImage], Result], images: Iterable[SourceImage], workers: int,
) -> Iterator[Result]:
    """function(image) for every image, in order, computed in `workers` processes (0: in this one).

    Reads at most a few batches ahead. Raises exceptions of `function`, and UserError if a worker is killed.
    """
    if workers == 0:
        yield from map(function, images)
        return
    # Spawned, not forked: works on every system, and is safe with threads.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'))
    try:
        pending: collections.deque[concurrent.futures.Future[list[Result]]] = collections.deque()
        for batch in _batches(images):
            # Send whole batches: for small images the transfer costs more than the work.
            pending.append(pool.submit(_map_batch, function, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result(WORKER_TIMEOUT_SEC)
        while pending:
            yield from pending.popleft().result(WORKER_TIMEOUT_SEC)
    except concurrent.futures.TimeoutError as error:
        # The end of the pool would wait for a stopped process.
        for process in multiprocessing.active_children():
            process.kill()
        raise UserError(f'a worker process has not answered for {WORKER_TIMEOUT_SEC} s; try '
                        '--workers=0') from error
    except BrokenProcessPool as error:
        raise UserError('a worker process was killed, perhaps out of memory; try '
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
    """An image ready to be written, as PNG bytes. png None: dropped as too small. error: unreadable."""

    name: str
    label: Label | None
    png: bytes | None = None
    shape: Shape | None = None
    error: str | None = None
    is_enlarged: bool = False
    is_stretched: bool = False
    num_frames: int = 1
    remark: str | None = None


@dataclasses.dataclass
class Summary:
    """Result of a conversion: numbers of images; `unreadable` has a line per skipped image.

    first_enlarged, first_unlabelled: names of images. ledger: what of the source was not used. remarks: on
    decoding.
    """

    num_written: int = 0
    num_dropped: int = 0
    num_enlarged: int = 0
    first_enlarged: str = ''
    num_stretched: int = 0
    num_unlabelled: int = 0
    first_unlabelled: str = ''
    label_problem: str | None = None
    unreadable: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def lines(self) -> list[str]:
        """The summary as text: what was written, then notes and warnings."""
        lines = [f'Wrote {self.num_written} images.']
        if self.num_dropped:
            lines.append(f'Dropped {self.num_dropped} that are smaller than the output; numbering keeps gaps '
                         'for them.')
        if self.num_enlarged:
            lines.append(f'Enlarged {self.num_enlarged} that are smaller than the output, which blurs them '
                         f'(first: {self.first_enlarged}).')
        if self.num_stretched:
            lines.append(f'Resizing changed the proportions of {self.num_stretched}; --transform=center-crop '
                         'keeps them.')
        if 0 < self.num_unlabelled < self.num_written:
            lines.append(f'No labels written: {self.num_unlabelled} images have none, the first is '
                         f'{self.first_unlabelled}.')
        if self.label_problem is not None:
            lines.append('Warning: the labels were copied, but --cond=1 will refuse them: '
                         f'{self.label_problem}')
        lines += [*self.ledger.lines(), *self.remarks]
        if self.unreadable:
            lines.append(f'Skipped {len(self.unreadable)} unreadable:')
        return lines + [f'  {line}' for line in self.unreadable]


def prepare_image(settings: TransformSettings, image: SourceImage) -> PreparedImage:
    """Decode, transform and encode one image; a failure is returned as `error`."""
    try:
        decoded = image.decode()
        pixels = settings.apply(decoded.pixels)
    except ImageError as error:
        return PreparedImage(image.name, image.label, error=str(error))
    # Resizing can fail, too, for example on an image of height 0.
    except DECODE_ERRORS as error:
        return PreparedImage(image.name, image.label, error=f'cannot be transformed ({error})')
    if pixels is None:
        return PreparedImage(image.name, image.label)
    return PreparedImage(image.name, image.label, encode_png(pixels), pixels.shape,
                         is_enlarged=settings.is_enlarging(decoded.pixels.shape),
                         is_stretched=settings.is_stretching(decoded.pixels.shape),
                         num_frames=decoded.num_frames, remark=decoded.remark)


def convert_dataset(
    source: DatasetSource, dest: str, settings: TransformSettings, *, max_images: int | None = None,
    any_shape: bool = False, on_error: str | None = None, workers: int | None = None, strict: bool = False,
) -> Summary:
    """Write the images of `source` to `dest`, a folder or zip that appears only when complete.

    on_error: 'stop' or 'skip' at unreadable images, None: the default of the source. workers:
    processes, None: one per CPU. The output does not depend on `workers`. strict: refuse a source of which
    something is not used. Raises UserError for invalid input.
    """
    total = len(source) if max_images is None else min(max_images, len(source))
    # Cheap checks first, before anything is read or written.
    on_error = on_error or source.on_error
    check_dest(dest)
    ledger = source.ledger() if isinstance(source, FileSource) else Ledger()
    ledger.check(strict=strict)
    _check_headers(source, settings, total, ShapeRule(any_shape=any_shape), on_error)
    if isinstance(source, FileSource) and source.deep_images():
        _settle_range(source, on_error, workers)
    with dataset_writer(dest) as write:
        # A new rule, checked on decoded pixels: headers may be wrong.
        conversion = _Conversion(write, ShapeRule(any_shape=any_shape), on_error, ledger)
        results = map_images(functools.partial(prepare_image, settings), source, num_workers(workers, total))
        # Closing stops the workers immediately on an error or once max_images is reached.
        with contextlib.closing(results), progress(total=total, desc='Converting', unit='img') as bar:
            for prepared in results:
                conversion.add(prepared)
                bar.update(1)
                if conversion.num_delivered == max_images:
                    break
        conversion.finish(source.class_names, strict=strict)
    return conversion.summary


def _check_headers(
    source: DatasetSource, settings: TransformSettings, total: int, rule: ShapeRule, on_error: str,
) -> None:
    """Find images that do not fit before the conversion, not hours into it."""
    headers = (header for header in source.headers() if on_error == 'stop' or not isinstance(header[1], str))
    for name, shape in progress(itertools.islice(headers, total), total=total, desc='Checking', unit='img'):
        if isinstance(shape, str):
            raise _unreadable(name, shape)
        output_shape = settings.output_shape(shape)
        if output_shape is not None:
            rule.check(name, output_shape)


def _measure(image: SourceImage) -> Extent | str | None:
    try:
        return measure(image.data, image.reading) if image.error is None else image.error
    except ImageError as error:
        return str(error)


def _settle_range(source: FileSource, on_error: str, workers: int | None) -> None:
    """Find the values of all images with more than 8 bits, so that all are mapped alike."""
    names = source.deep_images()
    results = map_images(_measure, source.read_images(names), num_workers(workers, len(names)))
    results = progress(results, total=len(names), desc='Measuring', unit='img')
    extents = []
    for name, found in zip(names, results, strict=True):
        if isinstance(found, str) and on_error == 'stop':
            raise _unreadable(name, found)
        if isinstance(found, Extent):
            extents.append(found)
    if extents:
        source.settle_range(Extent.union(extents))


def note_decoding(images: Iterable[Any], ledger: Ledger, remarks: list[str]) -> None:
    """Enter in the ledger, or append as lines to `remarks`, what decoding left out or changed.

    images: with the attributes name, num_frames and remark.
    """
    changed: dict[str, list[str]] = collections.defaultdict(list)
    for image in images:
        ledger.add_frames(image.name, image.num_frames)
        if image.remark == UNUSABLE:
            ledger.add('color profiles', 'damaged, or made for other pixels', image.name)
        elif image.remark is not None:
            changed[image.remark].append(image.name)
    remarks += [f'{len(names)} images: {remark} (first: {names[0]})' for remark, names in changed.items()]


def _unreadable(name: str, error: str) -> UserError:
    return UserError(f'{name} {error}; remove it, or skip it with --on-error=skip')


class _Conversion:
    """Checks, numbers and writes prepared images one by one.

    Images are numbered by all readable ones, so dropped images leave gaps (as published).
    """

    def __init__(self, write: Write, rule: ShapeRule, on_error: str, ledger: Ledger) -> None:
        self.write, self.rule, self.on_error = write, rule, on_error
        self.num_delivered = 0
        self.labels: list[tuple[str, Label | None]] = []
        self.summary = Summary(ledger=ledger)
        self.decoded: list[PreparedImage] = []

    def add(self, prepared: PreparedImage) -> None:
        if prepared.error is not None:
            self._add_unreadable(prepared)
            return
        if prepared.png is None:
            self.summary.num_dropped += 1
        else:
            self._write_image(prepared)
        self.num_delivered += 1  # also for dropped images, which leave gaps

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
        if prepared.is_enlarged:
            self.summary.first_enlarged = self.summary.first_enlarged or prepared.name
            self.summary.num_enlarged += 1
        if prepared.label is None:
            self.summary.first_unlabelled = self.summary.first_unlabelled or prepared.name
            self.summary.num_unlabelled += 1
        if prepared.num_frames > 1 or prepared.remark is not None:
            self.decoded.append(dataclasses.replace(prepared, png=None))

    def finish(self, class_names: tuple[str, ...] | None, *, strict: bool) -> None:
        """Write the labels. Raises UserError if there is no image or, if `strict`, something was not used."""
        if not self.labels:
            raise UserError(f'nothing to write: {self.summary.num_dropped} images are too small and '
                            f'{len(self.summary.unreadable)} unreadable')
        note_decoding(self.decoded, self.summary.ledger, self.summary.remarks)
        for line in self.summary.unreadable if strict else ():
            self.summary.ledger.add('unreadable images', '', line)
        if strict and 0 < self.summary.num_unlabelled < len(self.labels):
            self.summary.ledger.add('labels', f'{self.summary.num_unlabelled} images have none',
                                    self.summary.first_unlabelled)
        self.summary.ledger.check(strict=strict)
        # Partly labelled data would fail in training; as published, it becomes unlabelled.
        labels = None if self.summary.num_unlabelled else self.labels
        if labels is not None:
            try:
                label_array([name for name, _ in labels], dict(labels), LABEL_FILE)
            except LabelError as error:
                self.summary.label_problem = str(error)
        names = {} if labels is None or class_names is None else {CLASS_NAMES: list(class_names)}
        self.write(LABEL_FILE, json.dumps({'labels': labels, **names}).encode())
