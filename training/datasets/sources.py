# SPDX-License-Identifier: Apache-2.0
"""Sources of dataset_tool: recognizes them, and reads folders and zips."""
import dataclasses
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from dnnlib.util import UserError, printable, read_regular
from training.datasets.archives import CIFAR_NAME, MNIST_SUFFIX, CifarSource, MnistSource
from training.datasets.deep import Extent
from training.datasets.files import DatasetPathError, ImageFiles
from training.datasets.images import (
    ImageError,
    ImageHeader,
    Reading,
    count_frames,
    iterate_frames,
    read_header,
)
from training.datasets.labels import (
    Labels,
    label_source,
    labels_from_csv,
    labels_from_folders,
    match_labels,
    read_labels,
)
from training.datasets.ledger import Ledger, account
from training.datasets.lsun import LmdbSource
from training.datasets.source_image import DatasetSource, Header, SourceImage

LABEL_MODES = ('auto', 'folders', 'none')
HEADER_BYTES = 256 << 10  # usually enough for the shape; else the whole file is read
ADVICE = ' (--range=LOW,HIGH for another)'


def open_source(path: str, labels: str = 'auto', reading: Reading | None = None) -> DatasetSource:
    """The source at a path, recognised as the published tool does.

    labels: 'auto' (dataset.json, or the archive's own), 'folders' (class = first folder), 'none', or the
    path of a CSV file.  reading: how images are decoded, default: any range. Raises UserError for a path that
    is missing or of unknown kind.
    """
    reading = reading or Reading('auto')
    if labels not in LABEL_MODES and not labels.lower().endswith('.csv'):
        raise UserError(f'--labels={labels}: expected {", ".join(LABEL_MODES)} or a .csv file')
    if not os.path.exists(path):
        raise UserError(f'--source={path}: no such file or folder')
    if os.path.isdir(path):
        # LSUN is recognized by its folder name alone.
        if path.rstrip('/\\').endswith('_lmdb'):
            return LmdbSource(path)
        return FileSource(path, labels, reading)
    if os.path.basename(path) == CIFAR_NAME:
        return CifarSource(path, labels)
    if path.endswith(MNIST_SUFFIX):
        return MnistSource(path, labels)
    if path.lower().endswith('.zip'):
        return FileSource(path, labels, reading)
    raise UserError(f'--source={path}: expected a folder, a .zip, {CIFAR_NAME}, train-{MNIST_SUFFIX} or a '
                    '*_lmdb folder')


