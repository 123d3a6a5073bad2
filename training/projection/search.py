# SPDX-License-Identifier: Apache-2.0
"""Projection: find the w whose image is closest to a target, by gradient descent (StyleGAN2, Sec. 5).

Targets are batched; the result of a target does not depend on the rest of its batch.
"""
import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dnnlib.progress import Progress, progress
from dnnlib.resolution import height_width
from dnnlib.util import UserError
from metrics.detectors import VGG16, load_detector
from training.projection.distance import Distance, perceptual_distance

W_SAMPLES_SEED = 123  # as published: statistics of w do not depend on --seed
W_SAMPLES_CHUNK = 1000
DEFAULT_SEED = 303
BETAS = (0.9, 0.999)
MIN_IMPROVEMENT = 0.01  # relative improvement over the best distance that counts as progress
SHOW_INTERVAL = 10  # steps between progress updates: each synchronizes with the device


@dataclass(frozen=True)
class Schedule:
    """Learning rate and noise over num_steps. Lengths are fractions of num_steps; defaults as published."""

    num_steps: int = 1000
    initial_learning_rate: float = 0.1
    initial_noise_factor: float = 0.05
    lr_rampdown_length: float = 0.25
    lr_rampup_length: float = 0.05
    noise_ramp_length: float = 0.75

    def learning_rate(self, step: int) -> float:
        """Linear ramp-up from 0, then constant, then a half-cosine ramp-down to nearly 0."""
        t = step / self.num_steps
        rampdown = min(1.0, (1 - t) / self.lr_rampdown_length)
        rampup = min(1.0, t / self.lr_rampup_length)
        return self.initial_learning_rate * (0.5 - 0.5 * math.cos(math.pi * rampdown)) * rampup

    def noise_factor(self, step: int) -> float:
        """Standard deviation of the noise on w in units of that of w: quadratic decay to 0."""
        t = step / self.num_steps
        return self.initial_noise_factor * max(0.0, 1 - t / self.noise_ramp_length) ** 2

    @property
    def rampdown_start(self) -> int:
        """The first step of the ramp-down of the learning rate."""
        return math.floor(self.num_steps * (1 - self.lr_rampdown_length))


@dataclass(frozen=True)
class ProjectionSettings:
    """Settings of a projection.

    space: 'w', one w for all layers, or 'w+', one w per layer.  noise: 'fit' optimizes the noise maps of the
    network, 'redraw' random ones (as published), 'keep' leaves them unchanged.
    patience: once the distance of a target has not improved by 1 % in this many steps, its ramp-down starts;
    the second time the target ends. None: no early end.
    """

    schedule: Schedule = field(default_factory=Schedule)
    space: str = 'w'
    noise: str = 'fit'
    regularize_noise_weight: float = 1e5
    seed: int = DEFAULT_SEED
    patience: int | None = None


@dataclass(frozen=True)
class Projection:
    """The result for one target, on the CPU.

    path: ws [steps, num_ws, w_dim] after each step.  distances: [steps], before each step, with noise on w.
    noise: the fitted maps by name, empty for noise='keep'.
    """

    path: torch.Tensor
    distances: np.ndarray
    noise: dict[str, torch.Tensor]

    @property
    def ws(self) -> torch.Tensor:
        """[num_ws, w_dim] at the end."""
        return self.path[-1]


@dataclass(frozen=True)
class WStatistics:
    """Mean of w [1, 1, w_dim], and its deviation: the square root of the total variance over components."""

    w_avg: torch.Tensor
    w_std: float


@torch.no_grad()
def w_statistics(G: torch.nn.Module, label: torch.Tensor | None, num_samples: int = 10000) -> WStatistics:
    """Statistics of w over random z, for one label [1, c_dim] (None: no classes)."""
    device = next(G.parameters()).device
    z = np.random.RandomState(W_SAMPLES_SEED).randn(num_samples, G.z_dim)
    parts = []
    for chunk in torch.from_numpy(z).split(W_SAMPLES_CHUNK):
        c = None if label is None else label.expand(len(chunk), -1)
        parts.append(G.mapping(chunk.to(device), c)[:, :1].float())
    w = torch.cat(parts)
    w_avg = w.mean(dim=0, keepdim=True)
    return WStatistics(w_avg, math.sqrt((w - w_avg).double().square().sum().item() / num_samples))


