# SPDX-License-Identifier: Apache-2.0
"""Checks a dataset without writing: sizes, modes, labels, duplicates, and whether it can be trained on."""
import collections
import dataclasses
import hashlib

import numpy as np

from dnnlib.progress import progress
from dnnlib.resolution import untrainable_reason
from dnnlib.util import UserError
from training.datasets.convert import map_images, note_decoding, num_workers
from training.datasets.deep import FEW
from training.datasets.files import LABEL_FILE
from training.datasets.images import MAX_MEGAPIXELS, ImageError, Reading
from training.datasets.labels import label_array, read_labels
from training.datasets.ledger import Ledger, account
from training.datasets.source_image import SourceImage
from training.datasets.sources import FileSource
from training.datasets.transforms import Shape, shape_text

MAX_EXAMPLES = 5  # names per line; the rest is counted


@dataclasses.dataclass(frozen=True)
class Examined:
    """One image: shape [H, W, C], a hash and the range of its pixels, or why it cannot be read."""

    name: str
    shape: Shape | None = None
    digest: str | None = None
    low: int = 0
    high: int = 255
    num_frames: int = 1
    remark: str | None = None
    error: str | None = None


@dataclasses.dataclass
class DatasetReport:
    """Lines of the report; `problems` prevent training, `remarks` do not."""

    facts: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def lines(self) -> list[str]:
        """The full report, problems last."""
        return [*self.facts, *self.ledger.lines(), *(f'Note: {line}' for line in self.remarks),
                *(f'Problem: {line}' for line in self.problems)]


def examine_image(image: SourceImage) -> Examined:
    """Decode one image and hash its pixels, to find equal images in different files."""
    try:
        decoded = image.decode()
    except ImageError as error:
        return Examined(image.name, error=str(error))
    pixels = decoded.pixels
    colors = pixels[:, :, :pixels.shape[2] - (pixels.shape[2] in (2, 4))]
    # Includes the shape: 2x8 and 4x4 images may have the same bytes.
    digest = hashlib.sha256(f'{pixels.shape}'.encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return Examined(image.name, pixels.shape, digest.hexdigest(), int(colors.min()), int(colors.max()),
                    decoded.num_frames, decoded.remark)


def check_dataset(
    path: str, *, workers: int | None = None, max_megapixels: int = MAX_MEGAPIXELS,
) -> DatasetReport:
    """Read every image and label of a folder or zip and report on them; writes nothing.

    Raises UserError only if there is nothing to check (missing, damaged or empty).
    """
    # Labels are checked separately, so that an error there does not hide problems of images.
    source = FileSource(path, 'none', Reading(max_megapixels=max_megapixels))
    results = map_images(examine_image, source, num_workers(workers, len(source)))
    examined = list(progress(results, total=len(source), desc='Checking', unit='img'))
    readable = [image for image in examined if image.error is None]
    report = DatasetReport(facts=[f'{path}: {len(examined)} images'], ledger=account(source.files))
    note_decoding(readable, report.ledger, report.remarks)
    report.problems += [f'{image.name} {image.error}' for image in examined if image.error is not None]
    _check_shapes(readable, report)
    _check_range(readable, report)
    _check_duplicates(readable, report)
    _check_labels(source, report)
    return report


def _check_shapes(images: list[Examined], report: DatasetReport) -> None:
    names = collections.defaultdict(list)
    for image in images:
        names[image.shape].append(image.name)
    # The most frequent shape is assumed to be the intended one.
    by_size = sorted(names.items(), key=lambda item: len(item[1]), reverse=True)
    report.facts += [f'{len(group)} are {shape_text(shape)}' for shape, group in by_size]
    # All images must have the same shape before it matters whether that shape is trainable.
    if len(by_size) > 1:
        others = [name for _, group in by_size[1:] for name in group]
        report.problems.append(f'sizes or modes differ: {_examples(others)} from the rest; convert with '
                               'dataset_tool.py --transform=center-crop --width --height --mode')
        return
    for shape, _ in by_size:
        _check_trainable(shape, report)


def _check_trainable(shape: Shape, report: DatasetReport) -> None:
    reason = untrainable_reason(*shape[:2])
    if reason is not None:
        report.problems.append(f'{shape_text(shape)}: {reason}')
    elif shape[0] != shape[1] or shape[0] & (shape[0] - 1):
        report.remarks.append('not a square power of two: trainable here, but not with other implementations')


def _check_range(images: list[Examined], report: DatasetReport) -> None:
    if not images:
        return
    low, high = min(image.low for image in images), max(image.high for image in images)
    if high - low < FEW * 255:
        report.remarks.append(f'all values are from {low} to {high}, less than a quarter of 0 to 255; '
                              'dataset_tool.py --range=LOW,HIGH maps 16-bit and float data')


def _check_duplicates(images: list[Examined], report: DatasetReport) -> None:
    groups = collections.defaultdict(list)
    for image in images:
        groups[image.digest].append(image.name)
    copies = [group for group in groups.values() if len(group) > 1]
    if copies:
        pairs = [f'{group[0]} = {group[1]}' for group in copies]
        report.remarks.append(f'{sum(map(len, copies)) - len(copies)} exact duplicates: {_examples(pairs)}')


def _check_labels(source: FileSource, report: DatasetReport) -> None:
    origin = f'{source.files.path}: {LABEL_FILE}'
    try:
        found = read_labels(source.files)
        table = {} if found is None else found.table
        labels = None if found is None else label_array(source.files.names, table, origin)
    except UserError as error:
        report.problems.append(str(error))
        return
    if labels is None:
        report.facts.append('no labels')
        return
    if labels.ndim == 1:
        counts = collections.Counter(labels.tolist())  # int64 [N]: classes
        report.facts.append(f'{max(counts) + 1} classes, images per class: '
                            + ', '.join(f'{label}: {counts[label]}' for label in range(max(counts) + 1)))
        empty = [label for label in range(max(counts)) if not counts[label]]
        report.remarks += [f'class {label} has no image' for label in empty]
    else:
        report.facts.append(f'labels are vectors of {labels.shape[1]}')
    # Harmless, but often a sign of a renamed or missing folder.
    extra = sorted(set(table) - set(source.names))
    if extra:
        report.remarks.append(f'{len(extra)} labels have no image: {_examples(extra)}')


def _examples(names: list[str]) -> str:
    more = len(names) - MAX_EXAMPLES
    return ', '.join(names[:MAX_EXAMPLES]) + (f' and {more} more' if more > 0 else '')
