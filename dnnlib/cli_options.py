# SPDX-License-Identifier: Apache-2.0
"""Command-line options shared by several scripts: lists of numbers, opening a generator, videos."""
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from dnnlib.util import UserError
from dnnlib.video import check_video

MAX_SEED = 2 ** 32 - 1  # of NumPy's RandomState, which turns a seed into a latent


class NumberList(click.ParamType):
    """`a-b` (inclusive; empty if b < a) or `a,b,c`: integers from 0 to `maximum`."""

    name = 'a-b or a,b,c'

    def __init__(self, maximum: int = MAX_SEED):
        self.maximum = maximum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> Sequence[int]:
        """The numbers, in the given order; a usage error for any other text."""
        if not isinstance(value, str):
            return value
        span = re.fullmatch(r'(\d+)-(\d+)', value.strip(), re.ASCII)
        if span is not None:
            first, last = int(span[1]), int(span[2])
            # Not a list: a mistyped huge range must not fill the memory.
            numbers: Sequence[int] = range(first, last + 1)
            largest = max(first, last)
        elif re.fullmatch(r'\s*\d+\s*(,\s*\d+\s*)*', value, re.ASCII):
            numbers = [int(text) for text in value.split(',')]
            largest = max(numbers)
        else:
            self.fail(f'{value!r} is neither a range such as 0-15 nor a list such as 3,7,85', param, ctx)
        if largest > self.maximum:
            self.fail(f'{value!r}: numbers must be from 0 to {self.maximum}', param, ctx)
        return numbers


class ValueRange(click.ParamType):
    """`a:b`, or one number `a` for (a, a): finite numbers, in any order."""

    name = 'a:b'

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> tuple[float, float]:
        """(first, last); a usage error for any other text."""
        if not isinstance(value, str):
            return value
        try:
            numbers = [float(text) for text in value.split(':')]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)):
            self.fail(f'{value!r} is neither a number such as 2 nor a range such as -3:3', param, ctx)
        return numbers[0], numbers[-1]


class TableSize(click.ParamType):
    """`COLUMNSxROWS`, each at least 1."""

    name = 'columns x rows'

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> tuple[int, int]:
        """(columns, rows); a usage error for any other text."""
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r'([1-9]\d{0,3})x([1-9]\d{0,3})', value.strip(), re.ASCII)
        if match is None:
            self.fail(f'{value!r} is not a size such as 3x2: columns, x, rows', param, ctx)
        return int(match[1]), int(match[2])


class GroupedCommand(click.Command):
    """A command whose help groups the options under headings; the default heading is 'Options'."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per heading, in order of first use."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                groups.setdefault(getattr(param, 'group', 'Options'), []).append(row)
        # 'Options' comes last: it contains only --help.
        for heading in sorted(groups, key='Options'.__eq__):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


class GroupedOption(click.Option):
    """An option under a heading of the help."""

    def __init__(self, *args: Any, group: str = 'Options', **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


def option(group: str, *names: str, **kwargs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """click.option under a heading of the help of a GroupedCommand."""
    return click.option(*names, cls=GroupedOption, group=group, **kwargs)


def generator_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options shared by scripts that open a generator and write images."""
    network, images = functools.partial(option, 'Network and output'), functools.partial(option, 'Images')
    options = [
        network('--network', required=True, metavar='FILE|URL',
                help='Network file whose G_ema to use: .pkl, .safetensors or .pt; path, URL or hf://user/repo.'),
        network('--outdir', required=True, metavar='DIR', help='Output directory.'),
        images('--trunc', type=float, default=1, show_default=True, metavar='PSI',
                 help='Truncation psi: less diversity and more typical images below 1.'),
        images('--class', 'class_idx', type=int, metavar='INDEX',
                 help='Class label; required by conditional networks.'),
        images('--noise-mode', type=click.Choice(['const', 'random', 'none']), default='const',
                 show_default=True, help='Noise: const, as saved with the network; random, per seed; none.'),
        network('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto',
                show_default=True, help='auto: GPU if available.'),
        network('--batch', type=click.IntRange(min=1), default=1, show_default=True, metavar='N',
                help='Batch size: larger is faster; some pixels may round differently.'),
        network('--cuda-graphs', type=click.Choice(['auto', 'off']), default='auto', show_default=True,
                help='Replay the generator as CUDA graphs, with the same images. auto: on a GPU.'),
        network('--trust-pickle', is_flag=True,
                help='Execute the code inside the network file. Only for files from a trusted source.')]
    return _apply(options, command)


@dataclass(frozen=True)
class VideoOptions:
    """Values of --video and its related options, by option name."""

    file_name: str | None = None  # --video
    interpolation: str = 'linear'
    loop: bool = False
    easing: str = 'none'
    step_frames: int = 60
    fps: float = 30
    video_scale: int = 1
    background: str | None = None

    def check(self, outdir: str) -> None:
        """Raise UserError for a video that cannot be written."""
        if self.file_name is None:
            needless = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
            if needless:
                raise UserError(f'--{needless[0].replace("_", "-")} is for videos; give --video=NAME too')
            return
        if outdir.endswith('.zip'):
            raise UserError(f'--video={self.file_name}: --outdir={outdir} must be a directory')
        check_video(Path(outdir, self.file_name), self.fps, self.background)


def collected(command: Callable[..., None], argument: str, kind: type) -> Callable[..., None]:
    """The command with all options that are fields of the dataclass `kind` combined in one argument."""
    names = [field.name for field in fields(kind)]

    @functools.wraps(command)
    def joined(**kwargs: Any) -> None:
        command(**{argument: kind(**{name: kwargs.pop(name) for name in names})}, **kwargs)

    return joined


def video_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options of a video, passed to the command as one argument `video`, a VideoOptions."""
    add = functools.partial(option, 'Video')
    default = VideoOptions()
    options = [
        add('--video', 'file_name', metavar='NAME', help='Write a video to --outdir instead of images. NAME '
            'ends in .mp4, .webm or .gif; without a suffix it is a folder of PNG frames.'),
        add('--interpolation', type=click.Choice(['linear', 'cubic', 'slerp']), show_default=True,
            default=default.interpolation, help='linear or cubic (spline) between ws, or slerp (spherical) '
            'between zs.'),
        add('--loop', is_flag=True, help='Close the loop from the last to the first.'),
        add('--easing', type=click.Choice(['none', 'smooth']), default=default.easing, show_default=True,
            help='smooth: slow down at each seed (class, end of a sweep).'),
        add('--step-frames', type=click.IntRange(1, 100_000), default=default.step_frames, show_default=True,
            metavar='N', help='Frames from one seed (class, end of a sweep) to the next.'),
        add('--fps', type=float, default=default.fps, show_default=True, metavar='RATE',
            help='Frames per second.'),
        add('--video-scale', type=click.IntRange(1, 64), default=default.video_scale, show_default=True,
            metavar='N', help='Enlarge each pixel to N x N, for small networks.'),
        add('--background', metavar='COLOR', help='Background of transparent pixels, such as white or '
            '#80C0FF.  [default: white; PNG frames stay transparent]')]
    return _apply(options, collected(command, 'video', VideoOptions))


def _apply(options: Sequence[Callable], command: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(options):
        command = decorate(command)
    return command
