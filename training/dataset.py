# SPDX-License-Identifier: Apache-2.0
"""Image datasets with optional labels, and the order in which training reads them."""
import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.progress import progress
from dnnlib.util import EasyDict, UserError, find_bundled
from training.datasets.files import LABEL_FILE, DatasetPathError, ImageFiles
from training.datasets.images import ImageError, decode_image
from training.datasets.labels import label_array, read_labels
from training.datasets.ledger import Ledger, account

DATA_FOLDER = Path(__file__).resolve().parent / 'datasets'
SUBSET_SUFFIX = '.json'  # of a bundled file {"dataset": zip beside it, "class": number of a class}
MAX_DECODE_THREADS = 16
PRELOAD_CHUNK = 64  # images per task


def find_dataset(name_or_path: str) -> str:
    """The path of a bundled dataset ('emoji32', 'smileys'); anything else is returned unchanged."""
    return find_bundled(name_or_path, DATA_FOLDER, ('.zip', SUBSET_SUFFIX))


def _open_files(path: str) -> tuple[ImageFiles, bool]:
    """The images of a folder or zip; whether they are one class of a bundled zip, named by a bundled file."""
    if Path(path).parent != DATA_FOLDER or not path.endswith(SUBSET_SUFFIX):
        return ImageFiles(path), False
    subset = json.loads(Path(path).read_text(encoding='utf-8'))
    whole = ImageFolderDataset(str(DATA_FOLDER / subset['dataset']), use_labels=True)
    files = whole._files
    files.names = [name for i, name in enumerate(files.names)
                   if whole.get_details(i).raw_label == subset['class']]
    return files, True


