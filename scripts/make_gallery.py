# SPDX-License-Identifier: Apache-2.0
"""Make the images of README.md, docs/generation.md and docs/first-hour.md: python -m scripts.make_gallery

From the bundled network, by the command lines in docs/generation.md, in a minute or two on two CPU cores.
--run=DIR, the run that the network is from: also its samples over training, and its curves.
"""
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image, ImageDraw

from dnnlib.cli import run_command
from dnnlib.util import UserError, make_folder, replace_file
from training.report.thumbnails import fake_sheets

ROOT = Path(__file__).resolve().parent.parent
NETWORK = '--network=emoji32'
SIDE = 32  # of an image of the network
SCALE, GAP_PX, CAPTION_PX = 2, 16, 20
MILESTONES = (10, 100, 1000)  # kimg
CURVES = 'training_curves.png'
PANEL = (5, 9)  # columns and rows that are shown of a sheet


@dataclass(frozen=True)
class Entry:
    """An image of the docs.  command: as docs/generation.md shows it.  made: its result, in --outdir."""

    name: str
    command: str
    made: str


DOCS = (
    Entry('generation_grid.png',
          'generate.py --network=emoji32 --outdir=out --seeds=0-80 --classes=0-8 --grid --batch=27',
          'grid.png'),
    Entry('generation_mixing.png',
          'style_mixing.py --network=emoji32 --outdir=out --class=6 --rows=1-4 --cols=11-16 --styles=0-3',
          'grid.png'),
    Entry('generation_truncation.png', 'generate.py --network=emoji32 --outdir=out --seeds=1-4 --class=6 '
          '--truncation-sweep=0:1.5 --columns=12', 'sweep.png'),
    Entry('generation_classes.png', 'generate.py --network=emoji32 --outdir=out --seeds=1-4 '
          '--class-sweep=2,6,7 --columns=12', 'sweep.png'),
    Entry('generation_directions.png', 'generate.py --network=emoji32 --outdir=out --seeds=3 --class=6 '
          '--find-directions=sefa --num-directions=4', 'directions-seed0003.png'),
    Entry('generation_walk.gif', 'generate.py --network=emoji32 --outdir=out --seeds=0-31 --class=6 '
          '--video=walk.gif --interpolation=cubic --loop --video-grid=8x1 --step-frames=8 --fps=10 '
          '--video-scale=3', 'walk.gif'),
)
# Caption, command without --network and --outdir, its result; of the image in the README.
HERO = (
    ('81 emoji that do not exist, one class per column',
     'generate.py --seeds=0-80 --classes=6,1,3,2,7,5,8,4,0 --grid --trunc=0.8 --batch=27', 'grid.png'),
    ('style mixing', 'style_mixing.py --class=6 --rows=1-4 --cols=11-16 --styles=0-3', 'grid.png'),
    ('truncation, psi from 0 to 1.2',
     'generate.py --seeds=1-3 --class=6 --truncation-sweep=0:1.2 --columns=7', 'sweep.png'),
)


def produce(command: str, made: str, folder: Path) -> Path:
    """Run a command of this project in a folder; the path of its result."""
    script, *args = shlex.split(command)
    subprocess.run([sys.executable, ROOT / script, *args], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return folder / 'out' / made


def enlarged(path: Path) -> Image.Image:
    """The image with SCALE x SCALE pixels for each of its own, or as it is if it shows larger ones."""
    image = Image.open(path).convert('RGB')
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """The image below a line of text."""
    result = Image.new('RGB', (image.width, image.height + CAPTION_PX), 'white')
    ImageDraw.Draw(result).text((2, 3), caption, fill='black')
    result.paste(image, (0, CAPTION_PX))
    return result


def joined(images: list[Image.Image], *, is_row: bool) -> Image.Image:
    """The images beside or below each other on white."""
    sizes = [image.size if is_row else image.size[::-1] for image in images]
    length, breadth = sum(size[0] + GAP_PX for size in sizes) - GAP_PX, max(size[1] for size in sizes)
    result = Image.new('RGB', (length, breadth) if is_row else (breadth, length), 'white')
    position = 0
    for image, (step, _) in zip(images, sizes, strict=True):
        result.paste(image, (position, 0) if is_row else (0, position))
        position += step + GAP_PX
    return result


def hero(folder: Path) -> Image.Image:
    """The image of the README: a sheet, beside style mixing and truncation."""
    panels = []
    for i, (caption, command, made) in enumerate(HERO):
        part = make_folder(folder / f'hero{i}')
        script, args = command.split(' ', 1)
        path = produce(f'{script} {NETWORK} --outdir=out {args}', made, part)
        panels.append(captioned(enlarged(path), caption))
    return joined([panels[0], joined(panels[1:], is_row=False)], is_row=True)


def over_training(run: Path) -> Image.Image:
    """Samples of the same latents at the sheets of a run that are closest to MILESTONES. Raises UserError."""
    sheets = {kimg: path for kimg, path in fake_sheets(run) if kimg > 0}
    if not sheets:
        raise UserError(f'--run={run}: no run directory with fakes*.png')
    last = max(sheets)
    chosen = {min(sheets, key=lambda kimg: abs(kimg - goal)) for goal in MILESTONES if goal <= last} | {last}
    size = (PANEL[0] * SIDE, PANEL[1] * SIDE)
    panels = []
    for kimg in sorted(chosen):
        image = Image.open(sheets[kimg]).convert('RGB').crop((0, 0, *size))
        large = image.resize((size[0] * SCALE, size[1] * SCALE), Image.Resampling.NEAREST)
        panels.append(captioned(large, f'{kimg:g} kimg'))
    return joined(panels, is_row=True)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG and say so."""
    with replace_file(path) as temporary:
        image.save(temporary, format='PNG', optimize=True)
    click.echo(path)


@click.command()
@click.option('--outdir', default=ROOT / 'docs' / 'images', type=click.Path(path_type=Path),
              help='Folder of the images.  [default: docs/images]')
@click.option('--run', type=click.Path(path_type=Path), help='Run directory of the bundled network.')
def main(outdir: Path, run: Path | None) -> None:
    """Make the images of the README and of docs/generation.md again."""
    outdir = make_folder(outdir)
    if run is not None:
        save(over_training(run), outdir / 'first_hour.png')
        save(Image.open(run / CURVES), outdir / 'emoji32_curves.png')
    with tempfile.TemporaryDirectory() as name:
        save(hero(Path(name)), outdir / 'hero.png')
        for entry in DOCS:
            path = produce(entry.command, entry.made, make_folder(Path(name, entry.name)))
            if path.suffix == '.png':
                save(enlarged(path), outdir / entry.name)
            else:
                with replace_file(outdir / entry.name) as temporary:
                    temporary.write_bytes(path.read_bytes())
                click.echo(outdir / entry.name)


if __name__ == '__main__':
    run_command(main)
