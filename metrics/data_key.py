# SPDX-License-Identifier: Apache-2.0
"""Which images a result is about: a key of their content, and the whole of a dataset a subset came from."""
import copy
import hashlib
import math
import os
import zipfile
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
        whole._ram = None  # holds the subset alone
    return whole


def training_key(dataset: Dataset) -> str:
    """As data_key(), but it also differs if a label in use does, and reads only a part of the files, evenly
    spread, of datasets larger than MAX_READ.
    """
    labels = hashlib.sha256(dataset._get_raw_labels().tobytes()).hexdigest()
    return f'{data_key(dataset, MAX_READ)}-{labels[:32]}'


def data_key(dataset: Dataset, max_read: float = math.inf) -> str:
    """32 hexadecimal digits that differ if an image, its name, the subset or the mirroring does.

    The same for a folder and for a zip of it, wherever they lie. Reads the directory of a zip, all bytes of a
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
    if files.is_zip:
        with zipfile.ZipFile(files.path) as archive:
            infos = [archive.getinfo(name) for name in files.names]
        sizes, checksum = [info.file_size for info in infos], lambda i: infos[i].CRC
    else:
        sizes = [os.path.getsize(os.path.join(files.path, name)) for name in files.names]
        checksum = lambda i: zlib.crc32(files.read(files.names[i]))  # noqa: E731 (as above)
    step = max(math.ceil(sum(sizes) / max_read), 1)
    return [(name, size, 0 if i % step else checksum(i))
            for i, (name, size) in enumerate(zip(files.names, sizes, strict=True))]


def _images(dataset: Dataset) -> list[tuple[list[int], int]]:
    images = (dataset[i][0] for i in range(len(dataset)))
    return [(list(image.shape), zlib.crc32(image.tobytes())) for image in images]
