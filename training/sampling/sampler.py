# SPDX-License-Identifier: Apache-2.0
"""Pictures from seeds: what generate.py, style_mixing.py and other tools do with a generator."""
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib import image_io
from dnnlib.util import UserError
from torch_utils.misc import keep_freed_memory, pick_device
from training.formats.load import check_truncation, load_network
from training.sampling.graphs import by_graphs


@dataclass(frozen=True)
class Sampler:
    """A generator, where it runs, and its noise mode: 'const', 'random' (drawn from each seed) or 'none'.

    psi: truncation of ws that come from seeds.  synthesis: in place of G.synthesis, with the same results.
    """

    G: torch.nn.Module
    device: torch.device
    noise_mode: str = 'const'
    psi: float = 1
    synthesis: Callable[..., torch.Tensor] | None = None

    def label(self, class_idx: int | None) -> torch.Tensor:
        """One-hot [1, c_dim] of --class; a warning if the network has no classes.

        Raises UserError if there is no such class, or none is given but one is needed.
        """
        c_dim = self.G.c_dim
        if c_dim == 0:
            if class_idx is not None:
                print(f'Warning: --class={class_idx} is ignored: the network has no classes', file=sys.stderr)
            return self.labels([None])
        if class_idx is None:
            raise UserError(f'--class is required: the network is conditional, with classes 0 to {c_dim - 1}')
        self.check_classes([class_idx], '--class')
        return self.labels([class_idx])

    def check_classes(self, classes: Sequence[int], option: str) -> None:
        """Raise UserError, naming the option, unless all are classes of the network."""
        c_dim = self.G.c_dim
        wrong = [index for index in classes if not 0 <= index < c_dim]
        if not wrong:
            return
        if c_dim == 0:
            raise UserError(f'{option}: the network has no classes; leave it out')
        raise UserError(f'{option}={wrong[0]}: the classes of this network go from 0 to {c_dim - 1}')

    def labels(self, classes: Sequence[int | None]) -> torch.Tensor:
        """One-hot [N, c_dim]; zeros for None."""
        labels = torch.zeros([len(classes), self.G.c_dim], device=self.device)
        for row, index in enumerate(classes):
            if index is not None:
                labels[row, index] = 1
        return labels

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """z [N, z_dim] float64: row i depends on seeds[i] alone, and is what the published tools draw."""
        # In double precision and one by one, as published, so that seeds mean the same pictures.
        rows = [np.random.RandomState(seed).randn(1, self.G.z_dim) for seed in seeds]
        return torch.from_numpy(np.concatenate(rows)).to(self.device)

    def styles(self, seeds: Sequence[int], label: torch.Tensor) -> torch.Tensor:
        """Truncated ws [N, num_ws, w_dim] of seeds. label: [1, c_dim], or one a seed."""
        return self.map(self.latents(seeds), label.expand(len(seeds), -1))

    def map(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Truncated ws [N, num_ws, w_dim] of z [N, z_dim] and c [N, c_dim]."""
        with torch.no_grad():
            return self.G.mapping(z, c, truncation_psi=self.psi)

    def pictures(self, ws: torch.Tensor, noise_seeds: Sequence[int]) -> np.ndarray:
        """uint8 [N, C, H, W] of ws [N, num_ws, w_dim]. noise_seeds: one a picture, for random noise."""
        kwargs = {'noise_mode': self.noise_mode}
        if self.device.type == 'cpu':
            kwargs['force_fp32'] = True  # float16 is slow there, and less exact
        # Noise drawn for a whole batch would depend on the company of a seed.
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
        """uint8 [N, C, H, W] of each (ws [N, num_ws, w_dim], noise seeds), `batch` pictures at a time."""
        cells, ahead = itertools.tee(moments)
        sizes = (len(ws) for ws, _ in ahead)
        pairs = (pair for ws, seeds in cells for pair in zip(ws, seeds, strict=True))
        waiting: list[np.ndarray] = []
        for size in sizes:
            # A batch may hold a part of what belongs together, or more than that.
            while len(waiting) < size:
                chunk = list(itertools.islice(pairs, batch))
                waiting.extend(self.pictures(torch.stack([ws for ws, _ in chunk]), [n for _, n in chunk]))
            yield np.stack(waiting[:size])
            del waiting[:size]

    def _render(self, ws: torch.Tensor, kwargs: dict) -> np.ndarray:
        try:
            synthesis = self.G.synthesis if self.synthesis is None else self.synthesis
            return image_io.to_uint8(synthesis(ws, **kwargs))
        except torch.OutOfMemoryError as error:
            raise UserError(f'--batch: {len(ws)} pictures at once do not fit into the memory of the GPU; try '
                            'fewer, or --device=cpu') from error


def open_sampler(
    network: str, device: str, noise_mode: str, psi: float, trust_pickle: bool, cuda_graphs: str = 'off',
) -> Sampler:
    """The averaged generator of a network file, on --device.  cuda_graphs: 'auto' or 'off'.

    Raises UserError if the file holds none, one without an average w for --trunc, or one whose pictures no
    PNG file can hold.
    """
    target = pick_device(device)
    keep_freed_memory(target)
    G = load_network(network, trust_pickle=trust_pickle, only=['G_ema']).G_ema
    if G is None:
        raise UserError(f'{network}: holds no G_ema; give a snapshot with an averaged generator')
    image_io.check_channels(G.img_channels)
    check_truncation(G, psi, '--trunc')
    G = G.to(target)
    return Sampler(G, target, noise_mode, psi, by_graphs(G.synthesis, target, cuda_graphs))

