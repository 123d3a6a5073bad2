# SPDX-License-Identifier: Apache-2.0
"""Project images into the latent space of a trained network."""
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib import image_io
from dnnlib.cli import run_command
from dnnlib.cli_options import MAX_SEED
from dnnlib.progress import progress
from dnnlib.resolution import height_width
from dnnlib.util import make_folder, replace_file
from dnnlib.video import open_video
from training.formats.pickled import save_network_snapshot
from training.projection.distance import Distance, open_distance, psnr
from training.projection.files import find_targets, read_init_ws, read_target, save_projections
from training.projection.search import (
    DEFAULT_SEED,
    Projection,
    ProjectionSettings,
    Projector,
    Schedule,
    project,
    replaced_noise,
)
from training.projection.tuning import tune
from training.sampling.sampler import Sampler, open_sampler

__all__ = ['main', 'project', 'run_projection']

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python projector.py --outdir=out --network=net.pkl --target=portrait.png
  python projector.py --outdir=out --network=net.pkl --target=folder --space=w+ --tune=350
'''
FPS = 10  # published


@dataclass(frozen=True)
class ProjectionJob:
    """The options of a projection."""

    network: str
    targets: tuple[str, ...]
    outdir: str
    settings: ProjectionSettings
    init_w: str | None
    class_idx: int | None
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
    picture: str
    steps: int
    distance: float
    psnr: float
    saved_noise_psnr: float
    tuned_distance: float | None = None
    tuned_psnr: float | None = None


@click.command(epilog=EXAMPLES)
@click.option('--network', required=True, metavar='FILE|URL',
              help='Network file whose G_ema to use: .pkl, .safetensors or .pt; path, URL or hf://user/repo.')
@click.option('--target', 'targets', required=True, multiple=True, metavar='FILE|DIR',
              help='Target image, or a folder of images. May be repeated.')
@click.option('--outdir', required=True, metavar='DIR', help='Output folder.')
@click.option('--num-steps', type=click.IntRange(min=1), default=1000, show_default=True, metavar='N',
              help='Optimization steps.')
@click.option('--seed', type=click.IntRange(0, MAX_SEED), default=DEFAULT_SEED, show_default=True,
              help='Random seed; same seed, same output.')
@click.option('--save-video', type=bool, default=True, show_default=True, metavar='BOOL',
              help='Write proj.mp4: target and projection side by side, one frame per step.')
@click.option('--space', type=click.Choice(['w', 'w+']), default='w', show_default=True,
              help='w: one w for all layers, easier to edit; w+: one w per layer, closer to the target.')
@click.option('--init-w', '--init_w', metavar='FILE',
              help='Start from the ws of an .npz file written by projector.py instead of the mean w.')
@click.option('--class', 'class_idx', type=int, metavar='INDEX',
              help='Class whose mean w is the starting point; required by conditional networks.')
@click.option('--distance', type=click.Choice(['auto', 'vgg16', 'pixel']), default='auto', show_default=True,
              help='vgg16: perceptual (LPIPS features, downloaded once); pixel: no download; auto: vgg16, or '
                   'pixel if VGG16 is not available.')
@click.option('--detector-dir', metavar='DIR', help='Folder that is searched for vgg16.pt first.')
@click.option('--noise', type=click.Choice(['fit', 'redraw', 'keep']), default='fit', show_default=True,
              help='Noise maps. fit: optimize those of the network; redraw: optimize random ones; keep: no '
                   'change.')
@click.option('--patience', type=click.IntRange(min=1), metavar='N',
              help='Stop a target early once N steps have not reduced its distance by 1 %.')
@click.option('--tune', type=click.IntRange(min=0), default=0, metavar='N',
              help='Pivotal tuning: afterwards fine-tune the network for N steps, written to tuned.pkl.')
@click.option('--batch', type=click.IntRange(min=1), default=4, show_default=True, metavar='N',
              help='Targets per batch.')
@click.option('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
              help='auto: a GPU if there is one.')
@click.option('--trust-pickle', is_flag=True,
              help='Run the code inside the network file. Only for files from a source that you trust.')
def run_projection(
    network: str, device: str, trust_pickle: bool, num_steps: int, seed: int, space: str, noise: str,
    patience: int | None, **rest: Any,
) -> None:
    """Find the latent w whose generated image is closest to a target image."""
    settings = ProjectionSettings(Schedule(num_steps), space, noise, seed=seed, patience=patience)
    job = ProjectionJob(network=network, settings=settings, **rest)
    paths = find_targets(job.targets)
    sampler = open_sampler(network, device, 'const', 1, trust_pickle)
    G = sampler.G.requires_grad_(requires_grad=False)
    shape = (G.img_channels, *height_width(G.img_resolution))
    targets = torch.from_numpy(np.stack([read_target(path, *shape) for path in paths]))
    label = sampler.label(job.class_idx)
    init_ws = None if job.init_w is None else read_init_ws(job.init_w, G, len(paths), space)
    distance = open_distance(job.distance, sampler.device, job.detector_dir)
    # The folder is created only now, so that a refused command leaves none behind.
    folder = make_folder(job.outdir)
    found = _project_all(Projector(G, distance, settings, label), targets, init_ws, job.batch)
    results = Results(job, folder, sampler, distance, targets, found)
    reports = results.write_images(paths)
    if job.save_video:
        results.write_videos()
    if job.tune:
        results.write_tuned(reports)
    results.write_report(reports)


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

    def write_images(self, paths: Sequence[Path]) -> list[TargetReport]:
        """Write target.png, proj.png and projected_w.npz; returns a report per target."""
        reports = []
        for i, (path, target, result) in enumerate(zip(paths, self.targets, self.found, strict=True)):
            pixels = self._render(result.ws[None], result.noise)[0]
            plain = self._render(result.ws[None], {})[0]
            image_io.save_png(self._path('target', i), target.numpy())
            image_io.save_png(self._path('proj', i), pixels)
            reports.append(TargetReport(
                str(path), self._path('proj', i).name, len(result.path), self._distance_to(pixels, target),
                psnr(pixels, target.numpy()), psnr(plain, target.numpy())))
        save_projections(self.folder / 'projected_w.npz', self._ws(), [r.noise for r in self.found])
        return reports

    def write_videos(self) -> None:
        """Write proj.mp4: every step of a projection beside its target, with the noise of the last step."""
        _, height, width = self.targets.shape[1:]
        with progress(total=sum(len(r.path) for r in self.found), desc='Video', unit='frame') as bar:
            for i in range(len(self.found)):
                with open_video(self._path('proj', i, '.mp4'), 2 * width, height, fps=FPS) as video:
                    for frame in self._frames(i):
                        video.append(frame)
                        bar.update(1)

    def _frames(self, index: int) -> Iterator[np.ndarray]:
        """uint8 [H, 2 * W, C] per step."""
        target, result = self.targets[index].numpy(), self.found[index]
        for some in result.path.split(self.job.batch):
            for pixels in self._render(some, result.noise):
                yield np.concatenate([target, pixels], axis=2).transpose(1, 2, 0)

    def write_tuned(self, reports: Sequence[TargetReport]) -> None:
        """Write tuned.pkl, the network after pivotal tuning, and tuned.png, its image of the same w."""
        tuned = tune(self.sampler.G, self._ws(), self.targets, self.distance, self.job.tune, self.job.batch)
        tuned_results = dataclasses.replace(self, sampler=Sampler(tuned, self.sampler.device))
        for i, (target, report) in enumerate(zip(self.targets, reports, strict=True)):
            pixels = tuned_results._render(self.found[i].ws[None], {})[0]
            image_io.save_png(self._path('tuned', i), pixels)
            report.tuned_psnr = psnr(pixels, target.numpy())
            report.tuned_distance = self._distance_to(pixels, target)
        save_network_snapshot(self.folder / 'tuned.pkl', G=None, D=None, G_ema=tuned)

    def write_report(self, reports: Sequence[TargetReport]) -> None:
        """Write projection.json, and one line of JSON per target to stdout."""
        job, settings = self.job, self.job.settings
        rows = [{k: v for k, v in asdict(report).items() if v is not None} for report in reports]
        summary = {'network': job.network, 'class': job.class_idx, 'space': settings.space,
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


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(run_projection, args)


if __name__ == '__main__':
    main()
