# SPDX-License-Identifier: Apache-2.0
"""Time the formula of FID for 2048 features: by eigenvalues, as used, and by a matrix square root.

python benchmarks/fid.py --threads=2
"""
import statistics
import time

import click
import common
import numpy as np
import scipy.linalg
import torch

from dnnlib.cli import run_command
from metrics.formulas import frechet_distance


def moments(num_samples, num_features, seed):
    """Mean and covariance of features whose spread falls over three decades, as that of real ones does."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal([num_samples, num_features], dtype=np.float32)
    x = torch.from_numpy(x @ rng.standard_normal([num_features] * 2, dtype=np.float32))
    x = (x * torch.logspace(0, -3, num_features)).double()
    mean = x.mean(dim=0)
    return mean.numpy(), (x.T @ x / num_samples - torch.outer(mean, mean)).numpy()


def by_square_root(mean1, cov1, mean2, cov2):
    """The published way, here for comparison only."""
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root.real))


WAYS = {'eigenvalues': frechet_distance, 'square root': by_square_root}


def measure(way, arguments, repeats):
    """(median seconds, the distance)."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        value = WAYS[way](*arguments)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), value


@click.command(context_settings={'show_default': True})
@click.option('--features', default=2048, help='Of the feature network: 2048 for Inception.')
@click.option('--threads', default=2, help='Of torch; those of SciPy follow OMP_NUM_THREADS.')
@click.option('--repeats', default=3, help='Timings of each way; their median counts.')
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def main(features, threads, repeats, json_path):
    """Print seconds, for regular covariances and for singular ones of fewer samples than features."""
    torch.set_num_threads(threads)
    rows = []
    for kind, num_samples in [('regular', 5 * features), ('singular', features // 2)]:
        arguments = (*moments(num_samples, features, 0), *moments(num_samples, features, 1))
        for way in WAYS:
            seconds, value = measure(way, arguments, repeats)
            rows.append({'variant': f'{way}, {kind}', 'features': features, 'seconds': seconds, 'fid': value})
    common.write_json(json_path, 'cpu', rows)
    common.print_table(rows)


if __name__ == '__main__':
    run_command(main)
