# SPDX-License-Identifier: Apache-2.0
"""Features of real and of generated images: sums in float64, or the features themselves where a metric needs
them, computed by all processes; real-data statistics are cached on disk.
"""
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dnnlib import util
from dnnlib.progress import progress, write
from dnnlib.util import UserError, replace_file
from metrics.data_key import data_key
from metrics.detectors import Detector, load_detector
from metrics.metric_utils import MetricOptions, generated_block
from training.dataset import Dataset

CACHE_FORMAT = 1


@dataclass(frozen=True)
class Features:
    """What to compute from the features of a set of images.

    detector: file name.  options: of the call.  keep: the features themselves [N, F] as `dtype`, otherwise
    only mean and covariance, in memory that does not grow with N.
    """

    detector: str
    options: Mapping[str, bool] = field(default_factory=lambda: {'return_features': True})
    keep: bool = False
    dtype: torch.dtype = torch.float32


class FeatureStats:
    """Collects the features of num_items images, block by block in any order."""

    def __init__(self, num_items: int, *, keep: bool, dtype: torch.dtype = torch.float32):
        self.num_items, self.keep, self.dtype = num_items, keep, dtype
        self._arrays: dict[str, torch.Tensor] = {}

    def prepare(self, num_features: int, device: torch.device) -> None:
        """Allocate, on idle ranks, too: the all-reduce needs the buffers.

        Sums stay on `device` until they are combined: copying them after every block would take longer than
        generating the images. Features, which may be large, are kept on the CPU.
        """
        if self._arrays:
            return
        if self.keep:
            self._arrays = {'features': torch.zeros([self.num_items, num_features], dtype=self.dtype)}
        else:
            double = {'dtype': torch.float64, 'device': device}
            self._arrays = {'sum': torch.zeros([num_features], **double),
                            'outer': torch.zeros([num_features] * 2, **double)}

    def add(self, block: range, features: torch.Tensor) -> None:
        """Take the features [len(block), F] of the images with these indices."""
        self.prepare(features.shape[1], features.device)
        if self.keep:
            self._arrays['features'][block.start:block.stop] = features.to('cpu', self.dtype)
            return
        x = features.double()
        self._arrays['sum'] += x.sum(dim=0)
        self._arrays['outer'].addmm_(x.T, x)

    def combine(self, options: MetricOptions) -> None:
        """All-reduce the sums or features; all processes must call."""
        for name, array in self._arrays.items():
            self._arrays[name] = options.share.sum_(array, options.device).cpu()

    def features(self) -> torch.Tensor:
        """[N, F] in the order of the images."""
        return self._arrays['features']

    def mean_cov(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [F] and covariance [F, F] (divisor N), float64."""
        mean = self._arrays['sum'] / self.num_items
        return mean.numpy(), (self._arrays['outer'] / self.num_items - torch.outer(mean, mean)).numpy()

    def save(self, path: Path) -> None:
        """Write an .npz atomically. Raises UserError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'{path.parent}: cannot be created ({error.strerror}); '
                            'set DNNLIB_CACHE_DIR') from error
        with replace_file(path) as temporary:
            np.savez(temporary, num_items=self.num_items, **{k: v.numpy() for k, v in self._arrays.items()})

    def load(self, path: Path) -> bool:
        """Load a file of `save`; False if it is missing, corrupt or does not match."""
        names = {'features'} if self.keep else {'sum', 'outer'}
        try:
            with np.load(path, allow_pickle=False) as data:
                if int(data['num_items']) != self.num_items:
                    return False
                self._arrays = {name: torch.from_numpy(data[name]) for name in names}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        return True


def real_statistics(
    options: MetricOptions, dataset: Dataset, kind: Features, max_items: int | None = None,
) -> FeatureStats | None:
    """Statistics of `dataset`, or of max_items random images of it; None except on rank 0.

    Read from the cache folder if it has those of the same images, feature network and options.
    """
    detector = open_detector(options, kind)
    rows = np.arange(len(dataset))
    if max_items is not None and max_items < len(rows):
        # Published: the first ones; but archives are often sorted by class.
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:max_items])
    stats = FeatureStats(len(rows), keep=kind.keep, dtype=kind.dtype)
    key = options.share.from_first(data_key(dataset) if options.share.rank == 0 else None)
    options.provenance['data_key'] = key
    path = _cache_path(dataset, key, detector, kind, len(rows))
    # Rank 0 decides for all: other nodes may have another disk.
    if options.share.from_first(options.share.rank == 0 and stats.load(path)):
        return stats if options.share.rank == 0 else None

    def read(block: range) -> torch.Tensor:
        return torch.from_numpy(np.stack([dataset[int(i)][0] for i in rows[block.start:block.stop]]))
    result = _collect(options, detector, kind, stats, read, 'Real images')
    if result is not None:
        try:
            result.save(path)
        except UserError as error:
            write(f'Features are not cached: {error}')
    return result


def generated_statistics(options: MetricOptions, kind: Features, num_items: int) -> FeatureStats | None:
    """Statistics of generated images; None except on rank 0."""
    stats = FeatureStats(num_items, keep=kind.keep, dtype=kind.dtype)
    return _collect(options, open_detector(options, kind), kind, stats,
                    lambda block: generated_block(options, block), 'Generated images')


def _collect(
    options: MetricOptions, detector: Detector, kind: Features, stats: FeatureStats,
    read: Callable[[range], torch.Tensor], desc: str,
) -> FeatureStats | None:
    share, device = options.share, options.device
    num_features = 0
    with progress(total=stats.num_items, desc=desc, unit='img', show=share.rank == 0) as bar:
        for block in share.blocks(stats.num_items):
            features = _features(options, detector, kind, read(block).to(device))
            num_features = features.shape[1]
            stats.add(block, features)
            # The other ranks are about as far.
            bar.update(min(len(block) * share.num_processes, stats.num_items - bar.n))
    # Rank 0 always has a block, so it knows the number of features.
    stats.prepare(share.from_first(num_features), device)
    stats.combine(options)
    return stats if share.rank == 0 else None


@torch.inference_mode()
def _features(
    options: MetricOptions, detector: Detector, kind: Features, images: torch.Tensor,
) -> torch.Tensor:
    return options.batch(lambda some: detector(some, **kind.options), images)


def open_detector(options: MetricOptions, kind: Features) -> Detector:
    """The feature network, recorded in the provenance. Raises DetectorMissingError."""
    # Rank 0 first, so that the others find its download.
    if options.share.rank == 0:
        load_detector(kind.detector, options.device, options.detector_dir)
    options.share.from_first(None)
    detector = load_detector(kind.detector, options.device, options.detector_dir)
    options.provenance['detector_sha256'] = detector.sha256
    return detector


def _cache_path(dataset: Dataset, key: str, detector: Detector, kind: Features, num_items: int) -> Path:
    parts = [CACHE_FORMAT, key, detector.sha256, sorted(kind.options.items()), kind.keep, str(kind.dtype),
             num_items]
    digest = hashlib.sha256(json.dumps(parts).encode('utf-8')).hexdigest()[:32]
    name = getattr(dataset, 'name', 'dataset')
    return Path(util.make_cache_dir_path(
        'gan-metrics', f'{name}-{Path(detector.name).stem}-{digest}.npz'))
