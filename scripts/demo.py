# SPDX-License-Identifier: Apache-2.0
"""The demo: train a small network on the bundled smileys, then show new ones beside real ones."""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

from dnnlib.launched import STOPPED
from training.dataset import ImageFolderDataset, find_dataset

ROOT = Path(__file__).resolve().parent.parent
OUTDIR = ROOT / 'demo-run'
DATA = 'smileys'
TIME_LIMIT = '175s'  # of training; a slow machine shows what it has learned by then
TRAINING = (f'--data={DATA}', '--mirror=1', '--cfg=demo', f'--time-limit={TIME_LIMIT}')
COLUMNS, ROWS = 6, 6  # of each half of the sheet
SCALE, MARGIN_PX = 3, 24
CAPTIONS = ('real: the network learned from these', 'generated: the network made these up')


def latest(pattern: str, folder: Path) -> Path:
    """The newest file or folder that matches."""
    return max(folder.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))


def run(script: str, *args: str) -> None:
    """Run one of the project's scripts; its failure is ours, unless it was only stopped by the clock."""
    process = subprocess.run([sys.executable, str(ROOT / script), *args], check=False, cwd=ROOT)
    if process.returncode != STOPPED:
        process.check_returncode()


def real_images(count: int) -> list[Image.Image]:
    """A random part of the images that the network learned from, the same each time."""
    dataset = ImageFolderDataset(find_dataset(DATA), max_size=count)
    return [Image.fromarray(dataset[i][0].transpose(1, 2, 0)) for i in range(len(dataset))]


def write_sheet(path: Path, *halves: list[Image.Image]) -> None:
    """Write the images of each list in a square with a caption, beside each other."""
    side = halves[0][0].width * SCALE
    width, height = COLUMNS * side, ROWS * side
    sheet = Image.new('RGB', (len(halves) * (width + MARGIN_PX) + MARGIN_PX, height + 2 * MARGIN_PX), 'white')
    for half, (images, caption) in enumerate(zip(halves, CAPTIONS, strict=True)):
        left = MARGIN_PX + half * (width + MARGIN_PX)
        ImageDraw.Draw(sheet).text((left, MARGIN_PX // 4), caption, fill='black')
        for i, image in enumerate(images):
            place = (left + i % COLUMNS * side, MARGIN_PX + i // COLUMNS * side)
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    sheet.save(path)


def main(args: list[str] | None = None) -> None:
    """Train, generate, and say where everything is; there are no options but --help."""
    argparse.ArgumentParser(description=f'{__doc__} Takes about three minutes; everything is '
                            f'written to {OUTDIR.name}.').parse_args(args)
    start = time.monotonic()
    print('Training a small StyleGAN2-ADA on 169 smileys; about three minutes.', flush=True)
    try:
        run('train.py', f'--outdir={OUTDIR}', *TRAINING)
        folder = latest(f'*-{DATA}-*', OUTDIR)
        network = latest('network-snapshot-*.pkl', folder)
        run('generate.py', f'--network={network}', f'--seeds=0-{COLUMNS * ROWS - 1}',
            '--trunc=0.7', f'--batch={COLUMNS * ROWS}', f'--outdir={folder / "generated"}')
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit('Stopped.')
    made = sorted((folder / 'generated').glob('seed*.png'))
    write_sheet(folder / 'sheet.png', real_images(COLUMNS * ROWS), [Image.open(path) for path in made])
    print(f'\nDone in {time.monotonic() - start:.0f} s. {how_to_go_on(folder, network)}')


def how_to_go_on(folder: Path, network: Path) -> str:
    """What lies where, and command lines that work as printed, from the current folder."""
    python, here, net = (os.path.relpath(path) for path in (sys.executable, folder, network))
    generate, train = (f'{python} {os.path.relpath(ROOT / name)}' for name in ('generate.py', 'train.py'))
    return f'''Look at:
  {here}/sheet.png              real smileys on the left, new ones on the right
  {here}/fakes_over_time.png    how they came about
  {here}/progress.html          curves and samples, for a browser
More smileys:
  {generate} --network={net} --seeds=1000-1099 --trunc=0.7 --grid --batch=25 --outdir=demo-out
Better smileys, in about twenty minutes:
  {train} --resume={here} --kimg=200 --time-limit=1h
Your own images: README.md, docs/first-hour.md'''


if __name__ == '__main__':
    main()
