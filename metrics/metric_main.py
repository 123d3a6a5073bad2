# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics; computing and reporting of results.

A metric is a function of MetricOptions that returns {result name: value}, registered under its name. If
several processes share the work, all call it, and the result of rank 0 counts.
"""
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from dnnlib import progress
from dnnlib.util import EasyDict, UserError, format_time
from metrics import formulas
from metrics.data_key import data_key, whole_dataset
from metrics.detectors import INCEPTION, VGG16
from metrics.feature_stats import Features, FeatureStats, generated_statistics, real_statistics
from metrics.metric_utils import MetricOptions, generate_images
from metrics.perceptual_path import path_distances
from metrics.sliced_wasserstein import SlicedWasserstein

SWD_IMAGES = 1024  # of each set
MAX_REAL_KID, MAX_REAL_MANIFOLD = 1_000_000, 200_000
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NUM_NEIGHBOURS, IS_SPLITS = 3, 10
PUBLISHED_KEYS = ('results', 'metric', 'total_time', 'total_time_str', 'num_gpus')

MOMENTS = Features(INCEPTION)
POOLED = Features(INCEPTION, keep=True)
PROBABILITIES = Features(INCEPTION, {'no_output_bias': True}, keep=True)
# As published, features of manifolds are rounded to half precision, which also halves their memory.
MANIFOLD = Features(VGG16, keep=True, dtype=torch.float16)

Metric = Callable[[MetricOptions], dict[str, float]]
_METRICS: dict[str, Metric] = {}


def register_metric(function: Metric, name: str | None = None) -> Metric:
    """Decorator: register a function as a metric, by default under its own name."""
    _METRICS[name or function.__name__] = function
    return function


def is_valid_metric(metric: str) -> bool:
    """Whether the metric is registered."""
    return metric in _METRICS


def list_valid_metrics() -> list[str]:
    """Names of all metrics."""
    return list(_METRICS)


def calc_metric(metric: str, **options: Any) -> EasyDict:
    """Compute one metric: results, metric, total_time (s), total_time_str, num_gpus; then seed, device,
    versions, and where used data_key and detector_sha256. Results are comparable if these are equal.

    options: see MetricOptions. Raises UserError for an unknown name, DetectorMissingError for an unavailable
    feature network.
    """
    if metric not in _METRICS:
        raise UserError(f'unknown metric {metric!r}; use one or more of {", ".join(_METRICS)}')
    start = time.monotonic()
    metric_options = MetricOptions(**options)
    share = metric_options.share
    results = share.from_first(
        {name: float(value) for name, value in _METRICS[metric](metric_options).items()})
    seconds = time.monotonic() - start
    return EasyDict(
        results=EasyDict(results), metric=metric, total_time=seconds, total_time_str=format_time(seconds),
        num_gpus=share.num_processes, seed=metric_options.seed, device=str(metric_options.device),
        versions={'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__,
                  'scipy': scipy.__version__},
        **metric_options.provenance)


def report_metric(
    result: dict[str, Any], run_dir: str | os.PathLike | None = None, snapshot_pkl: str | None = None,
) -> None:
    """Print a result as one JSON line, and append it to metric-<name>.jsonl in run_dir if that is a
    folder. The published fields come first.
    """
    if run_dir is not None and snapshot_pkl is not None:
        snapshot_pkl = os.path.relpath(snapshot_pkl, run_dir)
    published = {key: result[key] for key in PUBLISHED_KEYS}
    line = json.dumps({**published, 'snapshot_pkl': snapshot_pkl, 'timestamp': time.time(),
                       **{key: value for key, value in result.items() if key not in PUBLISHED_KEYS}})
    progress.write(line)
    if run_dir is not None and os.path.isdir(run_dir):
        with open(Path(run_dir) / f'metric-{result["metric"]}.jsonl', 'a', encoding='utf-8') as file:
            file.write(line + '\n')


def _real_and_generated(
    options: MetricOptions, features: Features, num_generated: int, max_real: int | None, *, keep_xflip: bool,
) -> tuple[FeatureStats | None, FeatureStats | None]:
    """Statistics of real and generated images; None except on rank 0."""
    dataset = whole_dataset(options.dataset, keep_xflip=keep_xflip)
    real = real_statistics(options, dataset, features, max_real)
    return real, generated_statistics(options, features, num_generated)


def fid(
    options: MetricOptions, name: str, num_generated: int, max_real: int | None = None, *,
    keep_xflip: bool = False,
) -> dict[str, float]:
    """Frechet distance of Inception features: all real images, or max_real of them."""
    real, fake = _real_and_generated(options, MOMENTS, num_generated, max_real, keep_xflip=keep_xflip)
    if real is None or fake is None:
        return {}
    return {name: formulas.frechet_distance(*real.mean_cov(), *fake.mean_cov())}


def kid(
    options: MetricOptions, name: str, num_generated: int, max_real: int = MAX_REAL_KID, *,
    keep_xflip: bool = False,
) -> dict[str, float]:
    """Kernel distance of Inception features, not multiplied by 1000."""
    real, fake = _real_and_generated(options, POOLED, num_generated, max_real, keep_xflip=keep_xflip)
    if real is None or fake is None:
        return {}
    rng = np.random.RandomState(options.seed)
    return {name: formulas.kernel_distance(
        real.features().numpy(), fake.features().numpy(), KID_SUBSETS, KID_SUBSET_SIZE, rng)}


def manifold(
    options: MetricOptions, name: str, formula: Callable[..., tuple[float, float]], parts: tuple[str, str],
    num_generated: int, max_real: int = MAX_REAL_MANIFOLD, *, keep_xflip: bool = False,
) -> dict[str, float]:
    """Two results of a formula on VGG16 features: <name>_<part> each."""
    real, fake = _real_and_generated(options, MANIFOLD, num_generated, max_real, keep_xflip=keep_xflip)
    if real is None or fake is None:
        return {}
    values = formula(real.features().to(options.device), fake.features().to(options.device), NUM_NEIGHBOURS)
    return {f'{name}_{part}': value for part, value in zip(parts, values, strict=True)}


def inception(options: MetricOptions, name: str, num_generated: int) -> dict[str, float]:
    """Inception score: <name>_mean, <name>_std. Uses generated images only."""
    fake = generated_statistics(options, PROBABILITIES, num_generated)
    if fake is None:
        return {}
    mean, deviation = formulas.inception_score(fake.features().numpy(), IS_SPLITS)
    return {f'{name}_mean': mean, f'{name}_std': deviation}


def ppl(
    options: MetricOptions, name: str, num_samples: int, *, space: str, full: bool, crop: bool,
) -> dict[str, float]:
    """Perceptual path length in 'z' or 'w', over the full paths or at their ends."""
    distances = path_distances(options, num_samples, space=space, full=full, crop=crop)
    return {} if distances is None else {name: formulas.path_length(distances)}


def register_row(function: Callable[..., dict[str, float]], name: str, *args: Any, **kwargs: Any) -> None:
    """Register function(options, name, ...) as a metric."""
    register_metric(lambda options: function(options, name, *args, **kwargs), name)


PRECISION_RECALL = (formulas.precision_recall, ('precision', 'recall'))
DENSITY_COVERAGE = (formulas.density_coverage, ('density', 'coverage'))

register_row(fid, 'fid50k_full', 50_000)
register_row(kid, 'kid50k_full', 50_000)
register_row(manifold, 'pr50k3_full', *PRECISION_RECALL, 50_000)
register_row(ppl, 'ppl2_wend', 50_000, space='w', full=False, crop=False)
register_row(inception, 'is50k', 50_000)
register_row(fid, 'fid50k', 50_000, 50_000, keep_xflip=True)
register_row(kid, 'kid50k', 50_000, 50_000, keep_xflip=True)
register_row(manifold, 'pr50k3', *PRECISION_RECALL, 50_000, 50_000, keep_xflip=True)
register_row(ppl, 'ppl_zfull', 50_000, space='z', full=True, crop=True)
register_row(ppl, 'ppl_wfull', 50_000, space='w', full=True, crop=True)
register_row(ppl, 'ppl_zend', 50_000, space='z', full=False, crop=True)
register_row(ppl, 'ppl_wend', 50_000, space='w', full=False, crop=True)
register_row(fid, 'fid5k_full', 5000)
register_row(kid, 'kid5k_full', 5000)
register_row(manifold, 'dc50k3_full', *DENSITY_COVERAGE, 50_000)


@register_metric
def swd(options: MetricOptions) -> dict[str, float]:
    """Sliced Wasserstein distance over Laplacian pyramid patches: cheap, and needs no feature network."""
    if options.share.rank != 0:
        return {}
    if 'swd' not in options.cache:
        rows = np.random.default_rng(options.seed).permutation(len(options.dataset))[:SWD_IMAGES]
        pixels = np.stack([options.dataset[int(i)][0] for i in np.sort(rows)])
        options.cache['swd'] = SlicedWasserstein(pixels, SWD_IMAGES, options.seed)
        options.cache['swd_data_key'] = data_key(options.dataset)
    options.provenance['data_key'] = options.cache['swd_data_key']
    reference = options.cache['swd']
    return reference.distance(generate_images(
        options.G, reference.num_images, options.dataset, options.device, options.seed))
