# SPDX-License-Identifier: Apache-2.0
"""The work of projector.py: projections of the targets, and the files written from them."""
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib import image_io
from dnnlib.cli_options import LabelOptions
from dnnlib.progress import progress
from dnnlib.resolution import height_width
from dnnlib.util import UserError, make_folder, replace_file
from dnnlib.video import write_video
from training.formats.pickled import save_network_snapshot
from training.projection.distance import Distance, open_distance, psnr
from training.projection.files import (
    find_targets,
    read_init_ws,
    read_target,
    save_projections,
    target_ledger,
)
from training.projection.search import (
    Projection,
    ProjectionSettings,
    Projector,
    Schedule,
    replaced_noise,
)
from training.projection.tuning import tune
from training.sampling.sampler import Condition, Sampler, open_sampler

FPS = 10  # published
MIN_VIDEO_PX = 256  # of the longer side of each half of a video


@dataclass(frozen=True)
class ProjectionJob:
    """The options of a projection."""

    network: str
    targets: tuple[str, ...]
    outdir: str
    settings: ProjectionSettings
    init_w: str | None
    label: LabelOptions
    batch: int
    save_video: bool
    tune: int
    distance: str
    detector_dir: str | None


@dataclass
class TargetReport:
    """The entry of a target in projection.json; PSNR in dB. saved_noise_psnr: with the noise of the network
    file instead of the fitted noise, which is what generate.py renders from the w.
    """

    target: str
    image: str
    steps: int
    distance: float
    psnr: float
    saved_noise_psnr: float
    tuned_distance: float | None = None
    tuned_psnr: float | None = None


def run(
    network: str, device: str, trust_pickle: bool, num_steps: int, seed: int, space: str, noise: str,
    patience: int | None, **rest: Any,
) -> None:
    """Project the targets and write everything that the options of projector.py select. Raises UserError."""
    settings = ProjectionSettings(Schedule(num_steps), space, noise, seed=seed, patience=patience)
    job = ProjectionJob(network=network, settings=settings, **rest)
    paths = find_targets(job.targets)
    for line in target_ledger(job.targets).lines():
        click.echo(line)
    sampler = open_sampler(network, device, 'const', 1, trust_pickle)
    G = sampler.G.requires_grad_(requires_grad=False)
    shape = (G.img_channels, *height_width(G.img_resolution))
    targets = torch.from_numpy(np.stack([read_target(path, *shape) for path in paths]))
    condition = sampler.condition(job.label)
    if condition is None and G.c_dim > 0:
        raise UserError(f'--class or --label is required: the network is conditional, with classes 0 to '
                        f'{G.c_dim - 1}')
    init_ws = None if job.init_w is None else read_init_ws(job.init_w, G, len(paths), space)
    distance = open_distance(job.distance, sampler.device, job.detector_dir)
    # The folder is created only now, so that a refused command leaves none behind.
    folder = make_folder(job.outdir)
    projector = Projector(G, distance, settings, sampler.labels([condition]))
    found = _project_all(projector, targets, init_ws, job.batch)
    results = Results(job, folder, sampler, distance, targets, found, condition)
    reports = results.write_images(paths)
    if job.tune:
        results.write_tuned(reports)
    results.write_report(reports)
    # Last, because it depends on a program that is not ours.
    if job.save_video:
        results.write_videos()
    # Not on stdout, which holds the report.
    words = [f'--network={network}', f'--projected-w={folder / "projected_w.npz"}', f'--outdir={folder}']
    noun = 'projection' if len(paths) == 1 else 'projections'
    print(f'Wrote {len(paths)} {noun} to {folder}\nNext: python generate.py {shlex.join(words)}',
          file=sys.stderr)


