# SPDX-License-Identifier: Apache-2.0
"""Time from the start of train.py to the end of its first tick, with nothing compiled yet and once more.

python benchmarks/first_tick.py --cfg=auto --resolution=256 --device=cuda
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import common
import numpy as np

from dnnlib.cli import run_command
from dnnlib.image_io import save_png
from dnnlib.util import UserError
from torch_utils.misc import pick_device

NUM_IMAGES = 64
POLL_SEC = 0.05


def make_images(folder, side):
    """NUM_IMAGES of noise."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, [NUM_IMAGES, 3, side, side], dtype=np.uint8)
    for number, image in enumerate(pixels):
        save_png(folder / f'{number}.png', image)


def first_tick(folder, name, device, options):
    """Seconds until stats.jsonl of a new run has a line; the run is ended then."""
    environment = os.environ | {'DNNLIB_CACHE_DIR': str(folder / 'cache')}
    command = [sys.executable, 'train.py', f'--outdir={folder / name}', f'--data={folder / "images"}',
               f'--device={device}', '--metrics=none', '--snap=1000', *options]
    log = folder / f'{name}.log'
    start = time.perf_counter()
    with open(log, 'wb') as output:
        process = subprocess.Popen(
            command, cwd=common.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not any(path.stat().st_size for path in (folder / name).glob('*/stats.jsonl')):
            if process.poll() is not None:
                text = log.read_text(errors='replace').strip().splitlines() or ['']
                raise UserError(f'train.py ended before its first tick: {text[-1]}')
            time.sleep(POLL_SEC)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


@click.command(context_settings={'show_default': True})
@click.option('--cfg', default='auto', help='Preset of train.py.')
@click.option('--resolution', default=256, help='Side of the images.')
@click.option('--device', default='auto', type=click.Choice(['auto', 'cuda', 'cpu']))
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
@click.argument('options', nargs=-1)
def main(cfg, resolution, device, json_path, options):
    """Print seconds to the first tick. OPTIONS: of train.py, after --."""
    device = pick_device(device)
    with tempfile.TemporaryDirectory() as place:
        make_images(Path(place, 'images'), resolution)
        rows = [{'cfg': cfg, 'resolution': resolution, 'cache': name, 'first_tick_sec': first_tick(
            Path(place), name, device.type, [f'--cfg={cfg}', *options])} for name in ('empty', 'full')]
    common.write_json(json_path, device, rows)
    common.print_table(rows)


if __name__ == '__main__':
    run_command(main)
