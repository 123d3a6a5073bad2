# SPDX-License-Identifier: Apache-2.0
"""What adaptive augmentation does for 200 images: two runs that differ in --aug only, a table and a figure.

python benchmarks/ada.py --outdir=ada-runs --docs=docs/images       # about twelve minutes on two CPU cores
"""
import json
import subprocess
import sys
from pathlib import Path

import click
import common
from matplotlib.figure import Figure
from PIL import Image

from dnnlib.cli import run_command

MODES = {'ada': '#0072b2', 'noaug': '#d55e00'}
ROWS = 8  # of each sheet that the figure shows


def train(outdir, mode, options):
    """The folder of the finished run, trained now unless it is there."""
    finished = list(outdir.glob(f'*-{mode}/network-snapshot-*.pkl'))
    if not finished:
        script = common.ROOT / 'train.py'
        subprocess.run([sys.executable, script, f'--outdir={outdir}', f'--aug={mode}', *options], check=True)
    return next(outdir.glob(f'*-{mode}'))


def ticks(folder):
    """The statistics of each tick of a run."""
    return [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]


def mean_of(tick, name):
    """A statistic of a tick."""
    return tick[name]['mean']


def plot(runs, path):
    """Mean sign of D on real images, and p, over the length of the training."""
    figure = Figure(figsize=(9, 3), layout='constrained')
    panels = figure.subplots(1, 2)
    names = ['Loss/signs/real', 'Progress/augment']
    for panel, name, title in zip(panels, names, ['mean sign of D on real images', 'p'], strict=True):
        for mode, folder in runs.items():
            rows = ticks(folder)[1:]  # the first is a single iteration
            panel.plot([mean_of(row, 'Progress/kimg') for row in rows], [mean_of(row, name) for row in rows],
                       label=f'--aug={mode}', color=MODES[mode])
        panel.set(title=title, xlabel='kimg')
        panel.grid(alpha=0.3)
    panels[0].axhline(0.6, color='gray', linestyle=':', label='--target')
    panels[0].legend()
    figure.savefig(path, dpi=100)


def join_sheets(runs, side, path):
    """The upper rows of the last sheets of all runs, side by side."""
    sheets = [Image.open(max(folder.glob('fakes0*.png'))) for folder in runs.values()]
    width, height = sheets[0].width, min(ROWS * side, sheets[0].height)
    joined = Image.new('RGB', (len(sheets) * (width + side) - side, height), 'white')
    for i, sheet in enumerate(sheets):
        joined.paste(sheet.crop((0, 0, width, height)), (i * (width + side), 0))
    joined.save(path)


@click.command(context_settings={'show_default': True})
@click.option('--outdir', type=click.Path(path_type=Path), required=True, help='Folder of the two runs.')
@click.option('--docs', type=click.Path(path_type=Path), help='Write the figures here.')
@click.option('--data', default='emoji32', help='Dataset of train.py.')
@click.option('--cfg', default='demo', help='Preset of train.py.')
@click.option('--subset', default=200, help='Number of images.')
@click.option('--kimg', default=60, help='Length of each run.')
@click.option('--tick', default=2.0, help='Kimg from one line of statistics to the next.')
def main(outdir, docs, **flags):
    """Train with and without augmentation; print what D thinks of the training images at the end."""
    options = [f'--{name}={value}' for name, value in flags.items()] + ['--snap=5']
    runs = {mode: train(outdir, mode, options) for mode in MODES}
    rows = []
    for mode, folder in runs.items():
        last = ticks(folder)[-1]
        metrics = (folder / 'metric-swd.jsonl').read_text().splitlines()
        rows.append({'aug': mode, 'kimg': mean_of(last, 'Progress/kimg'),
                     'sign_real': mean_of(last, 'Loss/signs/real'),
                     'score_real': mean_of(last, 'Loss/scores/real'),
                     'r1_penalty': mean_of(last, 'Loss/r1_penalty'), 'p': mean_of(last, 'Progress/augment'),
                     'swd': json.loads(metrics[-1])['results']['swd']})
    common.print_table(rows)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        plot(runs, docs / 'ada_signs.png')
        options = json.loads((runs['ada'] / 'training_options.json').read_text())
        side = options['training_set_kwargs']['resolution']
        join_sheets(runs, side, docs / 'ada_sheets.png')


if __name__ == '__main__':
    run_command(main)
