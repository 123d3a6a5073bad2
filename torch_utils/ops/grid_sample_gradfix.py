# SPDX-License-Identifier: Apache-2.0
"""Bilinear sampling of images, differentiable to any order with respect to the image on every torch.

y[n,c,i,j] = sum over pixels q of x[n,c,q] * weight(grid[n,i,j] - q) is linear in x for a fixed grid. So its
gradient is linear in dy, and the derivative of that is the sampling itself. New releases of torch know this.
"""
import functools
from typing import Any

import torch
import torch.nn.functional as F

enabled = False  # set by code that was written for the published system; has no effect


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample `input` [N, C, H, W] at the positions `grid` [N, h, w, (x, y)]; returns [N, C, h, w].

    Positions -1 and 1 are the outer edges of the border pixels (align_corners=False); outside, all is 0.
    Gradients of any order with respect to `input`, of first order with respect to `grid`.
    """
    if _has_native_second_derivative(input.device.type):
        return _sample(input, grid)
    return _Sample.apply(input, grid)


def _sample(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


@functools.cache
def _has_native_second_derivative(device_type: str) -> bool:
    """Try it once per kind of device: releases differ, and so may devices."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = torch.zeros([1, 1, 2, 2], device=device_type, requires_grad=True)
        dy = torch.zeros([1, 1, 1, 1], device=device_type, requires_grad=True)
        y = _sample(x, torch.zeros([1, 1, 1, 2], device=device_type))
        try:
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            torch.autograd.grad(dx.sum(), dy)
        except RuntimeError:  # "derivative for ... is not implemented", or dx that does not depend on dy
            return False
    return True


def _first_gradient(x: torch.Tensor, grid: torch.Tensor, dy: torch.Tensor, wrt_grid: bool) -> torch.Tensor:
    """Gradient of <sampling, dy> with respect to x or the grid, by the derivative that every release has."""
    with torch.enable_grad():
        x, grid = x.detach(), grid.detach()
        wanted = (grid if wrt_grid else x).requires_grad_()
        return torch.autograd.grad(_sample(x, grid), wanted, dy.detach())[0]


class _Sample(torch.autograd.Function):
    """x, grid -> y."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, grid)
        return _sample(x, grid)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, grid = ctx.saved_tensors
        dx = _Adjoint.apply(dy, grid, x.shape) if ctx.needs_input_grad[0] else None
        return dx, _GridGradient.apply(x, grid, dy) if ctx.needs_input_grad[1] else None


class _Adjoint(torch.autograd.Function):
    """dy, grid -> dx: each value of dy is spread over the pixels that it was sampled from."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(dy, grid)
        # The value of x does not matter for the gradient with respect to it.
        return _first_gradient(dy.new_zeros(shape), grid, dy, wrt_grid=False)

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        dy, grid = ctx.saved_tensors
        return (_Sample.apply(v, grid) if ctx.needs_input_grad[0] else None,
                _GridGradient.apply(v, grid, dy) if ctx.needs_input_grad[1] else None, None)


class _GridGradient(torch.autograd.Function):
    """x, grid, dy -> dgrid, where differentiation ends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grid: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return _first_gradient(x, grid, dy, wrt_grid=True)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple:
        raise RuntimeError('grid_sample: torch has no second derivative for the grid here; detach the grid')
