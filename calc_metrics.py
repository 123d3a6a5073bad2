# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained network: python calc_metrics.py --metrics=fid50k_full --network=net.pkl --data=x.zip"""
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import run_command
from dnnlib.launched import is_launched
from dnnlib.util import UserError
from metrics import metric_main
from metrics.detectors import write_bundle
from metrics.metric_utils import all_processes
from torch_utils import distributed, misc
from torch_utils.misc import keep_freed_memory, pick_device
from training.config.values import parse_metrics
from training.dataset import ImageFolderDataset, find_dataset
from training.formats.load import find_network, load_network

# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python calc_metrics.py --network=runs/00000-x/network-snapshot-000500.pkl --metrics=fid50k_full,pr50k3_full
  python calc_metrics.py --network=net.pkl --data=images.zip --mirror=1 --metrics=swd --seed=1
  python calc_metrics.py --offline-bundle=detectors
'''
DATA_OPTIONS = ('path', 'resolution', 'use_labels', 'xflip', 'max_size', 'random_seed')


@dataclass(frozen=True)
class MetricsJob:
    """Options of an evaluation, passed to every process."""

    metrics: tuple[str, ...]
    network: str
    data: str | None
    mirror: bool | None
    device: str
    num_gpus: int
    seed: int
    detector_dir: str | None
    verbose: bool
    trust_pickle: bool
    timeout: float
    cuda_graphs: str


@click.command(epilog=EXAMPLES, context_settings={'terminal_width': 110})
@click.option('--network', metavar='FILE|URL', help='Network file whose G_ema to evaluate.')
@click.option('--metrics', default='fid50k_full', show_default=True, metavar='NAMES',
              help='Comma-separated, or none: ' + ', '.join(metric_main.list_valid_metrics()) + '.')
@click.option('--data', metavar='DIR|ZIP',
              help='Training images.  [default: the dataset recorded in the network file or its run]')
@click.option('--mirror', type=bool, metavar='BOOL',
              help='Include mirrored images in real-data statistics.  [default: as recorded, unless --data]')
@click.option('--gpus', type=click.IntRange(min=1), metavar='N',
              help='Number of processes, one per GPU.  [default: 1; under torchrun its number of processes]')
@click.option('--verbose', type=bool, default=True, show_default=True, metavar='BOOL',
              help='Print progress and a summary of the generator.')
@click.option('--seed', type=click.IntRange(min=0), default=0, show_default=True,
              help='Random seed of latents, labels and subsets: same seed, same result.')
@click.option('--detector-dir', metavar='DIR', help='Directory to search first for the feature networks.')
@click.option('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
              help='auto: GPU if available.')
@click.option('--cuda-graphs', type=click.Choice(['auto', 'off']), default='auto', show_default=True,
              help='Replay the generator as CUDA graphs. auto: on a GPU.')
@click.option('--timeout', type=click.FloatRange(min=0.1), default=distributed.TIMEOUT_SEC, show_default=True,
              help='Abort once one process has stalled the others for this many seconds.')
@click.option('--trust-pickle', is_flag=True,
              help='Execute the code inside the network file. Only for files from a trusted source.')
@click.option('--offline-bundle', metavar='DIR',
              help='Only download the feature networks with checksums to DIR, for use as --detector-dir.')
def calc_metrics(
    metrics: str, network: str | None, gpus: int | None, offline_bundle: str | None, **rest: Any,
) -> None:
    """Evaluate the quality of a trained network.

    Prints one line of JSON per metric, and appends it to metric-NAME.jsonl in the network's run directory.
    """
    if offline_bundle is not None:
        for path in write_bundle(offline_bundle, rest['detector_dir']):
            click.echo(path)
        return
    # Under torchrun a user error is printed by one process only.
    with distributed.Reporting():
        started = int(os.environ['WORLD_SIZE']) if is_launched() else 1
        gpus = gpus or started
        job = MetricsJob(
            metrics=parse_metrics(metrics), network=check_network(network), num_gpus=gpus, **rest)
        check_gpus(gpus, started, pick_device(job.device).type)
        if gpus > started:
            distributed.launch(run_job, (job,), gpus)
        else:
            run_job(job)


def check_network(network: str | None) -> str:
    """The value of --network. Raises UserError if it is missing, or names a file that is."""
    if network is None:
        raise UserError('--network is required, such as --network=network-snapshot-000500.pkl')
    found = find_network(network)
    if '://' not in network and not os.path.isfile(found):
        raise UserError(f'--network={network}: no such file; give a network file or a URL')
    return found


def check_gpus(gpus: int, started: int, device_type: str) -> None:
    """Raise UserError unless `gpus` processes can run here, `started` of them by torchrun."""
    if started not in (1, gpus):
        raise UserError(f'--gpus={gpus}, but torchrun started {started} processes; omit --gpus')
    if device_type == 'cuda' and started == 1 and gpus > torch.cuda.device_count():
        available = torch.cuda.device_count()
        raise UserError(f'--gpus={gpus}: this machine has {available}; use --gpus={available}')


def run_job(job: MetricsJob) -> None:
    """Compute and report the metrics, as one of job.num_gpus processes."""
    with distributed.Group(pick_device(job.device), job.num_gpus, job.timeout) as group:
        keep_freed_memory(group.device)
        compute_metrics(job, group.device)


def compute_metrics(job: MetricsJob, device: torch.device) -> None:
    """Compute the metrics together with the other processes; rank 0 reports them."""
    # Results must not depend on rounding to TF32 or on which kernel was fastest.
    misc.set_gpu_arithmetic(cudnn_benchmark=False, allow_tf32=False)
    found = load_network(job.network, trust_pickle=job.trust_pickle, only=['G_ema'])
    if found.G_ema is None:
        raise UserError(f'--network={job.network}: contains no G_ema; give a network snapshot')
    G = found.G_ema.eval().requires_grad_(requires_grad=False).to(device)
    run_dir, cache = run_dir_of(job.network), {}
    dataset = open_dataset(job, found.training_set_kwargs or data_of_run(run_dir), G)
    if job.verbose and distributed.rank() == 0:
        click.echo(f'{len(dataset)} images of {dataset.name}; {job.num_gpus} x {device.type}', err=True)
        misc.print_module_summary(G, [torch.empty([1, size], device=device) for size in (G.z_dim, G.c_dim)])
    distributed.note_phase('metrics')
    for name in job.metrics:
        if job.verbose and distributed.rank() == 0:
            click.echo(f'Calculating {name}...', err=True)
        result = metric_main.calc_metric(
            name, G=G, dataset=dataset, device=device, seed=job.seed, cache=cache,
            detector_dir=job.detector_dir, share=all_processes(), cuda_graphs=job.cuda_graphs)
        if distributed.rank() == 0:
            metric_main.report_metric(result, run_dir=run_dir, snapshot_pkl=job.network)


def open_dataset(job: MetricsJob, noted: dict[str, Any] | None, G: torch.nn.Module) -> ImageFolderDataset:
    """The dataset of --data, else the one `noted` in the network file or its run, with G's size and labels.

    Of the recorded settings only plain options are used, not the class name. Raises UserError.
    """
    if job.data is not None:
        options = {'path': find_dataset(job.data)}
    elif noted and noted.get('path'):
        options = {key: noted[key] for key in DATA_OPTIONS if key in noted}
    else:
        raise UserError(f'--data is required: neither {job.network} nor its directory records its training '
                        'data')
    options.update(resolution=G.img_resolution, use_labels=G.c_dim != 0)
    if job.mirror is not None:
        options['xflip'] = job.mirror
    try:
        dataset = ImageFolderDataset(**options)
    # TypeError: a file may record options of wrong types.
    except (TypeError, ValueError) as error:
        raise UserError(f'--data: {error}') from error
    if dataset.num_channels != G.img_channels or dataset.label_dim != G.c_dim:
        raise UserError(
            f'--data: images of {options["path"]} have {dataset.num_channels} channels and labels of '
            f'length {dataset.label_dim}, but the network has {G.img_channels} and {G.c_dim}; give its '
            'training data')
    return dataset


def run_dir_of(network: str) -> str | None:
    """The directory of a local network file if it is a run directory."""
    if '://' in network:
        return None
    # Resolved, so that a bare file name inside the run directory works (published: nothing is written then).
    folder = Path(network).resolve().parent
    return str(folder) if (folder / 'training_options.json').is_file() else None


def data_of_run(run_dir: str | None) -> dict[str, Any] | None:
    """The dataset in a run's training_options.json, since converted networks may record none."""
    if run_dir is None:
        return None
    try:
        noted = json.loads(Path(run_dir, 'training_options.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    data = noted.get('training_set_kwargs') if isinstance(noted, dict) else None
    return data if isinstance(data, dict) else None


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(calc_metrics, args)


if __name__ == '__main__':
    main()