class Dataset(torch.utils.data.Dataset):
    """Images uint8 [C, H, W] with labels: subset, mirroring, label layout. Subclasses read the files.

    raw_shape: [N, C, H, W] of all images. max_size: use a random subset of this size, in the original order.
    use_labels: if False, every label is a vector of length 0. xflip: append the mirrored copy of each image.
    A subclass defines `_load_raw_image(raw_idx)` -> uint8 [C, H, W]; `_load_raw_labels()` -> int64 [N]
    classes >= 0, float32 [N, ...] or None; and, if it keeps files open, `close()`.
    """

    def __init__(
        self, name: str, raw_shape: list[int], max_size: int | None = None, use_labels: bool = False,
        xflip: bool = False, random_seed: int = 0,
    ) -> None:
        if max_size is not None and max_size < 0:
            raise UserError(f'max_size={max_size} must not be negative')
        self._name = name
        self._raw_shape = [int(size) for size in raw_shape]
        self._use_labels = use_labels
        self._raw_labels: np.ndarray | None = None
        self._ram: np.ndarray | None = None
        self._raw_idx = _draw_subset(self._raw_shape[0], max_size, random_seed)
        self._xflip = np.zeros(len(self._raw_idx), dtype=np.uint8)
        if xflip:
            # Item i + n is item i mirrored, as published: the second half repeats the first.
            self._xflip = np.concatenate([self._xflip, np.ones_like(self._xflip)])
            self._raw_idx = np.tile(self._raw_idx, 2)

    def _load_raw_image(self, raw_idx: int) -> np.ndarray:
        raise NotImplementedError(f'{type(self).__name__} must define _load_raw_image')

    def _load_raw_labels(self) -> np.ndarray | None:
        raise NotImplementedError(f'{type(self).__name__} must define _load_raw_labels')

    def _describe(self, raw_idx: int) -> str:
        """The name of an image in messages."""
        return f'{self._name}: image {raw_idx}'

    def close(self) -> None:
        """Close open files; a subclass may open them again on the next read."""

    def _get_raw_labels(self) -> np.ndarray:
        if self._raw_labels is None:
            labels = self._load_raw_labels() if self._use_labels else None
            # An empty vector per image lets all callers treat unlabelled data alike.
            if labels is None:
                labels = np.zeros([self._raw_shape[0], 0], dtype=np.float32)
            self._raw_labels = _checked_labels(labels, self._raw_shape[0], self._name)
        return self._raw_labels

    def _get_raw_image(self, raw_idx: int) -> np.ndarray:
        image = self._load_raw_image(raw_idx)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            raise UserError(f'{self._describe(raw_idx)} must be a uint8 array, got {type(image).__name__} '
                            f'{getattr(image, "dtype", "")}')
        if list(image.shape) != self.image_shape:
            raise UserError(f'{self._describe(raw_idx)} is {_shape_text(image.shape)}, but the first image '
                            f'is {_shape_text(self.image_shape)}; make all alike with dataset_tool.py')
        return image

    @property
    def num_bytes(self) -> int:
        """Bytes needed by `preload`: the raw images of the subset, mirrored copies not counted."""
        return len(np.unique(self._raw_idx)) * int(np.prod(self.image_shape))

    def preload(self, show_progress: bool = True) -> None:
        """Decode every image of the subset into memory once (`num_bytes`); reading then needs no file.

        Dropped by pickling, so spawned workers decode for themselves. Calls `_load_raw_image` from several
        threads. Raises UserError as reading does.
        """
        rows = np.unique(self._raw_idx)
        pixels = np.empty([len(rows), *self.image_shape], dtype=np.uint8)

        def load_chunk(start: int) -> int:
            chunk = rows[start:start + PRELOAD_CHUNK]
            for i, raw_idx in enumerate(chunk):
                pixels[start + i] = self._get_raw_image(int(raw_idx))
            return len(chunk)

        # Threads suffice: decoders release the GIL.
        pool = ThreadPoolExecutor(min(MAX_DECODE_THREADS, os.cpu_count() or 1))
        try:
            done = pool.map(load_chunk, range(0, len(rows), PRELOAD_CHUNK))
            if show_progress:
                with progress(total=len(rows), desc='Reading', unit='img') as bar:
                    for count in done:
                        bar.update(count)
            # Without a progress bar the results are still unread; reading them raises exceptions of threads.
            list(done)
        finally:
            pool.shutdown(cancel_futures=True)
        self._ram = pixels

    def decoded(self) -> np.ndarray:
        """The images decoded by `preload`: uint8 [images, C, H, W], not a copy."""
        assert self._ram is not None, 'call preload() first'
        return self._ram

    def rows_of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `decoded` (int64), and whether they are mirrored (bool), for an array of items."""
        num_rows = len(self.decoded())
        return items % num_rows, self._xflip[items].astype(bool)  # the mirrored half repeats the rows

    def __len__(self) -> int:
        return len(self._raw_idx)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [C, H, W], label float32) of item `idx`, both copies."""
        raw_idx = int(self._raw_idx[idx])
        if self._ram is None:
            image = self._get_raw_image(raw_idx)
        else:
            image = self._ram[idx % len(self._ram)]  # the mirrored half repeats the rows
        return (image[:, :, ::-1] if self._xflip[idx] else image).copy(), self.get_label(idx)

    def get_label(self, idx: int) -> np.ndarray:
        """The label of item `idx` as network input: float32, one-hot for classes, length 0 if unused."""
        raw_label = self._get_raw_labels()[self._raw_idx[idx]]
        if not self.has_onehot_labels:
            return raw_label.copy()
        onehot = np.zeros(self.label_shape, dtype=np.float32)
        onehot[raw_label] = 1
        return onehot

    def get_details(self, idx: int) -> EasyDict:
        """raw_idx (int), xflip (bool) and raw_label (copy) of item `idx`."""
        raw_idx = int(self._raw_idx[idx])
        raw_label = self._get_raw_labels()[raw_idx].copy()
        return EasyDict(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=raw_label)

    @property
    def name(self) -> str:
        """Short name: the file or folder name without suffix."""
        return self._name

    @property
    def image_shape(self) -> list[int]:
        """[C, H, W] of every image."""
        return list(self._raw_shape[1:])

    @property
    def num_channels(self) -> int:
        """1 gray, 2 gray + alpha, 3 RGB, 4 RGBA, or as defined by a subclass."""
        return self._raw_shape[1]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self._raw_shape[2]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self._raw_shape[3]

    @property
    def resolution(self) -> int:
        """The side of square images. Raises UserError for others: use `height` and `width`."""
        if self.height != self.width:
            raise UserError(f'{self._name}: images are {self.width}x{self.height}, so there is no single '
                            'resolution; use height and width')
        return self.height

    @property
    def label_shape(self) -> list[int]:
        """[number of classes], counted over all images, not only the subset; or the shape of a vector."""
        labels = self._get_raw_labels()
        if labels.dtype == np.int64:
            # A subset without the last class must still fit a network trained on all classes.
            return [int(labels.max(initial=-1)) + 1]
        return list(labels.shape[1:])

    @property
    def label_dim(self) -> int:
        """Length of the label vector, 0 without labels."""
        if len(self.label_shape) != 1:
            raise UserError(f'{self._name}: labels of shape {self.label_shape} have no single dimension')
        return self.label_shape[0]

    @property
    def has_labels(self) -> bool:
        """Whether there are labels; a single class counts."""
        return any(size != 0 for size in self.label_shape)

    @property
    def has_onehot_labels(self) -> bool:
        """Whether the labels are classes."""
        return self._get_raw_labels().dtype == np.int64

    def __getstate__(self) -> dict[str, Any]:
        # Keeps the pickle for spawned workers small; labels are read again on first use.
        return dict(self.__dict__, _raw_labels=None, _ram=None)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: the constructor failed early
            self.close()


