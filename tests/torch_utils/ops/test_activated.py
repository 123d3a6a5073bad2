# SPDX-License-Identifier: Apache-2.0
"""A discriminator's block with fused operators is the one with separate operators, to the second order."""
from unittest import mock

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import layers
from training import networks
from training.networks import DiscriminatorBlock

NHWC = torch.channels_last


@pytest.fixture
def block(monkeypatch):
    """In NHWC, which kernels fuse, as on a GPU."""
    block = DiscriminatorBlock(8, 8, 12, 12, 3, 0, conv_clamp=1.0)
    with torch.no_grad():
        for bias in (block.conv0.bias, block.conv1.bias):
            bias.normal_()
    monkeypatch.setattr(networks, '_compute_format', lambda *_: (torch.float32, NHWC))
    return block


def derivatives(block, x):
    """Result, gradient of x, and the gradients of a penalty on that, as R1 has them."""
    y, _ = block(x, None)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    plain = torch.autograd.grad(y.sin().sum(), [x, *block.parameters()], retain_graph=True)
    return [y, slope, *plain, *torch.autograd.grad(slope.square().sum(), [x, *block.parameters()])]


def test_a_fused_block_is_the_plain_one_to_the_second_order(block, emulated):
    x = torch.randn(2, 8, 12, 10).contiguous(memory_format=NHWC).requires_grad_()
    fused = derivatives(block, x)
    used = {name for kernel in emulated for name, _ in kernel.defines}
    assert used >= {'PRELUDE', 'GRADIENT', 'INPUT', 'ADDEND'}
    with mock.patch.object(custom_ops, 'is_available', lambda device: False):
        plain = derivatives(block, x)
    for by_kernel, by_torch in zip(fused, plain, strict=True):
        largest = float(by_torch.detach().abs().max())
        torch.testing.assert_close(by_kernel, by_torch, rtol=1e-4, atol=1e-4 * largest)


def test_hooks_on_a_block_that_is_not_trained_see_activations(block, emulated):
    x, seen = torch.randn(2, 8, 12, 10).contiguous(memory_format=NHWC), []
    block.conv0.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        block(x, None)
        assert float(seen[0].abs().max()) > 1  # raw, while training
        block.eval()(x, None)
    assert float(seen[1].abs().max()) <= 1


@pytest.mark.parametrize('act, layout, bias', [
    ('lrelu', torch.contiguous_format, True), ('swish', NHWC, True), ('lrelu', NHWC, False)])
def test_only_what_a_kernel_can_fuse_is_deferred(act, layout, bias, emulated):
    x = torch.randn(1, 4, 3, 3).contiguous(memory_format=layout)
    assert layers.defer(x, torch.zeros(4) if bias else None, act, 1.0, None) is None
    assert layers.defer(x.contiguous(memory_format=NHWC), torch.zeros(4), 'lrelu', 1.0, None) is not None
    with mock.patch.object(custom_ops, 'is_available', lambda device: False):
        assert layers.defer(x, torch.zeros(4), 'lrelu', 1.0, None) is None