class _Search:
    """The variables of one target, w [1 or num_ws, w_dim] and noise maps [H, W], and its progress."""

    def __init__(self, w: torch.Tensor, noise: Mapping[str, torch.Tensor], target: torch.Tensor):
        self.w = w.clone().requires_grad_()
        self.noise = {name: value.clone().requires_grad_() for name, value in noise.items()}
        self.target = target  # features [views, F]
        self.position = 0  # in the schedule
        self.path: list[torch.Tensor] = []
        self.distances: list[torch.Tensor] = []
        self._best, self._waited = math.inf, 0

    def parameters(self) -> list[torch.Tensor]:
        return [self.w, *self.noise.values()]

    @torch.no_grad()
    def record(self, distance: torch.Tensor) -> None:
        """Record the state after a step."""
        self.path.append(self.w.detach().clone())
        self.distances.append(distance.detach())
        self.position += 1
        for value in self.noise.values():
            normalize_noise_(value)

    def end_early(self, patience: int, schedule: Schedule) -> None:
        """Skip to the ramp-down, or from there to the end, after `patience` steps without progress."""
        distance = self.distances[-1].item()
        if distance < self._best * (1 - MIN_IMPROVEMENT):
            self._best, self._waited = distance, 0
            return
        self._waited += 1
        if self._waited >= patience:
            is_last = self.position >= schedule.rampdown_start
            self.position = schedule.num_steps if is_last else schedule.rampdown_start
            self._waited = 0

    def result(self, num_ws: int) -> Projection:
        """The result. Raises UserError if it is non-finite."""
        path = torch.stack(self.path).expand(-1, num_ws, -1).cpu()
        if not path[-1].isfinite().all():
            raise UserError('--network: the projection became non-finite (NaN or Inf); the network '
                            'overflows or is damaged; with a GPU, try --device=cpu')
        distances = torch.stack(self.distances).cpu().numpy()
        return Projection(path, distances, {name: v.detach().cpu() for name, v in self.noise.items()})


class Projector:
    """Projects batches of images with one generator.

    G: in eval mode, without gradients, on `device`.  label: [1, c_dim], None without classes.
    """

    def __init__(
        self, G: torch.nn.Module, distance: Distance, settings: ProjectionSettings,
        label: torch.Tensor | None = None, w_avg_samples: int = 10000,
    ):
        self.G, self.distance, self.settings = G, distance, settings
        self.device = next(G.parameters()).device
        self.statistics = w_statistics(G, label, w_avg_samples)

    def project(
        self, targets: torch.Tensor, init_ws: torch.Tensor | None = None, bar: Progress | None = None,
    ) -> list[Projection]:
        """One result per target.

        targets: [N, C, H, W] in [0, 255], of the shape of the generator's images.  init_ws: initial ws
        [N, num_ws, w_dim]; by default the mean w.  bar: advanced by num_steps in total.
        """
        schedule = self.settings.schedule
        # On the CPU, so that random numbers do not depend on the device.
        generator = torch.Generator().manual_seed(self.settings.seed)
        searches = self._begin(targets, init_ws, generator)
        groups = [{'params': search.parameters()} for search in searches]
        optimizer = torch.optim.Adam(groups, lr=schedule.initial_learning_rate, betas=BETAS)
        for step in range(schedule.num_steps):
            active = [search for search in searches if search.position < schedule.num_steps]
            if not active:
                break
            for search, group in zip(searches, optimizer.param_groups, strict=True):
                group['lr'] = schedule.learning_rate(search.position)
            distances = self._step(active, optimizer, generator)
            if bar is not None:
                _show(bar, step, distances)
        if bar is not None:
            bar.update(schedule.num_steps - len(max((s.path for s in searches), key=len)))
        return [search.result(self.G.num_ws) for search in searches]

    def _begin(
        self, targets: torch.Tensor, init_ws: torch.Tensor | None, generator: torch.Generator,
    ) -> list[_Search]:
        rows = 1 if self.settings.space == 'w' else self.G.num_ws
        noise = {} if self.settings.noise == 'keep' else noise_maps(self.G.synthesis)
        if self.settings.noise == 'redraw':
            # The same noise for every target: a result must not depend on the rest of the batch.
            noise = {name: torch.randn(v.shape, generator=generator).to(v) for name, v in noise.items()}
        with torch.no_grad():
            described = self.distance.describe(targets.to(self.device, torch.float32))
        if init_ws is None:
            init_ws = self.statistics.w_avg.expand(len(targets), rows, -1)
        return [_Search(w[:rows].to(self.device, torch.float32), noise, target)
                for w, target in zip(init_ws, described, strict=True)]

    def _step(
        self, active: Sequence[_Search], optimizer: torch.optim.Optimizer, generator: torch.Generator,
    ) -> torch.Tensor:
        """One step of all `active` searches; their distances [N]."""
        settings, w_std = self.settings, self.statistics.w_std
        draw = torch.randn(active[0].w.shape, generator=generator).to(self.device)
        noisy = [s.w + draw * (w_std * settings.schedule.noise_factor(s.position)) for s in active]
        # Gradients of finished searches stay None, so that the optimizer skips them.
        optimizer.zero_grad(set_to_none=True)
        try:
            distances = self._differentiate(active, torch.stack(noisy).expand(-1, self.G.num_ws, -1))
        except torch.OutOfMemoryError as error:
            raise UserError(f'--batch: {len(active)} targets at once do not fit into the memory of the GPU; '
                            'try fewer, or --device=cpu') from error
        optimizer.step()
        for search, distance in zip(active, distances, strict=True):
            search.record(distance)
            if settings.patience is not None:
                search.end_early(settings.patience, settings.schedule)
        return distances

    def _differentiate(self, active: Sequence[_Search], ws: torch.Tensor) -> torch.Tensor:
        """Set the gradients of each search; the distances [N] of the images of ws [N, num_ws, w_dim]."""
        maps = stack_maps([s.noise for s in active])
        with replaced_noise(self.G.synthesis, maps):
            # float16 is slower and less accurate on a CPU.
            img = self.G.synthesis(ws, noise_mode='const', force_fp32=self.device.type == 'cpu')
        described = self.distance.describe((img + 1) * 127.5)
        distances = self.distance.between(described, torch.stack([s.target for s in active]))
        penalty = self.settings.regularize_noise_weight * noise_penalty(maps).to(distances)
        (distances + penalty).sum().backward()
        return distances.detach()


