# SPDX-License-Identifier: Apache-2.0
"""The formulas against what others have written of them, on the same features.

torchmetrics (FID, KID, Inception score), prdc by the authors of density and coverage, SciPy's square root.
"""
import contextlib
import warnings

import numpy as np
import pytest
import torch

from metrics import formulas

NUM_FEATURES = 24
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:torchmetrics')


class Features(torch.nn.Module):
    """Stands for a feature network: gives back the features that it is shown as images."""

    num_features = NUM_FEATURES

    def forward(self, x):
        return x.flatten(1)[:, :NUM_FEATURES]


def sample(n, seed, scale=1.0, shift=0.0):
    """float32 [n, NUM_FEATURES] of correlated normal features."""
    rng = np.random.default_rng(seed)
    mix = np.eye(NUM_FEATURES) + 0.2 * np.random.default_rng(99).normal(size=[NUM_FEATURES] * 2)
    return (rng.normal(size=[n, NUM_FEATURES]) @ mix * scale + shift).astype(np.float32)


REAL = sample(300, 0)
OTHERS = {
    'the same source': sample(300, 1), 'shifted': sample(300, 2, shift=0.3),
    'narrow': sample(300, 3, scale=0.5),
    'wide': sample(300, 4, scale=1.6), 'fewer than features': sample(20, 5), 'equal': REAL}


@pytest.fixture(params=OTHERS)
def fake(request):
    return OTHERS[request.param]


def shown_to(metric, **sets):
    """The results of a torchmetrics metric, in double precision, of these features."""
    metric.set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the deviation of a single split
        for name, features in sets.items():
            kwargs = {} if name == 'only' else {'real': name == 'real'}
            metric.update(torch.from_numpy(features)[:, :, None, None], **kwargs)
        return metric.compute()


def torchmetrics_image(name):
    """A module of torchmetrics.image, which says many things on import."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip(f'torchmetrics.image.{name}', reason='pip install torchmetrics',
                                   exc_type=ImportError)


def moments(x, bias=False):
    x = x.astype(np.float64)
    return x.mean(axis=0), np.cov(x, rowvar=False, bias=bias)


def test_the_frechet_distance_is_that_of_torchmetrics(fake):
    metric = torchmetrics_image('fid').FrechetInceptionDistance(feature=Features(), antialias=False)
    expected = float(shown_to(metric, real=REAL, fake=fake))
    # They divide by N - 1, the published system and ours by N.
    got = formulas.frechet_distance(*moments(REAL), *moments(fake))
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize('name', [name for name, features in OTHERS.items() if len(features) == len(REAL)])
def test_the_kernel_distance_is_that_of_torchmetrics(name):
    # One subset of all samples: which ones a smaller subset has is chance.
    metric = torchmetrics_image('kid').KernelInceptionDistance(
        feature=Features(), subsets=1, subset_size=len(REAL))
    expected = float(shown_to(metric, real=REAL, fake=OTHERS[name])[0])
    got = formulas.kernel_distance(REAL, OTHERS[name], 1, len(REAL), np.random.RandomState(0))
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_inception_score_is_that_of_torchmetrics(fake):
    metric = torchmetrics_image('inception').InceptionScore(feature=Features(), splits=1)
    expected = float(shown_to(metric, only=fake)[0])
    probs = torch.softmax(torch.from_numpy(fake), dim=1).numpy()
    assert formulas.inception_score(probs, 1)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('num_neighbours', [1, 3, 5])
def test_precision_recall_density_and_coverage_are_those_of_their_authors(fake, num_neighbours):
    prdc = pytest.importorskip('prdc', reason='pip install prdc', exc_type=ImportError)
    with contextlib.redirect_stdout(None):
        expected = prdc.compute_prdc(REAL, fake, num_neighbours)
    sets = torch.from_numpy(REAL), torch.from_numpy(fake)
    precision, recall = formulas.precision_recall(*sets, num_neighbours)
    density, coverage = formulas.density_coverage(*sets, num_neighbours)
    got = {'precision': precision, 'recall': recall, 'density': density, 'coverage': coverage}
    assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('n', [20, 30, 300], ids=['singular', 'nearly singular', 'regular'])
def test_the_trace_of_the_square_root_is_that_of_scipy(n):
    linalg = pytest.importorskip('scipy.linalg')
    (mean1, cov1), (mean2, cov2) = moments(REAL, bias=True), moments(sample(n, 6), bias=True)
    root = np.trace(linalg.sqrtm(cov1 @ cov2)).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root
    # Of a singular matrix, theirs is only accurate to the root of the rounding error.
    tolerance = 1e-9 if n == 300 else 1e-5
    assert formulas.frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=tolerance)
    assert formulas.frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, rel=tolerance)
