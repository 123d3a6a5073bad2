# SPDX-License-Identifier: Apache-2.0
"""The demo: train a small network on the bundled emoji, then write a sheet of new ones."""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from dnnlib.launched import STOPPED

ROOT = Path(__file__).resolve().parent.parent
OUTDIR = ROOT / 'demo-run'
NUM_CLASSES = 9
NUM_IMAGES = NUM_CLASSES ** 2  # so that a column of the sheet has one class
TIME_LIMIT = '270s'  # of training; a slow machine shows what it has learned by then


def latest(pattern: str, folder: Path) -> Path:
    """The newest file or folder that matches."""
    return max(folder.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))


def run(script: str, *args: str) -> None:
    """Run one of the project's scripts; its failure is ours, unless it was only stopped by the clock."""
    process = subprocess.run([sys.executable, str(ROOT / script), *args], check=False, cwd=ROOT)
    if process.returncode != STOPPED:
        process.check_returncode()


def main(args: list[str] | None = None) -> None:
    """Train, generate, and say where everything is; there are no options but --help."""
    argparse.ArgumentParser(description=f'{__doc__} Takes at most five minutes; everything is '
                            f'written to {OUTDIR.name}.').parse_args(args)
    start = time.monotonic()
    print('Training a small StyleGAN2-ADA on 1,906 emoji; at most five minutes.', flush=True)
    try:
        run('train.py', f'--outdir={OUTDIR}', '--data=emoji32', '--cond=1', '--cfg=demo',
            f'--time-limit={TIME_LIMIT}')
        folder = latest('*-emoji32-cond-demo', OUTDIR)
        network = latest('network-snapshot-*.pkl', folder)
        run('generate.py', f'--network={network}', f'--seeds=0-{NUM_IMAGES - 1}', '--grid',
            f'--classes=0-{NUM_CLASSES - 1}',
            f'--outdir={folder / "generated"}')
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit('Stopped.')
    relative = os.path.relpath(folder)
    print(f'\nDone in {time.monotonic() - start:.0f} s. Look at:\n'
          f'  {relative}/generated/grid.png     new emoji, generated from random latents\n'
          f'  {relative}/reals.png              emoji that the network learned from\n'
          f'  {relative}/training_curves.png    losses, sign of D, augmentation and distance to the data\n'
          f'More: {os.path.relpath(sys.executable)} generate.py --network={os.path.relpath(network)} '
          '--class=6 --seeds=1000-1099 --outdir=out')


if __name__ == '__main__':
    main()
