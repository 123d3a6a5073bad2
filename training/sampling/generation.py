# SPDX-License-Identifier: Apache-2.0
"""The work of generate.py: the source of its images, and the outputs that the options select."""
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.progress import write
from dnnlib.util import UserError, make_folder
from training.formats.load import check_truncation
from training.sampling.directions import find_directions, read_direction
from training.sampling.jobs import ImageJob, Steering, is_archive
from training.sampling.output import sheet_columns, write_images, write_sheet, write_sweep
from training.sampling.sampler import Sampler, open_sampler
from training.sampling.sources import (
    ProjectedSource,
    SampleSource,
    SeedSource,
    Sweep,
    class_sweep,
    classes_of,
    direction_sweep,
    read_projected_w,
    truncation_sweep,
)
from training.sampling.walks import walk_of_sweep, walk_through, write_walk

DIRECTION_STRENGTH = (-3.0, 3.0)


def run(job: ImageJob) -> None:
    """Generate everything that the checked options of generate.py select. Raises UserError."""
    sampler = open_sampler(
        job.network, job.device, job.noise_mode, job.trunc, job.trust_pickle, job.cuda_graphs)
    if job.projected_w:
        ignored = {'--seeds': job.seeds, '--class': job.label.class_name, '--label': job.label.vector,
                   '--classes': job.classes}
        for name in [name for name, value in ignored.items() if value is not None]:
            print(f'Warning: {name} is ignored, because --projected-w is given', file=sys.stderr)
        w = torch.cat([read_projected_w(path, sampler.G) for path in job.projected_w])
        source: SampleSource = ProjectedSource(sampler, w.to(sampler.device))
    else:
        source = seed_source(sampler, job, [0] if job.seeds is None else job.seeds)
    make_outputs(sampler, source, job)
    if len(source) == 0:
        print('Warning: --seeds is an empty range; nothing to do', file=sys.stderr)


def seed_source(sampler: Sampler, job: ImageJob, seeds: Sequence[int]) -> SeedSource:
    """The source for --seeds. Raises UserError if the network lacks a class."""
    steering = job.steering
    # A walk may return to a seed; images of one seed would be the same file.
    if job.video.file_name is None and not isinstance(seeds, range):
        once = list(dict.fromkeys(seeds))
        if len(once) < len(seeds):
            count = len(seeds) - len(once)
            print(f'Note: --seeds: {count} repeated, each is generated once', file=sys.stderr)
        seeds = once
    for given, name in ((job.classes, '--classes'), (steering.class_sweep, '--class-sweep')):
        if given is not None:
            sampler.check_classes(given, name)
    if job.classes is not None:
        return SeedSource(sampler, seeds, job.classes)
    if steering.class_sweep is not None:
        return SeedSource(sampler, seeds, steering.class_sweep[:1])
    return SeedSource(sampler, seeds, classes_of(sampler, job.label))


def make_outputs(sampler: Sampler, source: SampleSource, job: ImageJob) -> None:
    """Write the outputs selected by the options."""
    source, sweep = steer(sampler, source, job.steering)
    if job.video.file_name is not None:
        write_video(sampler, sweep or source, job)
    elif job.steering.find_directions and isinstance(source, SeedSource):
        write_directions(sampler, source, job)
    elif sweep is not None:
        write_sweep(sampler, sweep, job.outdir, job.batch, job.steering.columns, with_captions=job.captions)
        write(f'Wrote the images of the sweep and sweep.png to {job.outdir}')
    elif not is_archive(job.outdir) or len(source) > 0:
        # The folder is created only now, so that a refused command leaves none behind.
        write_images(sampler, source, job.outdir, job.batch, with_sheet=job.grid, with_captions=job.captions)
        sheet = ' and grid.png' if job.grid and len(source) else ''
        write(f'Wrote {len(source)} images{sheet} to {job.outdir}')


def steer(sampler: Sampler, source: SampleSource, steering: Steering) -> tuple[SampleSource, Sweep | None]:
    """(source, moved along --direction; sweep, or None)."""
    check_layers(sampler, steering.layers)
    if steering.direction is not None:
        direction = read_direction(steering.direction, sampler.G, steering.layers).to(sampler.device)
        strength = steering.strength or (1.0, 1.0)
        if steering.is_range:
            return source, direction_sweep(source, direction, strength)
        source = dataclasses.replace(source, shift=strength[0] * direction)
    if not isinstance(source, SeedSource):
        return source, None
    if steering.class_sweep is not None:
        if len(steering.class_sweep) < 2:
            raise UserError('--class-sweep: name at least two classes, such as 0,3')
        return source, class_sweep(source, steering.class_sweep)
    if steering.truncation_sweep is not None:
        for psi in steering.truncation_sweep:
            check_truncation(sampler.G, psi, '--truncation-sweep')
        return source, truncation_sweep(source, steering.truncation_sweep)
    return source, None


def check_layers(sampler: Sampler, layers: Sequence[int] | None) -> None:
    """Raise UserError unless --layers names ws of the network."""
    if layers is not None and (not layers or max(layers) >= sampler.G.num_ws):
        raise UserError(f'--layers: name at least one of the ws of this network, 0 to '
                        f'{sampler.G.num_ws - 1}')


def write_video(sampler: Sampler, subject: Sweep | SampleSource, job: ImageJob) -> None:
    """Write the video of a sweep, or of a walk through all images of a source."""
    if isinstance(subject, Sweep):
        count, table = len(subject.keys[0]), job.video_grid
        if table is not None and table[0] * table[1] != count:
            raise UserError(f'--video-grid={table[0]}x{table[1]}: the sweep has {count} images')
        height, width = np.broadcast_to(sampler.G.img_resolution, 2).tolist()
        columns = table[0] if table else sheet_columns(max(count, 1), (0, height, width))
        walk = walk_of_sweep(subject, job.video)
    else:
        columns, rows = job.video_grid or (1, 1)
        walk = walk_through(subject, columns * rows, job.video)
    path = Path(make_folder(job.outdir), str(job.video.file_name))
    write_walk(path, sampler, walk, columns, job.batch, job.video)


def write_directions(sampler: Sampler, source: SeedSource, job: ImageJob) -> None:
    """Write directions.npz, and per seed a sheet with one row per direction."""
    steering = job.steering
    layers = range(sampler.G.num_ws) if steering.layers is None else steering.layers
    found = find_directions(
        sampler, str(steering.find_directions), steering.num_directions, layers,
        source.classes or range(sampler.G.c_dim))
    folder = make_folder(job.outdir)
    found.save(folder / 'directions.npz')
    for index in range(len(source)):
        rows = [(direction_sweep(source, found.shift(row, sampler.G.num_ws).to(sampler.device),
                                 steering.strength or DIRECTION_STRENGTH), index)
                for row in range(len(found.directions))]
        captions = [[f'{row} {sweep.label(position)}' for position in sweep.columns(steering.columns)]
                    for row, (sweep, _) in enumerate(rows)]
        write_sheet(sampler, rows, folder / f'directions-{source.name(index)}.png', job.batch,
                    steering.columns, captions if job.captions else None)
    words = [f'--network={job.network}', f'--outdir={folder}', '--seeds=0-7',
             f'--direction={folder / "directions.npz"}:0']
    write(f'Wrote {len(found.directions)} directions and {len(source)} sheets of them to {folder}\n'
          f'Next: python generate.py {shlex.join(words)}')
