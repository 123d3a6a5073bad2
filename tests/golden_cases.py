# SPDX-License-Identifier: Apache-2.0
"""Golden cases: numbers recorded from the published system, discovered from the index files of one folder.

The folder is $GOLDEN_DIR, else ../shared/golden beside the checkout, else the small copy in tests/golden.
Tests parametrise over `cases(group)`, so that another folder of the same format runs through the same tests.
"""
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def golden_dir():
    if os.environ.get('GOLDEN_DIR'):
        return Path(os.environ['GOLDEN_DIR']).resolve()
    shared = ROOT.parent / 'shared' / 'golden'
    return shared if shared.is_dir() else ROOT / 'tests' / 'golden'


@functools.cache
def index(group):
    """The parsed index of a group; an empty dict if this folder has no such group."""
    path = golden_dir() / f'{group}.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}


@functools.cache
def arrays(npz_name):
    with np.load(golden_dir() / npz_name) as data:
        return {key: data[key] for key in data.files}


def cases(group, key='cases', where=None):
    """pytest parameters, one a case, named by the case's own `id` or `name` where it has one."""
    params = []
    for i, case in enumerate(index(group).get(key, [])):
        if where is not None and not where(case):
            continue
        name = case.get('id') or case.get('name') if isinstance(case, dict) else None
        params.append(pytest.param(case, id=f'{group}-{key}-{i}' if name is None else str(name)))
    return params


def resolve(value, npz_name):
    """Replace every {'$tensor': key} inside a nested value by the tensor of that key."""
    if isinstance(value, dict):
        if set(value) == {'$tensor'}:
            return torch.from_numpy(np.array(arrays(npz_name)[value['$tensor']]))
        return {k: resolve(v, npz_name) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(v, npz_name) for v in value]
    return value


def assert_close(actual, expected, tol, floor=1e-6, what='value'):
    """max|a - b| <= tol * max(max|b|, floor): the tolerance rule of the golden READMEs."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f'{what}: {list(actual.shape)}, expected {list(expected.shape)}'
    if expected.numel() == 0:
        return
    error, scale = (actual - expected).abs().max().item(), max(expected.abs().max().item(), floor)
    assert error <= tol * scale, f'{what}: error {error:.3g} > {tol:g} * {scale:.3g}'
