# SPDX-License-Identifier: Apache-2.0
"""The work of calc_metrics.py: the metrics of a network file, computed by one or several processes."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.launched import is_launched
from dnnlib.util import UserError
from metrics import metric_main
from metrics.detectors import DetectorMissingError, load_detector, write_bundle
from metrics.metric_utils import all_processes
from torch_utils import distributed, misc
from torch_utils.misc import keep_freed_memory, pick_device
from training.config.values import parse_metrics
from training.dataset import ImageFolderDataset, find_dataset
from training.formats.load import load_network, network_path
from training.report.page import read_options

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


def write_offline_bundle(folder: str, detector_dir: str | None) -> None:
    """Write --offline-bundle and print its files. Raises UserError."""
    for path in write_bundle(folder, detector_dir):
        click.echo(path)


def check_network(network: str | None) -> str:
    """The value of --network, or the newest snapshot of a run. Raises UserError if there is no such file."""
    if network is None:
        raise UserError('--network is required, such as --network=network-snapshot-000500.pkl')
    path = network_path(network)
    if '://' not in path and not os.path.exists(path):
        raise UserError(f'--network={network}: no such file; give a network file, a run directory or a URL')
    return path


def check_gpus(gpus: int, started: int, device_type: str) -> None:
    """Raise UserError unless `gpus` processes can run here, `started` of them by torchrun."""
    if started not in (1, gpus):
        raise UserError(f'--gpus={gpus}, but torchrun started {started} processes; omit --gpus')
    if device_type == 'cuda' and started == 1 and gpus > torch.cuda.device_count():
        available = torch.cuda.device_count()
        raise UserError(f'--gpus={gpus}: this machine has {available}; use --gpus={available}')


def run(metrics: str, network: str | None, gpus: int | None, **rest: Any) -> None:
    """Evaluate as the options of calc_metrics.py say. Raises UserError."""
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


def run_job(job: MetricsJob) -> None:
    """Compute and report the metrics, as one of job.num_gpus processes."""
    with distributed.Group(pick_device(job.device), job.num_gpus, job.timeout) as group:
        keep_freed_memory(group.device)
        compute_metrics(job, group.device)


def compute_metrics(job: MetricsJob, device: torch.device) -> None:
    """Compute the metrics together with the other processes; rank 0 reports them.

    Metrics whose feature network is missing are known before anything is computed. Raises
    DetectorMissingError for them, after the others.
    """
    share = all_processes()
    # One process decides for all: each would wait for the others in the metrics that it computes.
    missing = share.from_first(missing_detectors(job, device) if share.rank == 0 else None)
    names = [name for name in job.metrics if metric_main.detector_of(name) not in missing]
    skipped = [name for name in job.metrics if name not in names]
    reason = f'--metrics: no {", ".join(skipped)}: {"; ".join(missing.values())}'
    if skipped and not names:
        raise DetectorMissingError(reason)
    if skipped and share.rank == 0:
        click.echo(f'Note: {reason}', err=True)
    evaluate(job, names, device)
    if skipped:
        raise DetectorMissingError(f'--metrics: not computed: {", ".join(skipped)}, for the reason above')


def missing_detectors(job: MetricsJob, device: torch.device) -> dict[str, str]:
    """File name -> reason, for each feature network of the metrics that cannot be had."""
    missing = {}
    for name in dict.fromkeys(filter(None, map(metric_main.detector_of, job.metrics))):
        try:
            load_detector(name, device, job.detector_dir)
        except DetectorMissingError as error:
            missing[name] = str(error)
    return missing


def evaluate(job: MetricsJob, names: Sequence[str], device: torch.device) -> None:
    """Compute and report metrics, all of whose feature networks are there."""
    # Results must not depend on rounding to TF32 or on which kernel was fastest.
    misc.set_gpu_arithmetic(cudnn_benchmark=False, allow_tf32=False)
    found = load_network(job.network, trust_pickle=job.trust_pickle, only=['G_ema'])
    if found.G_ema is None:
        raise UserError(f'--network={job.network}: contains no G_ema; give a network snapshot')
    G = found.G_ema.eval().requires_grad_(requires_grad=False).to(device)
    run_dir, cache = run_dir_of(job.network), {}
    dataset = open_dataset(job, recorded_data(found.training_set_kwargs, run_dir), G)
    if job.verbose and distributed.rank() == 0:
        click.echo(f'{len(dataset)} images of {dataset.name}; {job.num_gpus} x {device.type}', err=True)
        misc.print_module_summary(G, [torch.empty([1, size], device=device) for size in (G.z_dim, G.c_dim)])
    distributed.note_phase('metrics')
    for name in names:
        if job.verbose and distributed.rank() == 0:
            click.echo(f'Calculating {name}...', err=True)
        result = metric_main.calc_metric(
            name, G=G, dataset=dataset, device=device, seed=job.seed, cache=cache,
            detector_dir=job.detector_dir, share=all_processes(), cuda_graphs=job.cuda_graphs)
        if distributed.rank() == 0:
            metric_main.report_metric(result, run_dir=run_dir, snapshot_pkl=job.network)
    if run_dir is not None and names and job.verbose and distributed.rank() == 0:
        click.echo(f'Appended to metric-*.jsonl in {run_dir}', err=True)


def recorded_data(noted: Any, run_dir: str | None) -> dict[str, Any] | None:
    """Options of the training data in a run directory, or in a network file if they are not here.

    Snapshots of this program hold only the name of the dataset, not its path.
    """
    found = [data for data in (data_of_run(run_dir), noted)
             if isinstance(data, dict) and isinstance(data.get('path'), str) and data['path']]
    here = [data for data in found if os.path.exists(data['path'])]
    return (here or found or [None])[0]


def open_dataset(job: MetricsJob, noted: dict[str, Any] | None, G: torch.nn.Module) -> ImageFolderDataset:
    """The dataset of --data, else the one `noted` in the network file or its run, with G's size and labels.

    Of the recorded settings only plain options are used, not the class name. Raises UserError.
    """
    if job.data is not None:
        options = {'path': find_dataset(job.data)}
    elif noted:
        options = {key: noted[key] for key in DATA_OPTIONS if key in noted}
    else:
        raise UserError(f'--data is required: neither {job.network} nor its directory records its training '
                        'data')
    options.update(resolution=G.img_resolution, use_labels=G.c_dim != 0)
    if job.mirror is not None:
        options['xflip'] = job.mirror
    if job.data is None and not os.path.exists(str(options['path'])):
        raise UserError(f'--data is required: the network was trained on {str(options["path"])!r}, which is '
                        'not here; give its images')
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
    data = read_options(Path(run_dir)).get('training_set_kwargs')
    return data if isinstance(data, dict) else None
