# SPDX-License-Identifier: Apache-2.0
"""Sources of ws for images: seeds or projections; and sweeps, which vary one property of a source."""
import dataclasses
import io
import lzma
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib.cli_options import LabelOptions
from dnnlib.util import UserError, read_regular
from training.sampling.interpolation import interpolate
from training.sampling.sampler import Condition, Sampler

# What NumPy may raise for other files; only part of it is documented.
NPZ_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError,
    SyntaxError, MemoryError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    struct.error)
NPZ_FREE_BYTES, NPZ_RATIO = 64 << 20, 20  # ws and directions hardly compress

CLASS_STREAM = 1  # of the random classes of seeds, apart from their latents


@dataclass(frozen=True)
class SeedSource:
    """Images of seeds. Seed s has class classes[s % len(classes)], independent of the other seeds.

    classes: () for a random class of the network, which depends on the seed alone.
    shift: [num_ws, w_dim] or a number, added to all ws.
    """

    sampler: Sampler
    seeds: Sequence[int]
    classes: Sequence[Condition] = (None,)
    shift: torch.Tensor | float = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def name(self, index: int) -> str:
        """The file name of an image, without suffix."""
        return f'seed{self.seeds[index]:04d}'

    def class_of(self, index: int) -> Condition:
        """The class or label vector of an image."""
        seed = self.seeds[index]
        if not self.classes:
            return int(np.random.default_rng([seed, CLASS_STREAM]).integers(self.sampler.G.c_dim))
        return self.classes[seed % len(self.classes)]

    def caption(self, index: int) -> str:
        """The caption of an image: seed and class."""
        return f'{self.seeds[index]} {self.sampler.class_text(self.class_of(index))}'.strip()

    def info(self, index: int) -> dict[str, str]:
        """The texts of an image's PNG file."""
        label = self.sampler.class_text(self.class_of(index))
        return {'seed': str(self.seeds[index]), **({'class': label} if label else {}), **self.sampler.info()}

    def noise_seed(self, index: int) -> int:
        """The seed of --noise-mode=random."""
        return self.seeds[index]

    def latents(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(z [N, z_dim] float64, c [N, c_dim]) of some images."""
        z = self.sampler.latents([self.seeds[i] for i in indices])
        return z, self.sampler.labels([self.class_of(i) for i in indices])

    def map(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Truncated and shifted ws [N, num_ws, w_dim] of latents."""
        return _shifted(self.sampler.map(z, c), self.shift)

    def ws(self, indices: Sequence[int]) -> torch.Tensor:
        """ws [N, num_ws, w_dim] of some images."""
        return self.map(*self.latents(indices))


@dataclass(frozen=True)
class ProjectedSource:
    """Images of ws [n, num_ws, w_dim], to which shift is added."""

    sampler: Sampler
    w: torch.Tensor
    shift: torch.Tensor | float = 0

    def __len__(self) -> int:
        return len(self.w)

    def name(self, index: int) -> str:
        """The file name of an image, without suffix."""
        return f'proj{index:02d}'

    def class_of(self, index: int) -> Condition:
        """None: the class is part of the projected w."""
        return None

    def caption(self, index: int) -> str:
        """The caption of an image: its name."""
        return self.name(index)

    def info(self, index: int) -> dict[str, str]:
        """The texts of an image's PNG file; ws of files are not truncated."""
        return {'projected_w': str(index), **self.sampler.info(), 'truncation_psi': '1'}

    def noise_seed(self, index: int) -> int:
        """The seed of --noise-mode=random."""
        return index

    def ws(self, indices: Sequence[int]) -> torch.Tensor:
        """ws [N, num_ws, w_dim] of some images."""
        return _shifted(self.w[list(indices)], self.shift)


SampleSource = SeedSource | ProjectedSource


def classes_of(sampler: Sampler, options: LabelOptions) -> Sequence[Condition]:
    """The `classes` of a SeedSource for --class and --label; says so if they are random."""
    condition = sampler.condition(options)
    if condition is not None or sampler.G.c_dim == 0:
        return (condition,)
    print(f'Note: each seed gets a random class of {sampler.G.c_dim}, always the same one; choose with '
          '--class or --label', file=sys.stderr)
    return ()


def _shifted(ws: torch.Tensor, shift: torch.Tensor | float) -> torch.Tensor:
    # Without a shift nothing is computed, so that plain images stay bit-identical.
    return ws if isinstance(shift, float | int) and shift == 0 else ws + shift


@dataclass(frozen=True)
class Sweep:
    """A sweep of one property: the same seeds at several keys.

    keys: one source per key.  values: of the property at the keys.  name: in file names, such as 'trunc'.
    is_scale: whether values between the keys have a meaning; those between classes do not.
    """

    keys: Sequence[SampleSource]
    values: Sequence[float]
    name: str
    is_scale: bool = True

    def row(self, index: int, columns: int) -> torch.Tensor:
        """ws [columns, num_ws, w_dim] of an image, from the first key to the last."""
        keys = torch.cat([key.ws([index]) for key in self.keys])
        return torch.stack([interpolate(keys, position) for position in self.columns(columns)])

    def columns(self, count: int) -> np.ndarray:
        """Positions [count] from the first key to the last."""
        return np.linspace(0, len(self.keys) - 1, count)

    def info(self, index: int, position: float) -> dict[str, str]:
        """The texts of the PNG file of an image at a position: of its source, and what is swept."""
        keyword = {'trunc': 'truncation_psi'}.get(self.name, self.name)
        return {**self.keys[0].info(index), keyword: self.label(position).removeprefix(self.name)}

    def label(self, position: float) -> str:
        """The name of a position in file names: 'trunc+0.50', 'class3', 'class0to3-0.25'."""
        index, t = int(position // 1), position % 1
        value, following = self.values[index], self.values[min(index + 1, len(self.values) - 1)]
        if self.is_scale:
            return f'{self.name}{value + t * (following - value):+.2f}'
        return f'{self.name}{value}' + (f'to{following}-{t:.2f}' if t else '')


def truncation_sweep(source: SeedSource, psi: tuple[float, float]) -> Sweep:
    """Sweep from one truncation psi to another."""
    samplers = [dataclasses.replace(source.sampler, psi=value) for value in psi]
    return Sweep([dataclasses.replace(source, sampler=sampler) for sampler in samplers], psi, 'trunc')


def class_sweep(source: SeedSource, classes: Sequence[int]) -> Sweep:
    """Sweep through classes."""
    return Sweep([dataclasses.replace(source, classes=(index,)) for index in classes], classes, 'class',
                 is_scale=False)


def direction_sweep(source: SampleSource, direction: torch.Tensor, strength: tuple[float, float]) -> Sweep:
    """Sweep along a direction [num_ws, w_dim], from one strength to another."""
    keys = [dataclasses.replace(source, shift=value * direction) for value in strength]
    return Sweep(keys, strength, 'strength')


def read_projected_w(path: str, G: torch.nn.Module) -> torch.Tensor:
    """w [n, num_ws, w_dim] float32 of a projection. Raises UserError unless the file fits this network."""
    w = read_w(path, 'projected-w')
    if w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim):
        raise UserError(f'--projected-w={path}: w is {list(w.shape)}, but this network takes '
                        f'[n, {G.num_ws}, {G.w_dim}]; it was projected with another network')
    if len(w) == 0 or not np.isfinite(w).all():
        raise UserError(f'--projected-w={path}: w is empty or non-finite (NaN, Inf); project again')
    return torch.from_numpy(w)


def read_w(path: str, option: str) -> np.ndarray:
    """The float32 array w of an .npz file named by an option. Raises UserError if there is none."""
    try:
        with open_npz(path) as arrays:
            return np.asarray(arrays['w'], dtype=np.float32)
    except NPZ_ERRORS as error:
        raise UserError(f'--{option}={path}: {npz_problem(error, "an .npz file with an array w")}; give '
                        'the projected_w.npz of projector.py') from error


def open_npz(path: str) -> np.lib.npyio.NpzFile:
    """The arrays of an .npz file. Raises one of NPZ_ERRORS, if not here, then when an array is read."""
    data = read_regular(path)
    # Without pickles: an array of objects would be code.
    arrays = np.load(io.BytesIO(data), allow_pickle=False)
    if sum(info.file_size for info in arrays.zip.infolist()) > NPZ_FREE_BYTES + NPZ_RATIO * len(data):
        raise ValueError('meant to fill memory')
    return arrays


def npz_problem(error: Exception, expected: str) -> str:
    """Why np.load() failed, in a user's terms: NumPy's own message is about its arguments."""
    if isinstance(error, OSError):
        return f'cannot be read ({error.strerror or error})'
    return f'not {expected}'
