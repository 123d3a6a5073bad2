# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix for each sample: memory is not copied, and the sum over pixels in parts."""
from unittest import mock

import pytest
import torch

from torch_utils.ops import pixel_product

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize('layout', FORMATS, ids=['nchw', 'nhwc'])
def test_a_large_argument_is_neither_copied_nor_moved_to_another_format(layout):
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(2, 3, 16, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        y = pixel_product.pixel_product(x, w, torch.zeros(3), layout is torch.channels_last)
        dx, dw = torch.autograd.grad(y.sum(), [x, w])
    copied = [e.input_shapes for e in profile.events() if e.name in ('aten::copy_', 'aten::clone')]
    assert not any(x.numel() == torch.Size(s[0]).numel() for s in copied if s and s[0])
    assert dx.is_contiguous(memory_format=layout) and dw.shape == w.shape


@pytest.mark.parametrize('n', [1, 2])
def test_the_sum_over_pixels_is_the_same_in_parts(n):
    dy, x = torch.randn(n, 3, 4, 6).double(), torch.randn(n, 5, 4, 6).double()
    x = x.contiguous(memory_format=torch.channels_last)
    for gradient in (dy, dy.contiguous(memory_format=torch.channels_last)):
        whole = pixel_product.pixel_outer(gradient, x)
        with mock.patch.object(pixel_product, 'parts_of', lambda x: 8):
            torch.testing.assert_close(pixel_product.pixel_outer(gradient, x), whole)


@pytest.mark.parametrize('shape, parts', [
    ((4, 32, 1024, 1024), 128), ((16, 64, 256, 256), 32), ((16, 512, 16, 16), 1), ((4, 32, 96, 80), 4)])
def test_many_pixels_are_divided_where_nothing_else_can_be(shape, parts):
    x = torch.empty(shape, device='meta', memory_format=torch.channels_last)
    assert pixel_product.parts_of(x) == parts and shape[2] * shape[3] % parts == 0
    # NCHW would have to be copied for it.
    assert pixel_product.parts_of(torch.empty(shape, device='meta')) == 1