class FileSource:
    """A folder, in the order of its paths compared part by part, or a zip, in the order of its names."""

    on_error = 'stop'

    def __init__(self, path: str, labels: str = 'auto', reading: Reading | None = None) -> None:
        self.reading = reading or Reading()
        self.files = ImageFiles(path, self.reading.max_megapixels)
        self.notes: list[str] = []
        self.label_mode = labels
        names = self.files.names
        # Two orders, as published: 'a/x' comes before 'a-b/x' in a folder and after it in a zip.
        self.names = names if self.files.is_zip else sorted(names, key=lambda name: PurePosixPath(name).parts)
        found = self._read_labels(labels) or Labels({})
        self.labels, self.class_names = found.table, found.class_names
        if self.class_names is not None:
            self.notes += [f'Class {i} = {printable(name)}' for i, name in enumerate(self.class_names)]
        self.num_frames: dict[str, int] = {}
        if self.reading.all_frames:
            self.num_frames = {name: self._count_frames(name) for name in self.names}
        self._deep_names: list[str] = []

    def ledger(self) -> Ledger:
        """What of the folder or zip is not used."""
        ledger = account(self.files)
        ledger.add_rows(self.labels, self.names)
        for name in self.files.label_tables() if self.label_mode != 'auto' else ():
            ledger.add('label table', f'--labels={self.label_mode} replaces it', name, is_loss=False)
        return ledger

    def _read_labels(self, labels: str) -> Labels | None:
        if labels == 'none':
            return None
        if labels == 'folders':
            return labels_from_folders(self.names, self.files.path)
        if labels != 'auto':
            return self._read_csv(labels)
        table = label_source(self.files)
        if table is not None and '/' in table:
            self.notes.append(f'Labels: {printable(table)}, relative to its folder')
        return read_labels(self.files)

    def _read_csv(self, path: str) -> Labels:
        origin = f'--labels={path}'
        try:
            labels = labels_from_csv(read_regular(path), origin)
        except OSError as error:
            raise UserError(f'{origin}: cannot be read ({error.strerror or error})') from error
        table = match_labels(self.names, labels.table, origin, self.files.raw_names)
        missing = [name for name in self.names if name not in table]
        if missing:
            raise UserError(f'{origin}: no row for {missing[0]} ({len(missing)} of {len(self.names)} '
                            'images have none); names are relative to --source')
        return Labels(table, labels.class_names)

    def _count_frames(self, name: str) -> int:
        try:
            return count_frames(self.files.read(name), self.reading)
        except (DatasetPathError, ImageError):  # reported when it is read
            return 1

    def __len__(self) -> int:
        return sum(self.num_frames.get(name, 1) for name in self.names)

    def __iter__(self) -> Iterator[SourceImage]:
        for name in self.names:
            yield from self._images(name)

    def _images(self, name: str) -> Iterator[SourceImage]:
        text, label = printable(name), self.labels.get(name)
        try:
            data = self.files.read(name)
            if self.num_frames.get(name, 1) == 1:
                yield SourceImage(text, label, data, reading=self.reading)
                return
            for frame, pixels in enumerate(iterate_frames(data, self.reading), start=1):
                yield SourceImage(f'{text} frame {frame}', label, pixels)
        except DatasetPathError as error:
            # Reported, not raised: the caller decides between stop and skip.
            yield SourceImage(text, None, None, error=self._reason(error, name))
        except ImageError as error:
            yield SourceImage(text, None, None, error=str(error))

    def headers(self) -> Iterator[Header]:
        """Of every image: reading headers is fast."""
        for name in self.names:
            try:
                header = self._read_header(name)
                if header.is_deep:
                    self._deep_names.append(name)
                result = header.shape
            except DatasetPathError as error:
                result = self._reason(error, name)
            except ImageError as error:
                result = str(error)
            yield from [(printable(name), result)] * self.num_frames.get(name, 1)

    def _reason(self, error: DatasetPathError, name: str) -> str:
        reason = str(error).removeprefix(f'{self.files.path}: {printable(name)}: ')
        return reason if reason.startswith('cannot') else f'cannot be read ({reason})'

    def _read_header(self, name: str) -> ImageHeader:
        start = self.files.read_start(name, HEADER_BYTES)
        try:
            return read_header(start, self.reading)
        except ImageError:
            if len(start) < HEADER_BYTES:
                raise
            return read_header(self.files.read(name), self.reading)

    def deep_images(self) -> list[str]:
        """Names of images with more than 8 bits per channel, known once `headers` was read."""
        return self._deep_names

    def read_images(self, names: list[str]) -> Iterator[SourceImage]:
        """The images of these names, undecoded and without their labels."""
        for name in names:
            try:
                yield SourceImage(printable(name), None, self.files.read(name), reading=self.reading)
            except DatasetPathError as error:
                yield SourceImage(printable(name), None, None, error=str(error))

    def settle_range(self, extent: Extent) -> None:
        """Decide how values of more than 8 bits become 0 to 255, from those that occur, and note it."""
        chosen = self.reading.value_range
        low, high = extent.automatic_range() if chosen in (None, 'auto') else chosen
        self.reading = dataclasses.replace(self.reading, value_range=(low, high))
        self.notes.append(f'{len(self._deep_names)} images have more than 8 bits per channel, with values '
                          f'{extent.low:g} to {extent.high:g}: {low:g} to {high:g} becomes 0 to 255{ADVICE}')
