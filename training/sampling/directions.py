# SPDX-License-Identifier: Apache-2.0
"""Directions in W that change images the most: closed-form factorisation (SeFa) and principal components.

A file of directions is an .npz: directions [n, w_dim] float32 of length 1, the most important first; values
[n], their importance; sigma [n], the length of a step of strength 1; layers, the ws they apply to; method.
"""
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib.progress import progress
from dnnlib.util import UserError, replace_file
from training.sampling.sampler import Sampler
from training.sampling.sources import NPZ_ERRORS, npz_problem, open_npz

NUM_SAMPLES, CHUNK = 10_000, 1_000  # samples of w for statistics, as in the projector
SAMPLE_SEED = 123


@dataclass(frozen=True)
class Directions:
    """The contents of a directions file."""

    method: str
    directions: np.ndarray
    values: np.ndarray
    sigma: np.ndarray
    layers: np.ndarray

    def shift(self, index: int, num_ws: int, layers: Sequence[int] | None = None) -> torch.Tensor:
        """The shift of ws at strength 1: [num_ws, w_dim] float32, 0 outside the layers of the direction."""
        shift = torch.zeros([num_ws, self.directions.shape[1]])
        step = self.directions[index] * self.sigma[index]
        shift[list(self.layers if layers is None else layers)] = torch.from_numpy(step.astype(np.float32))
        return shift

    def save(self, path: str | os.PathLike) -> None:
        """Write the file. Raises UserError if it cannot be written."""
        with replace_file(path) as temporary:
            np.savez(temporary, **vars(self))


def style_matrix(G: torch.nn.Module, layers: Sequence[int]) -> torch.Tensor:
    """The weights of all affine layers that read one of these ws, as one matrix [styles, w_dim] float64.

    Raises UserError if the network has none. Which w a layer reads is found by running the network on the
    numbers of its ws, so that any architecture works.
    """
    synthesis, rows = G.synthesis, []

    def note_row(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if int(args[0][0, 0]) in layers:
            rows.append(module.weight.detach().double() * getattr(module, 'weight_gain', 1))

    hooks = [module.register_forward_pre_hook(note_row) for name, module in synthesis.named_modules()
             if name.rpartition('.')[2] == 'affine']
    device = next(synthesis.parameters()).device
    numbers = torch.arange(G.num_ws, dtype=torch.float32, device=device)
    try:
        with torch.no_grad():
            synthesis(numbers.reshape(1, -1, 1).expand(1, -1, G.w_dim), noise_mode='none')
    finally:
        for hook in hooks:
            hook.remove()
    if not rows:
        raise UserError('--find-directions=sefa: no layer of the network turns these ws into styles; choose '
                        'other --layers, or --find-directions=pca')
    return torch.cat(rows)


def factorise(matrix: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions n with the largest |A n|, A [styles, w_dim]: ([count, w_dim], |A n|^2 [count]).

    The eigenvectors of A^T A (Shen and Zhou, Closed-Form Factorization of Latent Semantics in GANs, 2021).
    """
    return _leading(matrix.T @ matrix, count)


def principal_components(ws: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions in which samples ws [N, w_dim] vary the most: ([count, w_dim], variances [count]).

    Harkonen et al., GANSpace: Discovering Interpretable GAN Controls, 2020.
    """
    centred = ws.double() - ws.double().mean(dim=0)
    return _leading(centred.T @ centred / len(ws), count)


def _leading(symmetric: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors [count, n] of the largest eigenvalues [count], largest first."""
    values, vectors = torch.linalg.eigh(symmetric.cpu())
    vectors = vectors.T.flip(0)[:count]
    # The sign is arbitrary: make the largest component positive, for the same result on all machines.
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return (vectors * largest.sign()).numpy(), values.flip(0)[:count].numpy()


def sample_w(sampler: Sampler, classes: Sequence[int | None], count: int = NUM_SAMPLES) -> torch.Tensor:
    """Untruncated w [count, w_dim] of random latents, the same in every call; classes alternate."""
    random, parts = np.random.RandomState(SAMPLE_SEED), []
    with torch.no_grad(), progress(total=count, desc='Sampling w', unit='w') as bar:
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            z = torch.from_numpy(random.randn(size, sampler.G.z_dim)).to(sampler.device)
            c = sampler.labels([classes[i % len(classes)] for i in range(start, start + size)])
            parts.append(sampler.G.mapping(z, c)[:, 0])
            bar.update(size)
    return torch.cat(parts)


def find_directions(
    sampler: Sampler, method: str, count: int, layers: Sequence[int], classes: Sequence[int | None] = (None,),
) -> Directions:
    """The first `count` directions. method: 'sefa' or 'pca'. Raises UserError if w has fewer dimensions.

    Strength 1 of a principal component is its standard deviation. For the factorisation it is the standard
    deviation of w averaged over all directions.
    """
    w_dim = sampler.G.w_dim
    if count > w_dim:
        raise UserError(f'--num-directions={count}: must be at most {w_dim}, the dimensions of the w of '
                        'this network')
    ws = sample_w(sampler, classes)
    if method == 'pca':
        directions, values = principal_components(ws, count)
        sigma = np.sqrt(np.maximum(values, 0))
    else:
        directions, values = factorise(style_matrix(sampler.G, layers), count)
        sigma = np.full(count, float(ws.double().var(dim=0, correction=0).mean().sqrt()))
    return Directions(method, directions.astype(np.float32), values, sigma, np.array(layers))


def read_direction(text: str, G: torch.nn.Module, layers: Sequence[int] | None = None) -> torch.Tensor:
    """The shift of ws at strength 1 of --direction=FILE:INDEX: [num_ws, w_dim].

    layers: instead of those in the file. Raises UserError if the file or the index does not fit the network.
    """
    path, colon, index = text.rpartition(':')
    if not colon or not index.isdecimal():
        raise UserError(f'--direction={text}: must be FILE:INDEX, such as directions.npz:0')
    stored = read_directions(path)
    w_dim, last_layer = stored.directions.shape[1], stored.layers.max(initial=0)
    if w_dim != G.w_dim or last_layer >= G.num_ws:
        raise UserError(f'--direction={text}: made for w_dim {w_dim}, layers up to {last_layer}, but this '
                        f'network has w_dim {G.w_dim}, layers up to {G.num_ws - 1}')
    if int(index) >= len(stored.directions):
        raise UserError(f'--direction={text}: the file has directions 0 to {len(stored.directions) - 1}')
    return stored.shift(int(index), G.num_ws, layers)


def read_directions(path: str) -> Directions:
    """Read a directions file. Raises UserError if it is not one."""
    try:
        with open_npz(path) as arrays:
            stored = Directions(str(arrays['method']), *(
                np.asarray(arrays[name], dtype=dtype) for name, dtype in
                (('directions', np.float32), ('values', float), ('sigma', float), ('layers', int))))
    except NPZ_ERRORS as error:
        raise UserError(f'--direction={path}: {npz_problem(error, "a directions file")}; make one with '
                        '--find-directions') from error
    is_whole = (stored.directions.ndim == 2 and stored.sigma.shape == stored.directions.shape[:1]
                and stored.layers.ndim == 1 and stored.layers.min(initial=0) >= 0
                and np.isfinite(stored.directions).all() and np.isfinite(stored.sigma).all())
    if not is_whole:
        raise UserError(f'--direction={path}: directions {list(stored.directions.shape)}, sigma '
                        f'{list(stored.sigma.shape)}, layers {stored.layers.tolist()} do not fit together; '
                        'make it with --find-directions')
    return stored
