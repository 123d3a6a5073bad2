# SPDX-License-Identifier: Apache-2.0
"""Generate images from a trained network: from seeds or projected w; sweeps, videos, and directions."""
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

from dnnlib.cli import run_command
from dnnlib.cli_options import (
    GroupedCommand,
    NumberList,
    TableSize,
    ValueRange,
    VideoOptions,
    collected,
    generator_options,
    option,
    video_options,
)
from dnnlib.util import UserError, make_folder
from training.formats.load import check_truncation
from training.sampling.directions import find_directions, read_direction
from training.sampling.output import is_archive, sheet_columns, write_images, write_sheet, write_sweep
from training.sampling.sampler import Sampler, open_sampler
from training.sampling.sources import (
    ProjectedSource,
    SampleSource,
    SeedSource,
    Sweep,
    class_sweep,
    direction_sweep,
    read_projected_w,
    truncation_sweep,
)
from training.sampling.walks import walk_of_sweep, walk_through, write_walk

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python generate.py --outdir=out --network=network-snapshot-000500.pkl --seeds=0-35 --grid
  python generate.py --outdir=out --network=net.pkl --seeds=85,265,297 --trunc=0.7 --class=3
  python generate.py --outdir=set.zip --network=net.pkl --seeds=0-49999 --classes=0-9 --batch=32
  python generate.py --outdir=out --network=net.pkl --seeds=1-6 --video=walk.mp4 --interpolation=cubic --loop
  python generate.py --outdir=out --network=net.pkl --seeds=0-7 --truncation-sweep=-1:1
  python generate.py --outdir=out --network=net.pkl --find-directions=sefa
  python generate.py --outdir=out --network=net.pkl --seeds=0-7 --direction=out/directions.npz:0
