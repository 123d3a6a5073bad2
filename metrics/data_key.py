# SPDX-License-Identifier: Apache-2.0
"""The images behind a result: a hash of their content, and the complete dataset of a subset."""
import copy
import hashlib
import math
import os
import zlib

import numpy as np

from training.dataset import Dataset
from training.datasets.files import ImageFiles

MAX_READ = 4 * 2 ** 30  # bytes of a folder that are read before a run starts


def whole_dataset(dataset: Dataset, *, keep_xflip: bool = False) -> Dataset:
    """All images of the archive, even if `dataset` is a subset of it; mirrored ones only if kept."""
    whole = copy.copy(dataset)
    count = dataset._raw_shape[0]
    num_copies = 2 if keep_xflip and dataset._xflip.any() else 1
    whole._raw_idx = np.tile(np.arange(count, dtype=np.int64), num_copies)
    whole._xflip = np.repeat(np.arange(num_copies, dtype=np.uint8), count)
    if len(np.unique(dataset._raw_idx)) < count:
        whole._ram = None  # has only the subset
    return whole


def training_key(dataset: Dataset) -> str:
    """As data_key(), but labels in use count, too, and of folders larger than MAX_READ only a part of the
    files, evenly spread, is read.
    """
    labels = hashlib.sha256(dataset._get_raw_labels().tobytes()).hexdigest()
    return f'{data_key(dataset, MAX_READ)}-{labels[:32]}'


def data_key(dataset: Dataset, max_read: float = math.inf) -> str:
    """Hash, 32 hexadecimal digits, of images, their names, subset and mirroring.

    Equal for a folder and a zip of it, whatever their path. Reads the directory of a zip, all bytes of a
    folder, and the pixels of anything else.  max_read: bytes, beyond which only every n-th file is read.
    """
    digest = hashlib.sha256()
    files = getattr(dataset, '_files', None)
    for entry in _images(dataset) if files is None else _files(files, max_read):
        digest.update(repr(entry).encode('utf-8'))
    for array in (getattr(dataset, '_raw_idx', None), getattr(dataset, '_xflip', None)):
        if array is not None:
            digest.update(np.asarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


def _files(files: ImageFiles, max_read: float) -> list[tuple[str, int, int]]:
    step = 1
    if not files.is_zip:
        sizes = [os.path.getsize(os.path.join(files.path, name)) for name in files.names]
        step = max(math.ceil(sum(sizes) / max_read), 1)
    return [(name, *((sizes[i], 0) if i % step else files.size_and_checksum(name)))
            for i, name in enumerate(files.names)]


def _images(dataset: Dataset) -> list[tuple[list[int], int]]:
    images = (dataset[i][0] for i in range(len(dataset)))
    return [(list(image.shape), zlib.crc32(image.tobytes())) for image in images]
