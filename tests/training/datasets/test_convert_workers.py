# SPDX-License-Identifier: Apache-2.0
"""Mapping over images in processes: order, bounded reading ahead, errors, a worker that dies."""
import os
import subprocess
import sys

import pytest
from golden_cases import ROOT

from dnnlib.util import UserError
from training.datasets.convert import BATCH_IMAGES, SERIAL_BELOW, map_images, num_workers
from training.datasets.sources import SourceImage


def images(count, seen=None):
    for i in range(count):
        if seen is not None:
            seen.append(i)
        yield SourceImage(str(i), i, b'x' * 100)


def double(image):
    return 2 * image.label


def fail_at_40(image):
    if image.label == 40:
        raise UserError('40 is bad')
    return image.label


def die(image):
    os._exit(1)


@pytest.mark.parametrize('workers', [0, 2])
def test_results_come_in_order_and_reading_ahead_is_bounded(workers):
    seen = []
    results = map_images(double, images(500, seen), workers)
    assert next(results) == 0
    assert len(seen) <= (1 if workers == 0 else (2 * workers + 1) * BATCH_IMAGES)
    assert list(results) == [2 * i for i in range(1, 500)]


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_arrive_in_order(workers):
    results = map_images(fail_at_40, images(100), workers)
    with pytest.raises(UserError, match='40 is bad'):
        list(results)


def test_a_killed_worker_is_explained():
    with pytest.raises(UserError, match='killed'):
        list(map_images(die, images(3), 1))


def test_few_images_need_no_processes():
    assert num_workers(None, SERIAL_BELOW - 1) == 0 and num_workers(None, SERIAL_BELOW) >= 1
    assert num_workers(3, 1) == 3


def test_the_tool_and_its_workers_do_not_load_torch():
    code = 'import sys, dataset_tool; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0