def _draw_subset(num_images: int, max_size: int | None, random_seed: int) -> np.ndarray:
    indices = np.arange(num_images, dtype=np.int64)
    if max_size is None or num_images <= max_size:
        return indices
    # The legacy generator, as published: its stream determines which images --subset selects.
    np.random.RandomState(random_seed).shuffle(indices)
    return np.sort(indices[:max_size])


def _checked_labels(labels: np.ndarray, num_images: int, name: str) -> np.ndarray:
    is_classes = labels.dtype == np.int64 and labels.ndim == 1 and bool(np.all(labels >= 0))
    if labels.shape[:1] != (num_images,) or not (is_classes or labels.dtype == np.float32):
        raise UserError(f'{name}: labels must be int64 [{num_images}] >= 0 or float32 [{num_images}, ...], '
                        f'got {labels.dtype} {list(labels.shape)}')
    return labels


def _shape_text(shape: list[int] | tuple[int, ...]) -> str:
    if len(shape) != 3:
        return f'of shape {list(shape)}'
    return f'{shape[2]}x{shape[1]} with {shape[0]} channel{"s" if shape[0] > 1 else ""}'


class ImageFolderDataset(Dataset):
    """The images of a folder or zip, by sorted relative name, with the labels of its `dataset.json`.

    path: folder (searched recursively), `.zip`, or what find_dataset() returns. resolution: required side or
    (height, width). class_names: accepted, since options of datasets record them; those of the folder or zip
    count.
    Images are decoded by `training.datasets.images.decode_image`: true colors, upright, 1 to 4 channels.
    Raises UserError, which is an OSError too, for an invalid path or size.
    """

    def __init__(
        self, path: str, resolution: int | tuple[int, int] | None = None,
        class_names: list[str] | None = None, **super_kwargs: Any,
    ) -> None:
        self._path = path
        self._files, is_one_class = _open_files(path)
        if is_one_class:
            super_kwargs['use_labels'] = False  # all would be the same
        # The first image determines the shape; the others are checked when they are read.
        height, width, channels = self._decode(0).shape
        if resolution is not None and _as_pair(resolution) != (height, width):
            wanted = 'x'.join(str(size) for size in reversed(_as_pair(resolution)))
            raise DatasetPathError(f'{self._describe(0)} is {width}x{height}, but {wanted} is required; '
                                   'resize with dataset_tool.py --width --height')
        raw_shape = [len(self._files.names), channels, height, width]
        super().__init__(name=_dataset_name(path), raw_shape=raw_shape, **super_kwargs)

    def _describe(self, raw_idx: int) -> str:
        return f'{self._path}: {self._files.names[raw_idx]}'

    def _decode(self, raw_idx: int) -> np.ndarray:
        data = self._files.read(self._files.names[raw_idx])
        try:
            return decode_image(data)
        except ImageError as error:
            raise UserError(f'{self._describe(raw_idx)} {error}; replace or remove it') from error

    def _load_raw_image(self, raw_idx: int) -> np.ndarray:
        return self._decode(raw_idx).transpose(2, 0, 1)  # [C, H, W]

    def _load_raw_labels(self) -> np.ndarray | None:
        labels = read_labels(self._files)
        origin = f'{self._path}: {LABEL_FILE}'
        return None if labels is None else label_array(self._files.names, labels.table, origin)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in their order; None if the labels have none or are not used."""
        labels = read_labels(self._files) if self._use_labels else None
        return None if labels is None or labels.class_names is None else list(labels.class_names)

    def ledger(self, *, cond: bool) -> Ledger:
        """What of the folder or zip is not used.  cond: its labels are. Raises UserError as `label_dim`."""
        ledger = account(self._files, look_inside=True)
        labels = read_labels(self._files) if cond else None
        if labels is not None:
            ledger.add_rows(labels.table, self._files.names)
        return ledger

    def close(self) -> None:
        """Close the archive; the next read opens it again."""
        self._files.close()


def _as_pair(resolution: int | tuple[int, int]) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def _dataset_name(path: str) -> str:
    # abspath drops a trailing separator and resolves '.' and '..' to a name.
    return os.path.splitext(os.path.basename(os.path.abspath(path)))[0]


class SeekableSampler(torch.utils.data.Sampler):
    """An endless order of items that can start at any position: a pure function of (seed, position).

    Position k is in epoch k // size; each epoch has its own permutation, drawn from (seed, epoch). This rank
    yields the positions start + rank, start + rank + num_replicas, ..., so that all ranks together read the
    stream from `start` on, for any number of ranks. shuffle=False: the items in order, repeated.
    """

    def __init__(
        self, size: int, *, seed: int = 0, start: int = 0, rank: int = 0, num_replicas: int = 1,
        shuffle: bool = True,
    ) -> None:
        if size < 1:
            raise UserError(f'the dataset has {size} items; training needs at least one')
        if seed < 0 or start < 0 or not 0 <= rank < num_replicas:
            raise UserError(f'need seed={seed} >= 0, start={start} >= 0 and 0 <= rank={rank} < '
                            f'num_replicas={num_replicas}')
        self.size, self.seed, self.start, self.shuffle = size, seed, start, shuffle
        self.rank, self.num_replicas = rank, num_replicas
        self._latest: tuple[int, np.ndarray] | None = None

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of the items in one epoch, int64 [size]."""
        if not self.shuffle:
            return np.arange(self.size)
        if self._latest is None or self._latest[0] != epoch:
            # Sorting raw bits, unlike numpy's own shuffles, gives the same order in every release of numpy.
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.size)
            self._latest = epoch, np.argsort(bits, kind='stable')
        return self._latest[1]

    def indices_at(self, position: int, count: int) -> np.ndarray:
        """The items at the global positions position ... position + count - 1 (all ranks), int64 [count]."""
        # One part per epoch, because each epoch has its own order.
        parts = [np.empty(0, dtype=np.int64)]
        end = position + count
        while position < end:
            epoch, offset = divmod(position, self.size)
            parts.append(self.permutation(epoch)[offset:offset + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[int]:
        position = self.start + self.rank
        while True:
            epoch, offset = divmod(position, self.size)
            # This rank's share of the rest of the epoch.
            items = self.permutation(epoch)[offset::self.num_replicas]
            yield from items.tolist()
            position += len(items) * self.num_replicas
