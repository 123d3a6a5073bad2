# SPDX-License-Identifier: Apache-2.0
"""scaled_cast: the same bits as a product and a conversion, by the reference and by the kernel."""
import pytest
import torch
from cuda_emulation import launcher

from torch_utils.ops.scaled_cast import _scaled_cast, scaled_cast

GAIN = 1 / 48 ** 0.5
HALVES = [torch.float16, torch.bfloat16]


def by_two_operations(weight, dtype):
    return (weight * GAIN).to(dtype)


def weight_and_gradient(dtype, shape=(5, 3, 3, 3)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, requires_grad=True)
    return weight, (torch.randn(shape, generator=generator) * 1e-3).to(dtype)


@pytest.mark.parametrize('dtype', HALVES)
def test_values_and_gradients_are_to_the_bit_those_of_two_operations(dtype):
    weight, dy = weight_and_gradient(dtype)
    y, expected = scaled_cast(weight, GAIN, dtype), by_two_operations(weight, dtype)
    assert y.dtype == dtype and torch.equal(y, expected)
    (grad,), (by_two,) = (torch.autograd.grad(value, weight, dy) for value in (y, expected))
    assert grad.dtype == torch.float32 and torch.equal(grad, by_two)


@pytest.mark.parametrize('shape, vec', [((8, 4, 3, 3), 4), ((5, 3, 3, 3), 1), ((7, 2), 2)])
@pytest.mark.parametrize('dtype', HALVES)
def test_the_kernel_gives_the_same_bits_both_ways(dtype, shape, vec, emulated):
    weight, dy = weight_and_gradient(dtype, shape)
    y = scaled_cast(weight, GAIN, dtype)
    (grad,) = torch.autograd.grad(y, weight, dy)
    assert [(k.entry, dict(k.defines)['VEC']) for k in launcher.launched] == [('scaled_cast', str(vec))] * 2
    assert torch.equal(y, by_two_operations(weight, dtype)) and torch.equal(grad, dy.float() * GAIN)


def test_a_weight_in_nhwc_stays_so_and_gaps_are_closed(emulated):
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    y = scaled_cast(weight, GAIN, torch.float16)
    assert y.stride() == weight.stride() and torch.equal(y, by_two_operations(weight, torch.float16))
    part = weight[:, ::2]
    assert torch.equal(scaled_cast(part, GAIN, torch.float16), by_two_operations(part, torch.float16))


def test_what_needs_no_conversion_is_an_ordinary_product():
    weight = torch.randn(3, requires_grad=True)
    y = scaled_cast(weight, GAIN, torch.float32)
    assert torch.equal(y, weight * GAIN) and type(y.grad_fn) is type((weight * GAIN).grad_fn)


def test_float64_against_a_narrower_type_is_left_to_the_reference(emulated):
    x = torch.randn(4, dtype=torch.float64)
    assert torch.equal(_scaled_cast(x, GAIN, torch.float16), by_two_operations(x, torch.float16))
    assert _scaled_cast(x.float(), GAIN, torch.float64).dtype == torch.float64
    assert not emulated
