# SPDX-License-Identifier: Apache-2.0
"""Network files of the published systems with what was recorded of them, each opened once."""
import functools

import numpy as np
import torch
from golden_cases import golden_dir

from legacy import load_network


def open_recorded(folder, case):
    """(contents of a recorded network file, its arrays as tensors). folder: of the golden data."""
    return _open(folder, case['file'], case['arrays'])


@functools.cache
def _open(folder, file, arrays):
    with np.load(golden_dir() / folder / arrays) as data:
        recorded = {key: torch.from_numpy(data[key]) for key in data.files}
    return load_network(golden_dir() / folder / file), recorded
