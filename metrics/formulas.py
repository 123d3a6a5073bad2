# SPDX-License-Identifier: Apache-2.0
"""The formulas of the metrics, from arrays of features or distances to numbers. No networks, no files."""
import numpy as np
import scipy.linalg
import torch

from dnnlib.util import UserError

RANK_TOLERANCE = 1e-14  # relative to the largest variance; smaller ones are rounding errors of zero
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 8192  # bound the memory of a block of pairwise distances


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray,
) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, Eq. 6), never negative:
    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    mean: [F], cov: [F, F], float64. With cov1 = A A^T the trace of the square root is the sum of the square
    roots of the eigenvalues of the symmetric A^T cov2 A. The published matrix square root takes tens of times
    as long, and fails or becomes complex for singular covariances.
    """
    factor = torch.from_numpy(_factor(np.asarray(cov1, dtype=np.float64)))
    second = torch.from_numpy(np.asarray(cov2, dtype=np.float64))
    product = factor.T @ second @ factor
    shared = torch.linalg.eigvalsh((product + product.T) / 2).numpy()
    gap = np.asarray(mean1, dtype=np.float64) - mean2
    distance = gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return max(float(distance), 0.0)


def _factor(cov: np.ndarray) -> np.ndarray:
    """A of cov = A A^T, [F, rank]: a pivoted Cholesky factorisation, largest variances first, which stops at
    the rank of a singular covariance.
    """
    tolerance = RANK_TOLERANCE * cov.diagonal().max()
    packed, order, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1, tol=tolerance)
    factor = np.zeros([len(cov), rank])
    factor[order - 1] = np.tril(packed)[:, :rank]
    return factor


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, num_subsets: int, max_subset_size: int,
    rng: np.random.RandomState,
) -> float:
    """Kernel inception distance (Binkowski et al. 2018, Sec. 4): the unbiased estimate of the squared MMD
    with kernel (x . y / F + 1)^3; can be negative for equal distributions.

    real, fake: [N, F].  Mean over random subsets of min(N, N', max_subset_size) rows of each. Draws from
    `rng` in the published order: fake first.
    """
    size = min(len(real), len(fake), max_subset_size)
    if size < 2:
        raise UserError(f'a kernel distance needs at least 2 samples of each set, not {size}; add images')
    total = 0.0
    for _ in range(num_subsets):
        x = fake[rng.choice(len(fake), size, replace=False)].astype(np.float64)
        y = real[rng.choice(len(real), size, replace=False)].astype(np.float64)
        within = _kernel(x, x) + _kernel(y, y)
        total += (within.sum() - np.trace(within)) / (size - 1) - 2 * _kernel(x, y).sum() / size
    return float(total / num_subsets / size)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real: torch.Tensor, fake: torch.Tensor, num_neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1-2) of features [N, F]: each the share of
    one set inside the manifold of the other, 1 for equal sets.
    """
    return (_coverage_by(real, _radii(real, num_neighbours), fake)[0],
            _coverage_by(fake, _radii(fake, num_neighbours), real)[0])


def density_coverage(real: torch.Tensor, fake: torch.Tensor, num_neighbours: int = 3) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, Sec. 3) of features [N, F]: 1 for equal sets.

    Density: mean number of real neighbourhoods that contain a generated sample, divided by num_neighbours;
    may exceed 1.  Coverage: share of real neighbourhoods that contain a generated sample.
    """
    radii = _radii(real, num_neighbours)
    # In the authors' code neighbourhoods are open balls; those of precision and recall are closed.
    radii = radii.nextafter(torch.zeros_like(radii))
    _, counts, covered = _coverage_by(real, radii, fake)
    return counts / (num_neighbours * len(fake)), covered / len(real)


def _radii(features: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Distance of each row to its `num_neighbours`-th nearest other row, [N]."""
    if len(features) <= num_neighbours:
        raise UserError(f'{num_neighbours} neighbours need more than {num_neighbours} samples, not '
                        f'{len(features)}; add images')
    radii = []
    for probes in features.split(BLOCK_ROWS):
        nearest = None
        for rows in features.split(BLOCK_COLUMNS):
            block = _distances(probes, rows)
            block = block if nearest is None else torch.cat([nearest, block], dim=1)
            # The row itself, at distance 0, is one of them.
            nearest = block.topk(min(num_neighbours + 1, block.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _coverage_by(manifold: torch.Tensor, radii: torch.Tensor, probes: torch.Tensor) -> tuple[float, int, int]:
    """(share of probes in a neighbourhood, (neighbourhood, probe) pairs, neighbourhoods with a probe)."""
    is_inside = torch.zeros(len(probes), dtype=torch.bool, device=probes.device)
    num_pairs = num_reached = 0
    # In the order and blocks of _radii(), so that equal pairs get bitwise equal distances.
    for members, reach in zip(manifold.split(BLOCK_ROWS), radii.split(BLOCK_ROWS), strict=True):
        has_probe = torch.zeros(len(members), dtype=torch.bool, device=members.device)
        for start in range(0, len(probes), BLOCK_COLUMNS):
            part = slice(start, start + BLOCK_COLUMNS)
            within = _distances(members, probes[part]) <= reach[:, None]
            is_inside[part] |= within.any(dim=0)
            has_probe |= within.any(dim=1)
            num_pairs += int(within.sum())
        num_reached += int(has_probe.sum())
    return int(is_inside.sum()) / len(probes), num_pairs, num_reached


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # By a matrix product, which is many times faster; centring avoids cancellation.
    x, y = x.float(), y.float()
    center = y[:1]
    return torch.cdist(x - center, y - center, compute_mode='use_mm_for_euclid_dist')


def inception_score(probs: np.ndarray, num_splits: int = 10) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016, Sec. 4): (mean, deviation) over splits. probs: [N, classes].

    A class of probability 0 contributes nothing (published: the score becomes NaN).
    """
    probs, scores = np.asarray(probs, dtype=np.float64), []
    if len(probs) < num_splits:
        raise UserError(f'{num_splits} splits need {num_splits} samples or more, not {len(probs)}')
    for i in range(num_splits):
        part = probs[i * len(probs) // num_splits:(i + 1) * len(probs) // num_splits]
        gap = _safe_log(part) - _safe_log(part.mean(axis=0, keepdims=True))
        scores.append(np.exp((part * gap).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _safe_log(x: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(x, np.finfo(np.float64).tiny))


def path_length_limits(distances: np.ndarray) -> tuple[float, float]:
    """1st and 99th percentile, rounded outwards to values that occur in the data."""
    low = np.percentile(distances, 1, method='lower')
    return float(low), float(np.percentile(distances, 99, method='higher'))


def path_length(distances: np.ndarray) -> float:
    """Mean of the distances [N] between the 1st and 99th percentile (StyleGAN, Sec. 4.1)."""
    low, high = path_length_limits(distances)
    kept = distances[(distances >= low) & (distances <= high)]
    return float(kept.astype(np.float64).mean())


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of a and b [..., D], normalised (StyleGAN, Sec. 4.1). t: [..., 1]."""
    a, b = _unit(a), _unit(b)
    cosine = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1)
    across = _unit(b - cosine * a)
    angle = t * cosine.acos()
    return _unit(a * angle.cos() + across * angle.sin())


def _unit(x: torch.Tensor) -> torch.Tensor:
    # Equal directions give a zero vector, which must stay zero.
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def perceptual_image(img: torch.Tensor, *, crop: bool) -> torch.Tensor:
    """Input of the perceptual network for img [N, C, H, W] in [-1, 1]: float32 [N, C, h, w] in [0, 255].

    crop: to the centre, where faces are. Then box downsampling by shorter side (before the crop) // 256.
    """
    height, width = img.shape[2:]
    if crop:
        rows, columns = height // 8, width // 8
        img = img[:, :, 3 * rows:7 * rows, 2 * columns:6 * columns]
    factor = min(height, width) // 256
    if factor > 1:
        img = torch.nn.functional.avg_pool2d(img, factor)
    return (img.float() + 1) * 127.5
