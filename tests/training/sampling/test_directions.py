# SPDX-License-Identifier: Apache-2.0
"""Directions: known ones are found, and files that do not fit are refused."""
import numpy as np
import pytest
import torch
from small_networks import small_generator

from dnnlib.util import UserError
from training.sampling import directions
from training.sampling.sampler import Sampler


def sampler(**changes):
    return Sampler(small_generator(**changes), torch.device('cpu'))


def unit(seed=5):
    vector = torch.from_numpy(np.random.RandomState(seed).randn(8))
    return vector / vector.norm()


def plant(module, direction):
    """Make styles depend on w mostly along one direction."""
    with torch.no_grad():
        weight = module.affine.weight
        weight.mul_(0.01).add_(torch.ones(len(weight), 1) * direction.float())


def test_sefa_finds_the_dominant_direction_of_a_generator():
    source, direction = sampler(), unit()
    for name, module in source.G.synthesis.named_modules():
        if hasattr(module, 'affine'):
            plant(module, direction if name.startswith('b16') else unit(6))
    found = directions.find_directions(source, 'sefa', 2, [4, 5])
    # ws 4 and 5 are read by nothing but the last block.
    assert abs(found.directions[0] @ direction.numpy()) > 0.999 and found.values[0] > 10 * found.values[1]
    coarse = directions.find_directions(source, 'sefa', 1, [0])
    assert abs(coarse.directions[0] @ unit(6).numpy()) > 0.999


def test_the_factorisation_maximises_the_change_of_styles():
    matrix = torch.from_numpy(np.random.RandomState(0).randn(20, 6))
    found, values = directions.factorise(matrix, 6)
    assert np.allclose(found @ found.T, np.eye(6), atol=1e-9) and (np.diff(values) <= 0).all()
    assert np.allclose((matrix.numpy() @ found.T) ** 2 @ np.ones(6) * 0 + values.sum(), (matrix ** 2).sum())
    assert np.allclose(np.linalg.norm(matrix.numpy() @ found[0]) ** 2, values[0])
    assert (found[np.arange(6), np.abs(found).argmax(1)] > 0).all()


def test_style_matrix_takes_the_affine_layers_that_read_these_ws():
    G = small_generator()
    # ws[0] is read by the first layer alone, the last one by nothing but the last ToRGB.
    first = directions.style_matrix(G, [0])
    assert torch.allclose(first, G.synthesis.b4.conv1.affine.weight.double() * 8 ** -0.5)
    last = directions.style_matrix(G, [G.num_ws - 1])
    assert torch.allclose(last, G.synthesis.b16.torgb.affine.weight.double() * 8 ** -0.5)
    everything = directions.style_matrix(G, range(G.num_ws))
    assert len(everything) == sum(len(m.weight) for n, m in G.named_modules() if n.endswith('affine'))
    with pytest.raises(UserError, match='--layers'):
        directions.style_matrix(G, [])


def test_principal_components_of_a_stretched_cloud():
    ws = torch.from_numpy(np.random.RandomState(0).randn(5000, 8))
    direction = unit()
    ws = ws + 3 * torch.from_numpy(np.random.RandomState(1).randn(5000, 1)) * direction + 7
    found, values = directions.principal_components(ws, 3)
    assert abs(found[0] @ direction.numpy()) > 0.99 and values[0] == pytest.approx(10, rel=0.1)
    assert values[1] == pytest.approx(1, rel=0.1)


def test_a_file_gives_back_what_was_found_and_strength_1_is_a_standard_deviation(tmp_path):
    source = sampler(c_dim=3)
    found = directions.find_directions(source, 'pca', 3, [1, 2], range(3))
    found.save(tmp_path / 'd.npz')
    G, text = source.G, f'{tmp_path / "d.npz"}:1'
    shift = directions.read_direction(text, G)
    assert shift.shape == (G.num_ws, 8) and not shift[[0, 3, 4, 5]].any() and torch.equal(shift[1], shift[2])
    ws = directions.sample_w(source, range(3), 2000)
    along = ws @ torch.from_numpy(found.directions[1])
    assert along.std().item() == pytest.approx(shift[1].norm().item(), rel=0.1)
    assert directions.read_direction(text, G, [5])[5].any()
    assert directions.read_directions(str(tmp_path / 'd.npz')).method == 'pca'


def test_more_directions_than_dimensions_are_refused():
    with pytest.raises(UserError, match='at most 8'):
        directions.find_directions(sampler(), 'pca', 9, [0])


def stored(**changes):
    return {'method': 'pca', 'directions': np.eye(2, 8), 'values': np.ones(2), 'sigma': np.ones(2),
            'layers': np.arange(6), **changes}


@pytest.mark.parametrize('changes, index, hint', [
    ({}, ':2', '0 to 1'), ({}, ':-1', 'FILE:INDEX'), ({}, '', 'FILE:INDEX'), ({}, ':x', 'FILE:INDEX'),
    ({'directions': np.eye(2, 9)}, ':0', 'w_dim 9'), ({'layers': np.arange(7)}, ':0', 'layers up to 6'),
    ({'sigma': np.ones(3)}, ':0', 'do not fit'), ({'directions': np.eye(2, 8) * np.nan}, ':0', 'do not fit'),
    ({'layers': np.array([-1])}, ':0', 'do not fit'),
    ({'sigma': np.array(['a'])}, ':0', 'not a directions file')])
def test_a_file_that_does_not_fit_is_one_line(tmp_path, changes, index, hint):
    np.savez(tmp_path / 'd.npz', **stored(**changes))
    with pytest.raises(UserError, match=hint) as info:
        directions.read_direction(f'{tmp_path / "d.npz"}{index}', small_generator())
    assert '\n' not in str(info.value)


@pytest.mark.parametrize('data', [None, b'', b'text'])
def test_no_file_or_another_one_is_one_line(tmp_path, data):
    if data is not None:
        (tmp_path / 'd.npz').write_bytes(data)
    with pytest.raises(UserError, match='--find-directions'):
        directions.read_directions(str(tmp_path / 'd.npz'))
