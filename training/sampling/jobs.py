# SPDX-License-Identifier: Apache-2.0
"""The options of generate.py and style_mixing.py, and which of them exclude each other. Needs no torch."""
from collections.abc import Sequence
from dataclasses import dataclass

from dnnlib.cli_options import LabelOptions, VideoOptions
from dnnlib.util import UserError

MAX_TABLE_CELLS = 100_000


def is_archive(outdir: str) -> bool:
    """Whether --outdir names a .zip."""
    return outdir.endswith('.zip')


@dataclass(frozen=True)
class GeneratorJob:
    """The options of `dnnlib.cli_options.generator_options` and `video_options`."""

    network: str
    outdir: str
    trunc: float
    label: LabelOptions
    noise_mode: str
    captions: bool
    device: str
    batch: int
    cuda_graphs: str
    trust_pickle: bool
    video: VideoOptions


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
            raise UserError('--strength needs a direction; give --direction=FILE:N too')
        if self.layers is not None and self.direction is None and self.find_directions is None:
            raise UserError('--layers needs a direction; give --direction or --find-directions too')
        given = self.modes()
        if len(given) > 1:
            raise UserError(f'{" and ".join(given)} exclude each other; give one of them')
        if is_projected and given and given[0] != '--strength=A:B':
            raise UserError(f'{given[0]} needs --seeds and cannot be combined with --projected-w')

    def modes(self) -> list[str]:
        """The given options that replace plain images by something else."""
        modes = {'--find-directions': self.find_directions, '--truncation-sweep': self.truncation_sweep,
                 '--class-sweep': self.class_sweep, '--strength=A:B': self.is_range or None}
        return [name for name, value in modes.items() if value is not None]

    @property
    def is_range(self) -> bool:
        """Whether --direction is swept from one strength to another."""
        return (self.direction is not None and self.strength is not None
                and self.strength[0] != self.strength[1])


@dataclass(frozen=True)
class ImageJob(GeneratorJob):
    """The options of generate.py."""

    seeds: Sequence[int] | None
    projected_w: tuple[str, ...]
    classes: Sequence[int] | None
    grid: bool
    steering: Steering
    video_grid: tuple[int, int] | None

    def check(self) -> None:
        """Raise UserError for options that are missing or contradict each other, whatever the network."""
        if self.seeds is None and not self.projected_w and not self.steering.find_directions:
            raise UserError('--seeds is required unless --projected-w is given; for example --seeds=0-35')
        self.label.check([] if self.classes is None else ['--classes'])
        if self.classes is not None and not self.classes:
            raise UserError('--classes is an empty range; name at least one class')
        self.steering.check(is_projected=bool(self.projected_w))
        self.video.check(self.outdir)
        given = [*(['--video'] if self.video.file_name is not None else []), *self.steering.modes()]
        if is_archive(self.outdir) and (given or self.grid):
            raise UserError(f'--outdir={self.outdir}: a dataset can only hold images; give a folder for '
                            f'{(given or ["--grid"])[0]}')
        if self.grid and given:
            raise UserError(f'--grid cannot be combined with {given[0]}; drop one of them')
        if self.video.file_name is not None and self.steering.find_directions:
            raise UserError('--find-directions cannot be combined with --video; find directions first, then '
                            'make a video with --direction')
        if self.video.file_name is None and self.video_grid is not None:
            raise UserError('--video-grid needs --video; give --video=NAME too')


@dataclass(frozen=True)
class MixingJob(GeneratorJob):
    """The options of style_mixing.py."""

    rows: Sequence[int]
    cols: Sequence[int]
    styles: Sequence[int] | None

    def check(self) -> None:
        """Raise UserError for options that contradict each other, whatever the network."""
        self.label.check()
        self.video.check(self.outdir)
        if not self.rows or not self.cols or (len(self.rows) + 1) * (len(self.cols) + 1) > MAX_TABLE_CELLS:
            raise UserError(f'--rows and --cols make a table of {len(self.rows)} x {len(self.cols)}; both '
                            f'must name a seed, and the table can have at most {MAX_TABLE_CELLS} cells')
        if is_archive(self.outdir):
            raise UserError(f'--outdir={self.outdir}: must be a folder, not a .zip')
