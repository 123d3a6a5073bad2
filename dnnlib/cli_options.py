# SPDX-License-Identifier: Apache-2.0
"""Command-line options shared by several scripts: lists of numbers, opening a generator, labels, videos."""
import functools
import itertools
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
MAX_LISTED = 1_000_000  # numbers that are kept in memory
MAX_SHOWN = 60  # characters of a value in a message
MAX_FLOAT32 = 3.4e38
HELP_WIDTH = 110
METAVARS = {'integer': 'N', 'float': 'X', 'boolean': 'BOOL', 'text': 'TEXT'}  # by click's name of the type

SETTING_METAVARS = {'outdir': 'DIR', 'data': 'DIR|ZIP', 'detector-dir': 'DIR', 'metrics': 'NAMES',
                    'resume': 'FILE|URL'}  # of options of train.py


class NumberList(click.ParamType):
    """`a-b` (inclusive; empty if b < a), `a,b,c`, or both as in `1,3-5`: integers from 0 to `maximum`."""

    name = 'list'

    def __init__(self, maximum: int = MAX_SEED):
        self.maximum = maximum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> Sequence[int]:
        """The numbers, in the given order; a usage error for any other text."""
        if not isinstance(value, str):
            return value
        parts = [re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', part, re.ASCII) for part in value.split(',')]
        shown = repr(value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + '...')
        if None in parts:
            self.fail(f'{shown} is neither a range such as 0-15 nor a list such as 3,7,85 or 1,3-5', param,
                      ctx)
        digits = [text for part in parts for text in part.groups() if text is not None]
        # Lengths first: Python refuses to read thousands of digits.
        if any(len(text.lstrip('0')) > len(str(self.maximum)) or int(text) > self.maximum for text in digits):
            self.fail(f'{shown}: numbers must be from 0 to {self.maximum}', param, ctx)
        spans = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts]
        # Not a list: a mistyped huge range must not fill the memory.
        if len(spans) == 1 and parts[0][2] is not None:
            return spans[0]
        if not all(spans):
            self.fail(f'{shown}: a range must go upwards, such as 3-5', param, ctx)
        if sum(map(len, spans)) > MAX_LISTED:
            self.fail(f'{shown}: a list can have at most {MAX_LISTED} numbers; use one range', param, ctx)
        return list(itertools.chain(*spans))


