# SPDX-License-Identifier: Apache-2.0
"""bias_act: what the contract cannot see: defaults, order of steps, memory kept, wrong arguments."""
import math

import pytest
import torch

from torch_utils.ops import bias_act


def test_gain_comes_after_the_activation_and_clamp_last():
    x = torch.tensor([[-1.0, 3.0]])
    y = bias_act.bias_act(x, torch.tensor([0.5, 0.5]), act='lrelu', alpha=0.1, gain=2, clamp=4)
    torch.testing.assert_close(y, torch.tensor([[-0.1, 4.0]]))


@pytest.mark.parametrize('act', ['relu', 'lrelu', 'swish'])
def test_default_gain_is_root_two_where_the_table_says_so(act):
    x = torch.tensor([[2.0]])
    torch.testing.assert_close(
        bias_act.bias_act(x, act=act), bias_act.bias_act(x, act=act, gain=1) * math.sqrt(2))


def test_the_input_is_never_changed_in_place():
    x = torch.randn(2, 3)
    before = x.clone()
    for act in bias_act.activation_funcs:
        bias_act.bias_act(x, torch.ones(3), act=act, gain=3, clamp=0.1)
    assert torch.equal(x, before)


def test_a_piecewise_linear_activation_keeps_only_its_output_for_the_backward_pass():
    x = torch.randn(4, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bias_act.bias_act(x, torch.zeros(4), act='lrelu')
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]


@pytest.mark.parametrize('act', ['linear', 'relu', 'lrelu', 'swish'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_a_clamped_value_passes_no_gradient_even_if_the_datatype_rounds_the_clamp(dtype, act, device):
    clamp = 256 * math.sqrt(0.5)  # 181.02, in bfloat16 181
    x = torch.tensor([-1e4, -3.0, 3.0, 1e4] * 16, dtype=dtype, device=device, requires_grad=True)
    y = bias_act.bias_act(x, act=act, clamp=clamp)
    (dx,) = torch.autograd.grad(y.sum(), x)
    is_clamped = y.detach().abs() == torch.tensor(clamp, dtype=dtype)
    assert int(is_clamped.sum()) == (32 if act in ('linear', 'lrelu') else 16)
    unclamped = torch.autograd.grad(bias_act.bias_act(x, act=act).sum(), x)[0]
    torch.testing.assert_close(dx, torch.where(is_clamped, 0.0, unclamped))


@pytest.mark.parametrize('kwargs, text', [
    ({'act': 'mish'}, "act='mish' is not one of linear"),
    ({'b': torch.zeros(5)}, 'bias must be'),
    ({'b': torch.zeros(3), 'dim': 2}, 'bias must be'),
    ({'clamp': -1}, 'clamp=-1'),
])
def test_wrong_arguments_are_named(kwargs, text):
    with pytest.raises(ValueError, match=text):
        bias_act.bias_act(torch.zeros(2, 3), **kwargs)
