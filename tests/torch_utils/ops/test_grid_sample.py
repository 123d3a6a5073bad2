# SPDX-License-Identifier: Apache-2.0
"""Bilinear sampling: native and own derivatives."""
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torch_utils.ops import grid_sample_gradfix
from torch_utils.ops.grid_sample_gradfix import grid_sample

NATIVE = grid_sample_gradfix._has_native_second_derivative('cpu')


def use(native):
    return mock.patch.object(grid_sample_gradfix, '_has_native_second_derivative', lambda device_type: native)


@pytest.fixture(params=[True, False], ids=['native', 'own'])
def implementation(request):
    """Both implementations, the native one only where this torch has its second derivative."""
    if request.param and not NATIVE:
        pytest.skip('this torch has no second derivative of grid_sample')
    with use(native=request.param):
        yield


def image_and_grid(shape=(2, 2, 5, 4), size=(3, 6), dtype=torch.float64, device='cpu'):
    x = torch.randn(shape, dtype=dtype, device=device)
    grid = torch.rand([shape[0], *size, 2], dtype=dtype, device=device) * 2.6 - 1.3  # some of it is outside
    return x.requires_grad_(), grid


def test_first_and_second_derivatives_wrt_the_image(implementation, device):
    x, grid = image_and_grid(device=device)
    assert gradcheck(lambda x: grid_sample(x, grid), x, nondet_tol=1e-12)
    assert gradgradcheck(lambda x: grid_sample(x, grid), x, nondet_tol=1e-12)


def test_first_derivative_wrt_the_grid(implementation):
    x, grid = image_and_grid()
    assert gradcheck(lambda grid: grid_sample(x.detach(), grid), grid.requires_grad_())


def test_third_derivative_of_a_nonlinear_function(implementation):
    x, grid = image_and_grid([1, 1, 3, 3], [2, 2])

    def slope(x):
        y = grid_sample(x, grid).pow(3).sum()
        return torch.autograd.grad(y, x, create_graph=True)[0]
    assert gradgradcheck(slope, x)


def test_mixed_second_derivatives_with_the_grid(implementation):
    x, grid = image_and_grid([1, 1, 4, 3], [2, 2])

    def slope(x, grid):
        return torch.autograd.grad(grid_sample(x, grid).square().sum(), x, create_graph=True)[0]
    assert gradcheck(slope, (x, grid.requires_grad_()))


def test_own_and_native_agree(device):
    x, grid = image_and_grid(dtype=torch.float32, device=device)
    grid.requires_grad_()
    dy = torch.randn(2, 2, 3, 6, device=device)
    results = []
    for native in (True, False):
        with use(native):
            y = grid_sample(x, grid)
            results.append([y, *torch.autograd.grad(y, [x, grid], dy)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_second_derivative_wrt_the_grid_is_refused_rather_than_wrong():
    x, grid = image_and_grid()
    with use(native=False):
        (dgrid,) = torch.autograd.grad(grid_sample(x, grid.requires_grad_()).sum(), grid, create_graph=True)
        with pytest.raises(RuntimeError, match='second derivative'):
            dgrid.sum().backward()


def test_pixel_centres_give_back_the_image_and_outside_is_zero(implementation):
    x = torch.arange(6.0).view(1, 1, 2, 3)
    xs, ys = (torch.arange(n) * 2 / n + 1 / n - 1 for n in (3, 2))
    grid = torch.stack(torch.meshgrid(xs, ys, indexing='xy'), dim=-1)[None]
    torch.testing.assert_close(grid_sample(x, grid), x)
    assert torch.equal(grid_sample(x, grid + 5), torch.zeros_like(x))


def test_the_probe_works_inside_inference_mode():
    grid_sample_gradfix._has_native_second_derivative.cache_clear()
    with torch.inference_mode():
        assert grid_sample_gradfix._has_native_second_derivative('cpu') == NATIVE