def _show(bar: Progress, step: int, distances: torch.Tensor) -> None:
    bar.update(1)
    if step % SHOW_INTERVAL == 0:
        bar.set_postfix_str(f'distance {distances.mean().item():.4f}')


def project(  # noqa: PLR0913 (published signature)
    G: torch.nn.Module, target: torch.Tensor, *, num_steps: int = 1000, w_avg_samples: int = 10000,
    initial_learning_rate: float = 0.1, initial_noise_factor: float = 0.05, lr_rampdown_length: float = 0.25,
    lr_rampup_length: float = 0.05, noise_ramp_length: float = 0.75, regularize_noise_weight: float = 1e5,
    verbose: bool = False, device: torch.device, distance: Distance | None = None,
    c: torch.Tensor | None = None, seed: int = DEFAULT_SEED,
) -> torch.Tensor:
    """The published call: ws [num_steps, num_ws, w_dim] after each step, on `device`; G is not modified.

    target: [C, H, W] in [0, 255].  Not published: `distance` (default: VGG16, downloaded), the label c
    [1, c_dim] of a conditional network, and `seed` (published: the global generators).
    verbose: show a progress bar.
    Raises ValueError if the target does not have the shape of the generator's images.
    """
    schedule = Schedule(num_steps, initial_learning_rate, initial_noise_factor, lr_rampdown_length,
                        lr_rampup_length, noise_ramp_length)
    settings = ProjectionSettings(
        schedule, noise='redraw', regularize_noise_weight=regularize_noise_weight, seed=seed)
    frozen = copy.deepcopy(G).eval().requires_grad_(requires_grad=False).to(device)
    shape = (G.img_channels, *height_width(G.img_resolution))
    if tuple(target.shape) != shape:
        raise ValueError(f'target is {list(target.shape)}, but the network makes images {list(shape)}')
    if distance is None:
        distance = perceptual_distance(load_detector(VGG16, torch.device(device)))
    projector = Projector(frozen, distance, settings, c, w_avg_samples)
    with progress(total=num_steps, desc='Projecting', unit='step', show=verbose) as bar:
        found = projector.project(target[None], bar=bar)[0]
    return found.path.to(device)


SUFFIX = 'noise_const'


def noise_maps(synthesis: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name of the buffer -> noise [H, W] as saved, such as 'b8.conv1.noise_const'; empty if there is none."""
    return {name: buffer for name, buffer in synthesis.named_buffers() if name.endswith(SUFFIX)}


@contextlib.contextmanager
def replaced_noise(synthesis: torch.nn.Module, maps: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace the noise of noise_mode='const' by these maps, [H, W] for all images or [N, 1, H, W].

    Maps may require gradients. Noise maps that are not named are kept.
    """
    saved = {name: synthesis.get_buffer(name) for name in maps}
    try:
        _set(synthesis, maps)
        yield
    finally:
        _set(synthesis, saved)


def _set(synthesis: torch.nn.Module, maps: Mapping[str, torch.Tensor]) -> None:
    for name, value in maps.items():
        owner, _, buffer = name.rpartition('.')
        setattr(synthesis.get_submodule(owner), buffer, value)


def stack_maps(sets: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """N sets of maps [H, W] stacked into one of [N, 1, H, W]."""
    return {name: torch.stack([maps[name] for maps in sets])[:, None] for name in sets[0]}


def noise_penalty(maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Noise regularization [N]: the autocorrelation of noise maps [N, 1, H, W] (StyleGAN2, Sec. 5).

    Squared mean products with the right and with the lower neighbour, summed over maps and over downsampled
    versions of half the size, until a side is at most 8.
    """
    total: torch.Tensor | float = 0.0
    for value in maps.values():
        while True:
            for axis in (2, 3):
                # Rolling wraps around, so that every value has a neighbour.
                total = total + (value * value.roll(1, dims=axis)).mean(dim=(1, 2, 3)).square()
            if min(value.shape[2:]) <= 8:
                break
            value = torch.nn.functional.avg_pool2d(value, 2)
    return torch.as_tensor(total)


@torch.no_grad()
def normalize_noise_(noise: torch.Tensor) -> None:
    """Normalize a map in place to mean 0 and root mean square 1."""
    noise -= noise.mean()
    noise *= noise.square().mean().rsqrt()