'''
DIRECTION_STRENGTH = (-3.0, 3.0)


@dataclass(frozen=True)
class Steering:
    """The options that vary images: sweeps, and moves along a direction."""

    truncation_sweep: tuple[float, float] | None
    class_sweep: Sequence[int] | None
    direction: str | None
    strength: tuple[float, float] | None
    layers: Sequence[int] | None
    columns: int
    find_directions: str | None
    num_directions: int

    def check(self, *, is_projected: bool) -> None:
        """Raise UserError for options that contradict each other."""
        if self.strength is not None and self.direction is None and self.find_directions is None:
            raise UserError('--strength needs a direction; give --direction=FILE:INDEX too')
        if self.layers is not None and self.direction is None and self.find_directions is None:
            raise UserError('--layers needs a direction; give --direction or --find-directions too')
        modes = {'--truncation-sweep': self.truncation_sweep, '--class-sweep': self.class_sweep,
                 '--strength=A:B': self.is_range or None, '--find-directions': self.find_directions}
        given = [name for name, value in modes.items() if value is not None]
        if len(given) > 1:
            raise UserError(f'{" and ".join(given)} exclude each other; give one of them')
        if is_projected and given and given[0] != '--strength=A:B':
            raise UserError(f'{given[0]} needs --seeds and cannot be combined with --projected-w')

    @property
    def is_range(self) -> bool:
        """Whether --direction is swept from one strength to another."""
        return (self.direction is not None and self.strength is not None
                and self.strength[0] != self.strength[1])


images, sweeps, videos = (partial(option, group) for group in ('Images', 'Sweeps and directions', 'Video'))


def steering_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options of `Steering`, passed to the command as one argument `steering`."""
    options = [
        sweeps('--truncation-sweep', type=ValueRange(), help='Sweep psi from A to B, one row per seed.'),
        sweeps('--class-sweep', type=NumberList(), help='Sweep through these classes, one row per seed.'),
        sweeps('--direction', metavar='FILE:INDEX', help='Move all ws along a direction of a file written '
               'by --find-directions.'),
        sweeps('--strength', type=ValueRange(), help='Distance in standard deviations; a range is a sweep.  '
               '[default: 1; -3:3 for the sheet of --find-directions]'),
        sweeps('--layers', type=NumberList(), help='Indices of the ws to move, or to find directions for.  '
               '[default: those of the file; all]'),
        sweeps('--columns', type=click.IntRange(2, 1000), default=7, show_default=True, metavar='N',
               help='Images per row of a sweep.'),
        sweeps('--find-directions', type=click.Choice(['sefa', 'pca']), help='Write directions.npz and a '
               'sheet of them. sefa: factorise the weights in closed form; pca: principal components of w.'),
        sweeps('--num-directions', type=click.IntRange(min=1), default=10, show_default=True, metavar='N',
               help='Number of directions to find.')]
    command = collected(command, 'steering', Steering)
    for decorate in reversed(options):
        command = decorate(command)
    return command


@click.command(cls=GroupedCommand, epilog=EXAMPLES, context_settings={'terminal_width': 110})
@generator_options
@images('--seeds', type=NumberList(), help='Random seeds, one image each, such as 0-35 or 85,265,297.')
@images('--projected-w', '--projected_w', metavar='FILE', multiple=True,
          help='Instead of seeds: .npz file with an array w [n, num_ws, w_dim], as written by projector.py. '
               'May be repeated.')
@images('--classes', type=NumberList(), help='Cycle through these classes: seed s gets class number s modulo '
          'their count.')
@images('--grid', is_flag=True, help='Also write grid.png, a contact sheet of all images.')
@steering_options
@video_options
@videos('--video-grid', type=TableSize(), help='Several walks side by side, each through its share of the '
        'seeds.  [default: 1x1; one cell per seed of a sweep]')
def generate_images(  # noqa: PLR0913
    network: str, outdir: str, trunc: float, class_idx: int | None, noise_mode: str, device: str, batch: int,
    trust_pickle: bool, cuda_graphs: str, seeds: Sequence[int] | None, projected_w: tuple[str, ...],
    classes: Sequence[int] | None, grid: bool, steering: Steering, video: VideoOptions,
    video_grid: tuple[int, int] | None,
) -> None:
    """Generate images from a trained network into a folder, or into a .zip that is a dataset."""
    # Check all options that do not depend on the network before loading it.
    if seeds is None and steering.find_directions:
        seeds = [0]
    if seeds is not None and is_archive(outdir) and not isinstance(seeds, range):
        seeds = list(dict.fromkeys(seeds))  # a .zip cannot hold two files of the same name
    if seeds is None and not projected_w:
        raise UserError('--seeds is required unless --projected-w is given; for example --seeds=0-35')
    steering.check(is_projected=bool(projected_w))
    video.check(outdir)
    check_output(outdir, grid, steering, video)
    sampler = open_sampler(network, device, noise_mode, trunc, trust_pickle, cuda_graphs)
    if projected_w:
        ignored = {'--seeds': seeds, '--class': class_idx, '--classes': classes}
        for name in [name for name, value in ignored.items() if value is not None]:
            click.echo(f'Warning: {name} is ignored, because --projected-w is given', err=True)
        w = torch.cat([read_projected_w(path, sampler.G) for path in projected_w])
        source: SampleSource = ProjectedSource(w.to(sampler.device))
    else:
        source = seed_source(sampler, seeds, class_idx, classes, steering)
    make_outputs(sampler, source, outdir, batch, grid, steering, video, video_grid)


def check_output(outdir: str, grid: bool, steering: Steering, video: VideoOptions) -> None:
    """Raise UserError for outputs that exclude each other."""
    modes = {'--video': video.file_name, '--find-directions': steering.find_directions,
            '--truncation-sweep': steering.truncation_sweep, '--class-sweep': steering.class_sweep,
            '--strength=A:B': steering.is_range or None}
    given = [name for name, value in modes.items() if value is not None]
    if is_archive(outdir) and (given or grid):
        raise UserError(f'--outdir={outdir}: a dataset can only hold images; give a folder for '
                        f'{(given or ["--grid"])[0]}')
    if grid and given:
        raise UserError(f'--grid cannot be combined with {given[0]}; drop one of them')
    if video.file_name is not None and steering.find_directions:
        raise UserError('--find-directions cannot be combined with --video; find directions first, then '
                        'make a video with --direction')


def seed_source(
    sampler: Sampler, seeds: Sequence[int], class_idx: int | None, classes: Sequence[int] | None,
    steering: Steering,
) -> SeedSource:
    """The source for --seeds with --class or --classes. Raises UserError if the network lacks a class."""
    if classes is not None and class_idx is not None:
        raise UserError('--class and --classes exclude each other; give one of them')
    if classes is not None and not classes:
        raise UserError('--classes is an empty range; name at least one class')
    for given, name in ((classes, '--classes'), (steering.class_sweep, '--class-sweep')):
        if given is not None:
            sampler.check_classes(given, name)
    if classes is not None:
        return SeedSource(sampler, seeds, classes)
    if steering.class_sweep is not None:
        return SeedSource(sampler, seeds, steering.class_sweep[:1])
    if steering.find_directions and class_idx is None and sampler.G.c_dim > 0:
        return SeedSource(sampler, seeds, range(sampler.G.c_dim))
    # Prints the published warning, or raises the published error.
    sampler.label(class_idx)
    return SeedSource(sampler, seeds, (class_idx if sampler.G.c_dim > 0 else None,))


def make_outputs(
    sampler: Sampler, source: SampleSource, outdir: str, batch: int, grid: bool, steering: Steering,
    video: VideoOptions, video_grid: tuple[int, int] | None,
) -> None:
    """Write the outputs selected by the options."""
    source, sweep = steer(sampler, source, steering)
    if video.file_name is not None:
        write_video(sampler, sweep or source, outdir, batch, video, video_grid)
    elif video_grid is not None:
        raise UserError('--video-grid needs --video; give --video=NAME too')
    elif steering.find_directions and isinstance(source, SeedSource):
        write_directions(sampler, source, outdir, batch, steering)
    elif sweep is not None:
        write_sweep(sampler, sweep, outdir, batch, steering.columns)
    elif not is_archive(outdir) or len(source) > 0:
        # The folder is created only now, so that a refused command leaves none behind.
        write_images(sampler, source, outdir, batch, with_sheet=grid)
    if len(source) == 0:
        click.echo('Warning: --seeds is an empty range; nothing to do', err=True)


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


def write_video(
    sampler: Sampler, subject: Sweep | SampleSource, outdir: str, batch: int, video: VideoOptions,
    video_grid: tuple[int, int] | None,
) -> None:
    """Write the video of a sweep, or of a walk through all images of a source."""
    if isinstance(subject, Sweep):
        count = len(subject.keys[0])
        if video_grid is not None and video_grid[0] * video_grid[1] != count:
            raise UserError(f'--video-grid={video_grid[0]}x{video_grid[1]}: the sweep has {count} images')
        height, width = np.broadcast_to(sampler.G.img_resolution, 2).tolist()
        columns = video_grid[0] if video_grid else sheet_columns(max(count, 1), (0, height, width))
        walk = walk_of_sweep(subject, video)
    else:
        columns, rows = video_grid or (1, 1)
        walk = walk_through(subject, columns * rows, video)
    write_walk(Path(make_folder(outdir), str(video.file_name)), sampler, walk, columns, batch, video)


def write_directions(
    sampler: Sampler, source: SeedSource, outdir: str, batch: int, steering: Steering,
) -> None:
    """Write directions.npz, and per seed a sheet with one row per direction."""
    layers = range(sampler.G.num_ws) if steering.layers is None else steering.layers
    found = find_directions(
        sampler, str(steering.find_directions), steering.num_directions, layers, source.classes)
    folder = make_folder(outdir)
    found.save(folder / 'directions.npz')
    for index in range(len(source)):
        rows = [(direction_sweep(source, found.shift(row, sampler.G.num_ws).to(sampler.device),
                                 steering.strength or DIRECTION_STRENGTH), index)
                for row in range(len(found.directions))]
        write_sheet(sampler, rows, folder / f'directions-{source.name(index)}.png', batch, steering.columns)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(generate_images, args)


if __name__ == '__main__':
    main()
