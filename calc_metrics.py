# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained network: python calc_metrics.py --metrics=fid50k_full --network=net.pkl --data=x.zip"""
import functools
from typing import Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import GroupedCommand
from dnnlib.cli_options import option as grouped_option
from training.config import TrainConfig
from training.config.values import METRICS

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python calc_metrics.py --network=network-snapshot-000500.pkl --metrics=fid50k_full,pr50k3_full
  python calc_metrics.py --network=net.pkl --data=images.zip --mirror=1 --metrics=swd --seed=1
  python calc_metrics.py --offline-bundle=detectors
'''

option = functools.partial(grouped_option, 'Options')


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@option('--network', metavar='FILE|URL',
        help='Network file whose G_ema to evaluate, or a run directory: its newest snapshot.')
@option('--metrics', default='fid50k_full', show_default=True, metavar='NAMES',
        help='Comma-separated, or none: ' + ', '.join(METRICS) + '.')
@option('--data', metavar='DIR|ZIP',
        help='Training images.  [default: the dataset recorded in the network file or its run]')
@option('--mirror', type=bool,
        help='Include mirrored images in real-data statistics.  [default: as recorded, unless --data]')
@option('--gpus', type=click.IntRange(min=1),
        help='Number of processes, one per GPU.  [default: 1; under torchrun its number of processes]')
@option('--verbose', type=bool, default=True, show_default=True,
        help='Print progress and a summary of the generator.')
@option('--seed', type=click.IntRange(min=0), default=0, show_default=True,
        help='Random seed of latents, labels and subsets: same seed, same result.')
@option('--detector-dir', metavar='DIR', type=click.Path(exists=True, file_okay=False),
        help='Directory to search first for the feature networks.')
@option('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
        help='auto: GPU if available.')
@option('--cuda-graphs', type=click.Choice(['auto', 'off']), default='auto', show_default=True,
        help='Replay the generator as CUDA graphs. auto: on GPU.')
@option('--timeout', type=click.FloatRange(min=0.1), default=TrainConfig.timeout_sec, show_default=True,
        help='Abort once one process has stalled the others for this many seconds.')
@option('--trust-pickle', is_flag=True,
        help='Execute the code inside the network file. Only for files from a trusted source.')
@option('--offline-bundle', metavar='DIR',
        help='Only download the feature networks with checksums to DIR, for use as --detector-dir.')
def calc_metrics(
    metrics: str, network: str | None, gpus: int | None, offline_bundle: str | None, **rest: Any,
) -> None:
    """Evaluate the quality of a trained network.

    Prints one line of JSON per metric, and appends it to metric-NAME.jsonl in the network's run directory.
    """
    # Imported late: importing torch takes seconds, which --help should not.
    from metrics import evaluation
    if offline_bundle is not None:
        evaluation.write_offline_bundle(offline_bundle, rest['detector_dir'])
        return
    evaluation.run(metrics, network, gpus, **rest)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(calc_metrics, args)


if __name__ == '__main__':
    main()
