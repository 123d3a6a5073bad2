# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics, and how a result is computed and reported.

A metric is a function of MetricOptions that returns {result name: value}, registered under its name.
"""
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import progress
from dnnlib.util import EasyDict, UserError, format_time
from metrics.metric_utils import generate_images
from metrics.sliced_wasserstein import SlicedWasserstein
from torch_utils import distributed
from training.dataset import Dataset

# Names that the command line knows; each needs a feature network that this version cannot use yet.
DETECTOR_METRICS = (
    'fid50k_full', 'kid50k_full', 'pr50k3_full', 'ppl2_wend', 'is50k', 'fid50k', 'kid50k', 'pr50k3',
    'ppl_zfull',
    'ppl_wfull', 'ppl_zend', 'ppl_wend')


SWD_IMAGES = 1024  # of each set


@dataclass
class MetricOptions:
    """What a metric works on.

    G: a generator in eval mode on `device`.  dataset: the training pictures.  seed: of latents, labels and
    choices. cache: kept by the caller between calls with the same dataset; metrics put there what they know
    of it.
    """

    G: torch.nn.Module
    dataset: Dataset
    device: torch.device
    seed: int = 0
    cache: dict[str, Any] = field(default_factory=dict)


Metric = Callable[[MetricOptions], dict[str, float]]
_METRICS: dict[str, Metric] = {}


def register_metric(function: Metric) -> Metric:
    """Make a function known as the metric of its own name."""
    _METRICS[function.__name__] = function
    return function


def is_valid_metric(metric: str) -> bool:
    """Whether calc_metric can compute it."""
    return metric in _METRICS


def list_valid_metrics() -> list[str]:
    """Names that calc_metric can compute."""
    return list(_METRICS)


def calc_metric(metric: str, **options: Any) -> EasyDict:
    """Compute one metric: results, metric, total_time (s), total_time_str, num_gpus. options: see
    MetricOptions.

    Raises UserError for a name that is unknown, or whose feature network is missing.
    """
    if metric in DETECTOR_METRICS:
        raise UserError(f'{metric} needs a feature network, which this version does not load yet; '
                        f'--metrics={",".join(_METRICS)} works without')
    if metric not in _METRICS:
        raise UserError(f'unknown metric {metric!r}; known are {", ".join(_METRICS)}')
    start = time.monotonic()
    results = _METRICS[metric](MetricOptions(**options))
    seconds = time.monotonic() - start
    return EasyDict(
        results=EasyDict({name: float(value) for name, value in results.items()}), metric=metric,
        total_time=seconds,
        total_time_str=format_time(seconds), num_gpus=distributed.world_size())


def report_metric(
    result: dict[str, Any], run_dir: str | os.PathLike | None = None, snapshot_pkl: str | None = None,
) -> None:
    """Print a result as one JSON line, and append it to metric-<name>.jsonl in run_dir if that is a
    folder.
    """
    if run_dir is not None and snapshot_pkl is not None:
        snapshot_pkl = os.path.relpath(snapshot_pkl, run_dir)
    line = json.dumps({**result, 'snapshot_pkl': snapshot_pkl, 'timestamp': time.time()})
    progress.write(line)
    if run_dir is not None and os.path.isdir(run_dir):
        with open(Path(run_dir) / f'metric-{result["metric"]}.jsonl', 'a', encoding='utf-8') as file:
            file.write(line + '\n')


@register_metric
def swd(options: MetricOptions) -> dict[str, float]:
    """Sliced Wasserstein distance over Laplacian pyramid patches: cheap, and needs no feature network."""
    if 'swd' not in options.cache:
        rows = np.random.default_rng(options.seed).permutation(len(options.dataset))[:SWD_IMAGES]
        pixels = np.stack([options.dataset[int(i)][0] for i in np.sort(rows)])
        options.cache['swd'] = SlicedWasserstein(pixels, SWD_IMAGES, options.seed)
    reference = options.cache['swd']
    return reference.distance(generate_images(
        options.G, reference.num_images, options.dataset, options.device, options.seed))