def _project_all(
    projector: Projector, targets: torch.Tensor, init_ws: torch.Tensor | None, batch: int,
) -> list[Projection]:
    found: list[Projection] = []
    num_batches = -(-len(targets) // batch)
    total = num_batches * projector.settings.schedule.num_steps
    with progress(total=total, desc='Projecting', unit='step') as bar:
        for start in range(0, len(targets), batch):
            rows = slice(start, start + batch)
            found += projector.project(targets[rows], None if init_ws is None else init_ws[rows], bar)
    return found


@dataclass(frozen=True)
class Results:
    """The projections of the targets, uint8 [N, C, H, W], and the files written from them."""

    job: ProjectionJob
    folder: Path
    sampler: Sampler
    distance: Distance
    targets: torch.Tensor
    found: Sequence[Projection]
    condition: Condition

    def write_images(self, paths: Sequence[Path]) -> list[TargetReport]:
        """Write target.png, proj.png and projected_w.npz; returns a report per target."""
        reports = []
        for i, (path, target, result) in enumerate(zip(paths, self.targets, self.found, strict=True)):
            pixels = self._render(result.ws[None], result.noise)[0]
            plain = self._render(result.ws[None], {})[0]
            image_io.save_png(self._path('target', i), target.numpy())
            image_io.save_png(self._path('proj', i), pixels, self._info())
            reports.append(TargetReport(
                str(path), self._path('proj', i).name, len(result.path), self._distance_to(pixels, target),
                psnr(pixels, target.numpy()), psnr(plain, target.numpy())))
        save_projections(self.folder / 'projected_w.npz', self._ws(), [r.noise for r in self.found])
        return reports

    def write_videos(self) -> None:
        """Write proj.mp4: every step of a projection beside its target, with the noise of the last step."""
        for i, result in enumerate(self.found):
            with progress(total=len(result.path), desc='Video', unit='frame') as bar:
                write_video(self._path('proj', i, '.mp4'), functools.partial(self._frames, i), FPS, bar=bar)

    def _frames(self, index: int) -> Iterator[np.ndarray]:
        """uint8 [H, 2 * W, C] per step, enlarged for small networks."""
        target, result = self.targets[index].numpy(), self.found[index]
        scale = max(MIN_VIDEO_PX // max(target.shape[1:]), 1)
        for some in result.path.split(self.job.batch):
            for pixels in self._render(some, result.noise):
                frame = np.concatenate([target, pixels], axis=2).transpose(1, 2, 0)
                yield frame.repeat(scale, axis=0).repeat(scale, axis=1)

    def write_tuned(self, reports: Sequence[TargetReport]) -> None:
        """Write tuned.pkl, the network after pivotal tuning, and tuned.png, its image of the same w."""
        tuned = tune(self.sampler.G, self._ws(), self.targets, self.distance, self.job.tune, self.job.batch)
        tuned_results = dataclasses.replace(self, sampler=dataclasses.replace(
            self.sampler, G=tuned, synthesis=None, network_sha256=None))
        for i, (target, report) in enumerate(zip(self.targets, reports, strict=True)):
            pixels = tuned_results._render(self.found[i].ws[None], {})[0]
            image_io.save_png(self._path('tuned', i), pixels, self._info())
            report.tuned_psnr = psnr(pixels, target.numpy())
            report.tuned_distance = self._distance_to(pixels, target)
        save_network_snapshot(self.folder / 'tuned.pkl', G=None, D=None, G_ema=tuned)

    def write_report(self, reports: Sequence[TargetReport]) -> None:
        """Write projection.json, and one line of JSON per target to stdout."""
        job, settings = self.job, self.job.settings
        rows = [{k: v for k, v in asdict(report).items() if v is not None} for report in reports]
        summary = {'network': job.network, 'class': self.condition, 'space': settings.space,
                   'distance': self.distance.name, 'num_steps': settings.schedule.num_steps,
                   'seed': settings.seed, 'noise': settings.noise, 'tune': job.tune, 'targets': rows}
        with replace_file(self.folder / 'projection.json') as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + '\n', encoding='utf-8')
        for row in rows:
            click.echo(json.dumps(row))

    def _path(self, kind: str, index: int, suffix: str = '.png') -> Path:
        """proj.png for a single target; proj00.png, proj01.png, ... for several."""
        number = '' if len(self.found) == 1 else f'{index:02d}'
        return self.folder / f'{kind}{number}{suffix}'

    def _info(self) -> dict[str, str]:
        """The texts of PNG files."""
        label = {} if self.condition is None else {'class': self.sampler.class_text(self.condition)}
        return {'seed': str(self.job.settings.seed), **label, **self.sampler.info()}

    def _ws(self) -> torch.Tensor:
        return torch.stack([result.ws for result in self.found])

    def _render(self, ws: torch.Tensor, noise: Mapping[str, torch.Tensor]) -> np.ndarray:
        """uint8 [N, C, H, W] of ws on the CPU, with fitted noise or, if that is empty, the saved one."""
        device = self.sampler.device
        with replaced_noise(self.sampler.G.synthesis, {name: v.to(device) for name, v in noise.items()}):
            return self.sampler.images(ws.to(device), range(len(ws)))

    def _distance_to(self, pixels: np.ndarray, target: torch.Tensor) -> float:
        """The distance of a written image [C, H, W] from its target."""
        both = torch.stack([torch.from_numpy(pixels), target]).to(self.sampler.device, torch.float32)
        with torch.no_grad():
            described = self.distance.describe(both)
            return self.distance.between(described[:1], described[1:]).item()
