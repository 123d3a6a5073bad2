# SPDX-License-Identifier: Apache-2.0
"""What pictures are made from: seeds, or the ws of projections; and sweeps, which vary one thing of them."""
import dataclasses
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib.util import UserError
from training.sampling.interpolation import interpolate
from training.sampling.sampler import Sampler

# What NumPy may raise for files of other kinds; it documents only a part of it.
NPZ_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class SeedSource:
    """Pictures of seeds. Seed s has class classes[s % len(classes)], whatever other seeds there are.

    shift: [num_ws, w_dim] or a number, added to all ws.
    """

    sampler: Sampler
    seeds: Sequence[int]
    classes: Sequence[int | None] = (None,)
    shift: torch.Tensor | float = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def name(self, index: int) -> str:
        """What the file of a picture is called, without suffix."""
        return f'seed{self.seeds[index]:04d}'

    def class_of(self, index: int) -> int | None:
        """The class of a picture."""
        return self.classes[self.seeds[index] % len(self.classes)]

    def noise_seed(self, index: int) -> int:
        """The seed of --noise-mode=random."""
        return self.seeds[index]

    def latents(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(z [N, z_dim] float64, c [N, c_dim]) of some pictures."""
        z = self.sampler.latents([self.seeds[i] for i in indices])
        return z, self.sampler.labels([self.class_of(i) for i in indices])

    def map(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Truncated and shifted ws [N, num_ws, w_dim] of latents."""
        return _shifted(self.sampler.map(z, c), self.shift)

    def ws(self, indices: Sequence[int]) -> torch.Tensor:
        """ws [N, num_ws, w_dim] of some pictures."""
        return self.map(*self.latents(indices))


@dataclass(frozen=True)
class ProjectedSource:
    """Pictures of ws [n, num_ws, w_dim], to which shift is added."""

    w: torch.Tensor
    shift: torch.Tensor | float = 0

    def __len__(self) -> int:
        return len(self.w)

    def name(self, index: int) -> str:
        """What the file of a picture is called, without suffix."""
        return f'proj{index:02d}'

    def class_of(self, index: int) -> int | None:
        """None: whatever it was is in the w."""
        return None

    def noise_seed(self, index: int) -> int:
        """The seed of --noise-mode=random."""
        return index

    def ws(self, indices: Sequence[int]) -> torch.Tensor:
        """ws [N, num_ws, w_dim] of some pictures."""
        return _shifted(self.w[list(indices)], self.shift)


Source = SeedSource | ProjectedSource


def _shifted(ws: torch.Tensor, shift: torch.Tensor | float) -> torch.Tensor:
    # Nothing to add, nothing touched: plain pictures are equal to the last bit.
    return ws if isinstance(shift, float | int) and shift == 0 else ws + shift


@dataclass(frozen=True)
class Sweep:
    """One thing that varies from picture to picture: the same seeds at several keys.

    keys: a source a key.  values: what the keys stand for.  name: how files call it, such as 'trunc'.
    is_scale: whether there are values between the keys; there are none between classes.
    """

    keys: Sequence[Source]
    values: Sequence[float]
    name: str
    is_scale: bool = True

    def row(self, index: int, columns: int) -> torch.Tensor:
        """ws [columns, num_ws, w_dim] of a picture, from the first key to the last."""
        keys = torch.cat([key.ws([index]) for key in self.keys])
        return torch.stack([interpolate(keys, position) for position in self.columns(columns)])

    def columns(self, count: int) -> np.ndarray:
        """Positions [count] from the first key to the last."""
        return np.linspace(0, len(self.keys) - 1, count)

    def label(self, position: float) -> str:
        """What a position is called in the names of files: 'trunc+0.50', 'class3', 'class0to3-0.25'."""
        index, t = int(position // 1), position % 1
        value, following = self.values[index], self.values[min(index + 1, len(self.values) - 1)]
        if self.is_scale:
            return f'{self.name}{value + t * (following - value):+.2f}'
        return f'{self.name}{value}' + (f'to{following}-{t:.2f}' if t else '')


def truncation_sweep(source: SeedSource, psi: tuple[float, float]) -> Sweep:
    """From one truncation psi to another."""
    samplers = [dataclasses.replace(source.sampler, psi=value) for value in psi]
    return Sweep([dataclasses.replace(source, sampler=sampler) for sampler in samplers], psi, 'trunc')


def class_sweep(source: SeedSource, classes: Sequence[int]) -> Sweep:
    """From class to class."""
    return Sweep([dataclasses.replace(source, classes=(index,)) for index in classes], classes, 'class',
                 is_scale=False)


def direction_sweep(source: Source, direction: torch.Tensor, strength: tuple[float, float]) -> Sweep:
    """Along a direction [num_ws, w_dim], from one strength to another."""
    keys = [dataclasses.replace(source, shift=value * direction) for value in strength]
    return Sweep(keys, strength, 'strength')


def read_projected_w(path: str, G: torch.nn.Module) -> torch.Tensor:
    """w [n, num_ws, w_dim] float32 of a projection. Raises UserError unless the file fits this network."""
    w = read_w(path, 'projected-w')
    if w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim):
        raise UserError(f'--projected-w={path}: w is {list(w.shape)}, but this network takes '
                        f'[n, {G.num_ws}, {G.w_dim}]; it was projected with another network')
    if len(w) == 0 or not np.isfinite(w).all():
        raise UserError(f'--projected-w={path}: w is empty or has values that are not finite; project again')
    return torch.from_numpy(w)


def read_w(path: str, option: str) -> np.ndarray:
    """The float32 array w of an .npz file named by an option. Raises UserError if there is none."""
    try:
        # Without pickles: an array of objects would be code.
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays['w'], dtype=np.float32)
    except NPZ_ERRORS as error:
        raise UserError(f'--{option}={path}: {npz_problem(error, "an .npz file with an array w")}; give '
                        'the projected_w.npz of projector.py') from error


def npz_problem(error: Exception, expected: str) -> str:
    """Why np.load() failed, for a user: what NumPy itself says is about arguments of its own."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f'cannot be read ({error.strerror})'
    return f'not {expected}'
