# SPDX-License-Identifier: Apache-2.0
"""Files of projection: target images, initial ws, projected ws and noise."""
import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dnnlib.util import UserError, open_regular, read_regular, replace_file
from training.datasets.images import (
    CHANNEL_MODES,
    ImageError,
    Reading,
    convert_mode,
    count_frames,
    decode_image,
    from_pillow,
    is_image_name,
    to_pillow,
)
from training.datasets.ledger import START_BYTES, Ledger, account_names
from training.sampling.sources import read_w


def find_targets(paths: Sequence[str]) -> list[Path]:
    """The images of --target: files as given, and the images in folders, sorted by name.

    Raises UserError if there is none, or a path does not exist.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'--target={path}: no such file; give an image or a folder of images')
        inside = sorted(p for p in path.iterdir() if is_image_name(p.name)) if path.is_dir() else [path]
        if not inside:
            raise UserError(f'--target={path}: no images in this folder; give an image or another folder')
        found += inside
    return found


def target_ledger(paths: Sequence[str]) -> Ledger:
    """What of the folders and images of --target is not used: other files, further frames."""
    ledger = Ledger()
    for path in map(Path, paths):
        others = [p for p in path.iterdir() if not is_image_name(p.name)] if path.is_dir() else []
        ledger.join(account_names(sorted(p.name for p in others), functools.partial(_read_start, path)))
    for target in find_targets(paths):
        with contextlib.suppress(OSError, ImageError):  # reported when it is read
            ledger.add_frames(target.name, count_frames(read_regular(target)), 'the first is projected')
    return ledger


def _read_start(folder: Path, name: str) -> bytes:
    with open_regular(folder / name) as file:
        return file.read(START_BYTES)


def read_target(path: str | os.PathLike, channels: int, height: int, width: int) -> np.ndarray:
    """An image as uint8 [C, H, W] of the generator's shape. Raises UserError if it cannot be read."""
    try:
        pixels = decode_image(read_regular(path), Reading('auto'))
    except OSError as error:
        raise UserError(f'--target={path}: cannot be read ({error.strerror or error})') from error
    except ImageError as error:
        raise UserError(f'--target={path}: {error}; give a PNG, JPEG or similar') from error
    return fit_target(convert_mode(pixels, CHANNEL_MODES[channels]), height, width).transpose(2, 0, 1)


def fit_target(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C]: the largest center crop of the right aspect ratio, resized with a Lanczos filter."""
    old_height, old_width = pixels.shape[:2]
    # In integers, so that a square crop is exactly the shorter side.
    if old_width * height >= old_height * width:
        crop_height, crop_width = old_height, max(old_height * width // height, 1)
    else:
        crop_height, crop_width = max(old_width * height // width, 1), old_width
    box = ((old_width - crop_width) // 2, (old_height - crop_height) // 2,
           (old_width + crop_width) // 2, (old_height + crop_height) // 2)
    image = to_pillow(pixels).crop(box)
    return from_pillow(image.resize((width, height), Image.Resampling.LANCZOS))


def read_init_ws(path: str, G: torch.nn.Module, count: int, space: str) -> torch.Tensor:
    """The ws of --init-w, float32 [count, num_ws, w_dim]: one row of the file per target, or one for all."""
    ws = read_w(path, 'init-w')
    if ws.ndim != 3 or ws.shape[1:] != (G.num_ws, G.w_dim) or len(ws) not in (1, count):
        rows = '1' if count == 1 else f'1 or {count}'
        raise UserError(f'--init-w={path}: w is {list(ws.shape)}, but this network and the number of targets '
                        f'take [{rows}, {G.num_ws}, {G.w_dim}]')
    if not np.isfinite(ws).all():
        raise UserError(f'--init-w={path}: w contains non-finite values (NaN, Inf); give another file')
    if space == 'w' and not (ws == ws[:, :1]).all():
        raise UserError(f'--init-w={path}: has a different w per layer, which --space=w cannot represent; '
                        'use --space=w+')
    return torch.from_numpy(ws).expand(count, -1, -1)


def save_projections(
    path: str | os.PathLike, ws: torch.Tensor, noise: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Write projected_w.npz: w [N, num_ws, w_dim], and the fitted noise [N, H, W] of each map by its name."""
    maps = {name: torch.stack([one[name] for one in noise]).numpy() for name in noise[0]}
    with replace_file(path) as temporary:
        np.savez(temporary, w=ws.numpy(), **maps)
