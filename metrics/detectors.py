# SPDX-License-Identifier: Apache-2.0
"""The two feature networks of the metrics: search, verification and calls.

Searched in --detector-dir, then the cache, then at the publisher's address.
"""
import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dnnlib import util
from dnnlib.util import UserError, file_sha256, replace_file

DETECTOR_URL = 'https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/'
INCEPTION, VGG16 = 'inception-2015-12-05.pt', 'vgg16.pt'
FILES = (INCEPTION, VGG16)
CHECKSUM_SUFFIX = '.sha256'
NUM_ATTEMPTS = 3
WHITE = 255


class DetectorMissingError(UserError):
    """A feature network is needed but unavailable."""


@dataclass(frozen=True)
class Detector:
    """A feature network on a device.  sha256: of its file, recorded with each result."""

    name: str
    sha256: str
    network: Callable[..., torch.Tensor]

    def __call__(self, images: torch.Tensor, **options: bool) -> torch.Tensor:
        """float32 features [N, F] of images [N, C, H, W], uint8 or in [0, 255], of any number of channels."""
        return self.network(to_rgb(images), **options).to(torch.float32)


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Three channels for a feature network, of the dtype of `images` [N, C, H, W], values in [0, 255].

    Gray is repeated; alpha is composited over white, as by image viewers. The shape is kept: the networks
    themselves resize real and generated images to a square. Raises UserError for other numbers of channels.
    """
    channels = images.shape[1]
    if channels not in (1, 2, 3, 4):
        raise UserError(f'metrics support images of 1 to 4 channels, not {channels}; use --metrics=none')
    if channels in (2, 4):
        colour, alpha = images[:, :-1].float(), images[:, -1:].float() / WHITE
        mixed = WHITE + (colour - WHITE) * alpha
        images = mixed if images.is_floating_point() else mixed.round().to(images.dtype)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def detector_path(name: str, folder: str | None = None) -> Path:
    """Path of a feature network, verified; downloaded if neither `folder` nor the cache has it.

    If a file <name>.sha256 exists beside it, as in bundles and the cache, the checksum must match. Raises
    DetectorMissingError in one line that says how to provide the file.
    """
    cached = Path(util.make_cache_dir_path('detectors'), name)
    for path in ([Path(folder, name)] if folder else []) + [cached]:
        if path.is_file():
            _check(path)
            return path
    try:
        fetched = util.open_url(
            DETECTOR_URL + name, num_attempts=NUM_ATTEMPTS, verbose=True, return_filename=True)
    except UserError as error:
        places = f'{folder} or {cached.parent}' if folder else str(cached.parent)
        raise DetectorMissingError(
            f'{name} is not in {places}, and cannot be downloaded from {DETECTOR_URL}{name}; run '
            'calc_metrics.py --offline-bundle=DIR where there is a connection, and use --detector-dir'
            ) from error
    try:
        _load(fetched, file_sha256(fetched), 'cpu')
    except DetectorMissingError as error:
        # An error page or half a file must not stay in the cache.
        Path(fetched).unlink(missing_ok=True)
        raise DetectorMissingError(f'{error}; the download has been deleted') from error
    return _keep(Path(fetched), cached)


def _keep(source: Path, target: Path) -> Path:
    """Copy a file and its checksum; the checksum first, so that no file lacks one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(target.with_name(target.name + CHECKSUM_SUFFIX)) as temporary:
            temporary.write_text(f'{file_sha256(source)}  {target.name}\n', encoding='ascii')
        with replace_file(target) as temporary:
            shutil.copyfile(source, temporary)
    except OSError as error:
        raise UserError(
            f'{target}: cannot be written ({error.strerror or error}); choose another folder') from error
    return target


def _check(path: Path) -> None:
    beside = path.with_name(path.name + CHECKSUM_SUFFIX)
    if beside.is_file() and beside.read_text(encoding='utf-8').split()[:1] != [file_sha256(path)]:
        raise DetectorMissingError(
            f'{path}: its content does not match the checksum in {beside.name}; delete both and try again')


def write_bundle(folder: str | os.PathLike, detector_dir: str | None = None) -> list[Path]:
    """Put all feature networks with their checksums into `folder`, for --detector-dir; the files."""
    return [_keep(detector_path(name, detector_dir), Path(folder, name)) for name in FILES]


def load_detector(name: str, device: torch.device, folder: str | None = None) -> Detector:
    """A feature network by file name on a device; each file is read once per process and device."""
    path = detector_path(name, folder)
    checksum = file_sha256(path)
    return Detector(name, checksum, _load(str(path), checksum, str(device)))


@functools.lru_cache(maxsize=4)
def _load(path: str, checksum: str, device: str) -> torch.jit.ScriptModule:
    # The checksum is part of the cache key: the file at a path may change.
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DetectorMissingError(f'{path}: not a TorchScript network (checksum {checksum[:8]}; {reason}); '
                                   f'fetch {Path(path).name} from {DETECTOR_URL}') from error