class NumberTuple(click.ParamType):
    """`x,y,...`: numbers that fit into float32."""

    name = 'x,x,...'

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> tuple[float, ...]:
        """The numbers; a usage error for any other text."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(text) for text in value.split(','))
        except ValueError:
            numbers = ()
        if not numbers or not all(abs(number) <= MAX_FLOAT32 for number in numbers):
            self.fail(f'{value[:MAX_SHOWN]!r} is not a list of finite numbers such as 0.3,1', param, ctx)
        return numbers


class ValueRange(click.ParamType):
    """`a:b`, or one number `a` for (a, a): finite numbers, in any order."""

    name = 'x:x'

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

    name = 'nxn'

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

    def __init__(self, *args: Any, context_settings: dict[str, Any] | None = None, **kwargs: Any):
        settings = {'terminal_width': HELP_WIDTH, **(context_settings or {})}
        super().__init__(*args, context_settings=settings, **kwargs)

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
    """An option under a heading of the help. Without a metavar it gets that of its type in METAVARS."""

    def __init__(self, *args: Any, group: str = 'Options', **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group
        if self.metavar is None and not self.is_flag:
            self.metavar = METAVARS.get(self.type.name.removesuffix(' range'))


def option(group: str, *names: str, **kwargs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """click.option under a heading of the help of a GroupedCommand."""
    return click.option(*names, cls=GroupedOption, group=group, **kwargs)


def setting(row: Any) -> GroupedOption:
    """The option for a row of training.config.OPTIONS, under its group."""
    text = f'{row.help}  [default: {row.default}]' if row.default else row.help
    # Checked later: a resumed run does not need it again.
    text += '  [required]' if row.required else ''
    kind = click.Choice(row.kind) if isinstance(row.kind, tuple) else row.kind
    # As in the other scripts, --strict alone is --strict=1.
    flag = {'is_flag': False, 'flag_value': True} if kind is bool else {}
    return GroupedOption([f'--{row.name}'], group=row.group, type=kind, help=text,
                         metavar=SETTING_METAVARS.get(row.name), **flag)


def generator_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options shared by scripts that open a generator and write images."""
    network, images = functools.partial(option, 'Network and output'), functools.partial(option, 'Images')
    options = [
        network('--network', required=True, metavar='FILE|URL',
                help='Network file whose G_ema to use, or a run directory: its newest snapshot; path, URL or '
                     'hf://user/repo.'),
        network('--outdir', required=True, metavar='DIR', help='Output directory.'),
        images('--trunc', type=float, default=1, show_default=True,
               help='Truncation psi. Below 1: more typical, less diverse images.'),
        *label_rows(images, 'a random one per seed'),
        images('--noise-mode', type=click.Choice(['const', 'random', 'none']), default='const',
               show_default=True, help='Noise: const, as saved with the network; random, per seed; none.'),
        images('--captions', is_flag=True, help='Write seed and class under each image of a sheet.'),
        network('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto',
                show_default=True, help='auto: GPU if available.'),
        network('--batch', type=click.IntRange(min=1), default=1, show_default=True,
                help='Batch size. Larger is faster, but some pixels may round differently.'),
        network('--cuda-graphs', type=click.Choice(['auto', 'off']), default='auto', show_default=True,
                help='Replay the generator as CUDA graphs; images are the same. auto: on GPU.'),
        network('--trust-pickle', is_flag=True,
                help='Execute the code inside the network file. Only for files from a trusted source.')]
    return _apply(options, collected(command, 'label', LabelOptions))


@dataclass(frozen=True)
class LabelOptions:
    """Values of --class, a number or a name, and --label."""

    class_name: str | None = None
    vector: tuple[float, ...] | None = None

    def check(self, others: Sequence[str] = ()) -> None:
        """Raise UserError if more than one of them and of `others`, options that are given, is given."""
        values = {'--class': self.class_name, '--label': self.vector}
        given = [*others, *(name for name, value in values.items() if value is not None)]
        if len(given) > 1:
            raise UserError(f'{given[1]} and {given[0]} exclude each other; give one of them')


def label_rows(add: Callable[..., Callable], default: str) -> list[Callable]:
    """The options of `LabelOptions`.  add: `option`, with its group.  default: without, as help says it."""
    return [
        add('--class', 'class_name', metavar='N|NAME',
            help=f'Class, by number or by name.  [default: {default}]'),
        add('--label', 'vector', type=NumberTuple(), help='Label vector, for networks trained with vectors '
            'instead of classes, such as 0.3,1.')]


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
        add('--loop', is_flag=True, help='Return from the last seed to the first, for seamless looping.'),
        add('--easing', type=click.Choice(['none', 'smooth']), default=default.easing, show_default=True,
            help='smooth: slow down at each seed, class or end of a sweep.'),
        add('--step-frames', type=click.IntRange(1, 100_000), default=default.step_frames, show_default=True,
            help='Frames from one seed, class or end of a sweep to the next.'),
        add('--fps', type=float, default=default.fps, show_default=True,
            help='Frames per second.'),
        add('--video-scale', type=click.IntRange(1, 64), default=default.video_scale, show_default=True,
            help='Enlarge each pixel to N x N, for small networks.'),
        add('--background', metavar='COLOR', help='Background of transparent pixels, such as white or '
            '#80C0FF.  [default: white; PNG frames stay transparent]')]
    return _apply(options, collected(command, 'video', VideoOptions))


def _apply(options: Sequence[Callable], command: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(options):
        command = decorate(command)
    return command
