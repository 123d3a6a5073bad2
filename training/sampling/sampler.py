# SPDX-License-Identifier: Apache-2.0
"""Images from a generator, for generate.py, style_mixing.py, projector.py and other tools."""
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnnlib import image_io
from dnnlib.cli_options import MAX_SHOWN, LabelOptions
from dnnlib.util import UserError, file_sha256
from torch_utils.misc import keep_freed_memory, pick_device
from training.formats.load import check_truncation, load_network, local_path, network_path
from training.sampling.graphs import by_graphs

Condition = int | tuple[float, ...] | None  # a class, a label vector, or none
MAX_NAMES = 12  # of classes, in a message


@dataclass(frozen=True)
class Sampler:
    """A generator, its device, and its noise mode: 'const', 'random' (drawn from each seed) or 'none'.

    psi: truncation of ws from seeds.  synthesis: called instead of G.synthesis, with the same results.
    class_names: of the training data, () if unknown.  network_sha256: of the network file, None if unknown.
    """

    G: torch.nn.Module
    device: torch.device
    noise_mode: str = 'const'
    psi: float = 1
    synthesis: Callable[..., torch.Tensor] | None = None
    class_names: Sequence[str] = ()
    network_sha256: str | None = None

    def condition(self, options: LabelOptions) -> Condition:
        """The class or label vector of --class or --label, None without; warns if the network has none.

        Raises UserError if the network has no such class, or labels of another length.
        """
        options.check()
        c_dim = self.G.c_dim
        given = {'--class': options.class_name, '--label': options.vector}
        for name in [name for name, value in given.items() if value is not None and c_dim == 0]:
            value = options.class_name or ','.join(map('{:g}'.format, options.vector or ()))
            print(f'Warning: {name}={value} is ignored: the network has no classes', file=sys.stderr)
        if c_dim == 0 or options == LabelOptions():
            return None
        if options.vector is not None and len(options.vector) != c_dim:
            raise UserError(f'--label: {len(options.vector)} numbers, but the labels of this network have '
                            f'{c_dim}')
        return self.class_number(str(options.class_name)) if options.vector is None else options.vector

    def class_number(self, text: str) -> int:
        """The class that --class names by its number or, in either case of letters, by its name.

        Raises UserError if the network has no such class.
        """
        if re.fullmatch(r'[+-]?[0-9]{1,9}', text):
            self.check_classes([int(text)], '--class')
            named = self.class_names.index(text) if text in self.class_names else int(text)
            if named != int(text):
                print(f'Note: --class={text} is a number here; the class of that name is --class={named}',
                      file=sys.stderr)
            return int(text)
        for plain in (str, str.casefold):
            found = [i for i, name in enumerate(self.class_names) if plain(name) == plain(text)]
            if len(found) == 1:
                return found[0]
        names = [f'{name!r} ({i})' for i, name in enumerate(self.class_names[:MAX_NAMES])]
        more = len(self.class_names) - len(names)
        known = ', '.join(names + ([f'and {more} more'] if more > 0 else []))
        reason = f'the classes are {known}' if known else 'the file holds no names of classes'
        raise UserError(f'--class={text[:MAX_SHOWN]}: {reason}; give a name or a number from 0 to '
                        f'{self.G.c_dim - 1}')

    def class_text(self, condition: Condition) -> str:
        """A class as text, '6' or '6 flower', or a label vector, '0.3,1'; '' for None."""
        if condition is None or isinstance(condition, tuple):
            return ','.join(map('{:g}'.format, condition or ()))
        return f'{condition} {self.class_names[condition]}' if self.class_names else str(condition)

    def info(self) -> dict[str, str]:
        """What the PNG files of this sampler say about it."""
        info = {'truncation_psi': f'{self.psi:g}', 'noise_mode': self.noise_mode}
        return info if self.network_sha256 is None else {**info, 'network_sha256': self.network_sha256}

    def check_classes(self, classes: Sequence[int], option: str) -> None:
        """Raise UserError, naming the option, unless all are classes of the network."""
        c_dim = self.G.c_dim
        wrong = [index for index in classes if not 0 <= index < c_dim]
        if not wrong:
            return
        if c_dim == 0:
            raise UserError(f'{option}: the network has no classes; drop the option')
        raise UserError(f'{option}={wrong[0]}: the classes of this network go from 0 to {c_dim - 1}')

    def labels(self, conditions: Sequence[Condition]) -> torch.Tensor:
        """Labels [N, c_dim]: one-hot for classes, zeros for None."""
        labels = torch.zeros([len(conditions), self.G.c_dim], device=self.device)
        for row, condition in enumerate(conditions):
            if isinstance(condition, tuple):
                labels[row] = torch.tensor(condition)
            elif condition is not None:
                labels[row, condition] = 1
        return labels

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """z [N, z_dim] float64: row i depends only on seeds[i], and equals that of the published tools."""
        # In double precision and one by one, as published, so that seeds give the same images.
        rows = [np.random.RandomState(seed).randn(1, self.G.z_dim) for seed in seeds]
        return torch.from_numpy(np.concatenate(rows)).to(self.device)

    def map(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Truncated ws [N, num_ws, w_dim] of z [N, z_dim] and c [N, c_dim]."""
        with torch.no_grad():
            return self.G.mapping(z, c, truncation_psi=self.psi)

    def images(self, ws: torch.Tensor, noise_seeds: Sequence[int]) -> np.ndarray:
        """uint8 [N, C, H, W] of ws [N, num_ws, w_dim]. noise_seeds: one per image, for random noise."""
        kwargs = {'noise_mode': self.noise_mode}
        if self.device.type == 'cpu':
            kwargs['force_fp32'] = True  # float16 is slower and less accurate on a CPU
        # Noise drawn per batch would make an image depend on the rest of its batch.
        parts = [slice(i, i + 1) for i in range(len(ws))] if self.noise_mode == 'random' else [slice(None)]
        images = []
        with torch.no_grad():
            for part in parts:
                if self.noise_mode == 'random':
                    torch.manual_seed(noise_seeds[part.start])
                images.append(self._render(ws[part], kwargs))
        return np.concatenate(images)

    def tables(
        self, moments: Iterable[tuple[torch.Tensor, Sequence[int]]], batch: int,
    ) -> Iterator[np.ndarray]:
        """uint8 [N, C, H, W] of each (ws [N, num_ws, w_dim], noise seeds), `batch` images at a time."""
        cells, ahead = itertools.tee(moments)
        sizes = (len(ws) for ws, _ in ahead)
        pairs = (pair for ws, seeds in cells for pair in zip(ws, seeds, strict=True))
        waiting: list[np.ndarray] = []
        for size in sizes:
            # A batch may contain part of an item, or several items.
            while len(waiting) < size:
                chunk = list(itertools.islice(pairs, batch))
                waiting.extend(self.images(torch.stack([ws for ws, _ in chunk]), [n for _, n in chunk]))
            yield np.stack(waiting[:size])
            del waiting[:size]

    def _render(self, ws: torch.Tensor, kwargs: dict) -> np.ndarray:
        try:
            synthesis = self.G.synthesis if self.synthesis is None else self.synthesis
            return image_io.to_uint8(synthesis(ws, **kwargs))
        except torch.OutOfMemoryError as error:
            raise UserError(f'--batch: {len(ws)} images at once do not fit into the memory of the GPU; try '
                            'fewer, or --device=cpu') from error


def open_sampler(
    network: str, device: str, noise_mode: str, psi: float, trust_pickle: bool, cuda_graphs: str = 'off',
) -> Sampler:
    """The generator G_ema of a network file, on --device.  cuda_graphs: 'auto' or 'off'.

    Raises UserError if the file has no G_ema, G_ema has no average w for --trunc, or its images have a number
    of channels that PNG does not support.
    """
    target = pick_device(device)
    keep_freed_memory(target)
    found = load_network(network, trust_pickle=trust_pickle, only=['G_ema'])
    G = found.G_ema
    if G is None:
        raise UserError(f'{network}: holds no G_ema; give a snapshot with an averaged generator')
    image_io.check_channels(G.img_channels)
    check_truncation(G, psi, '--trunc')
    G = G.to(target)
    return Sampler(G, target, noise_mode, psi, by_graphs(G.synthesis, target, cuda_graphs),
                   class_names_of(found.get('training_set_kwargs'), G.c_dim), sha256_of(network))


def class_names_of(training_set_kwargs: Any, c_dim: int) -> tuple[str, ...]:
    """The names of the classes in a network file, () unless there is one for each."""
    # The file is foreign: it may hold anything.
    names = training_set_kwargs.get('class_names') if isinstance(training_set_kwargs, dict) else None
    is_named = isinstance(names, list | tuple) and len(names) == c_dim and all(
        isinstance(name, str) for name in names)
    return tuple(names) if is_named else ()


def sha256_of(network: str) -> str | None:
    """SHA-256 of a network file or of a URL's cached copy; None if it cannot be had."""
    try:
        return file_sha256(local_path(network_path(network)))
    except (OSError, UserError):
        return None
