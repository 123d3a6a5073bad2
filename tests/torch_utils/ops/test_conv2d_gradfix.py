# SPDX-License-Identifier: Apache-2.0
"""Convolutions by nodes of our own, here forced on the CPU: torch's numbers, and no needless work."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops import conv2d_gradfix
from torch_utils.ops.conv2d_gradfix import conv2d, conv_transpose2d

CASES = [
    (conv2d, F.conv2d, [4, 6, 3, 3], {'padding': 1}),
    (conv2d, F.conv2d, [4, 6, 3, 2], {'stride': 2}),  # of which several input sizes have the same output size
    (conv2d, F.conv2d, [4, 3, 1, 1], {'groups': 2, 'dilation': 2}),
    (conv2d, F.conv2d, [4, 6, 3, 3], {'padding': (2, 0), 'dilation': (1, 2), 'stride': (1, 3)}),
    (conv_transpose2d, F.conv_transpose2d, [6, 4, 3, 3], {'stride': 2}),
    (conv_transpose2d, F.conv_transpose2d, [6, 2, 3, 3],
     {'stride': 2, 'groups': 2, 'output_padding': (1, 0)}),
]
every_case = pytest.mark.parametrize(('ours', 'theirs', 'shape', 'form'), CASES)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(conv2d_gradfix, '_is_ours', lambda x, w: True)


def inputs(shape, layout=torch.contiguous_format):
    x = torch.randn([2, 6, 8, 9], dtype=torch.float64).contiguous(memory_format=layout)
    return [t.requires_grad_() for t in (x, torch.randn(shape, dtype=torch.float64))]


@every_case
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_numbers_and_gradients_are_those_of_torch(ours, theirs, shape, form, layout):
    x, w = inputs(shape, layout)
    bias = torch.randn(ours(x, w, **form).shape[1], dtype=torch.float64, requires_grad=True)
    results = []
    for function in (ours, theirs):
        y = function(x, w, bias, **form)
        grads = torch.autograd.grad(y.square().sum(), [x, w, bias], create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in grads), [x, w, bias])
        results.append([y, *grads, *second])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)


@every_case
def test_derivatives_match_finite_differences(ours, theirs, shape, form):
    x, w = inputs(shape)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, **form), [x, w], fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, w: ours(x, w, **form), [x, w], fast_mode=True)


class Seen(TorchDispatchMode):
    """Notes convolutions: 'forward', or which gradients one computes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == 'convolution':
            self.calls.append('forward')
        elif name == 'convolution_backward':
            self.calls.append(tuple(args[-1]))
        return function(*args, **(kwargs or {}))


def test_only_gradients_that_are_asked_for_are_computed():
    x, w = inputs([4, 6, 3, 3])
    with Seen() as seen:
        y = conv2d(conv2d(x, w, padding=1).repeat(1, 2, 1, 1)[:, :6], w, padding=1)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    # As regularisation asks for gradients of images and styles.
    assert seen.calls == ['forward'] * 4
    with Seen() as seen:
        torch.autograd.grad(dx.square().sum(), w)
    of_weight = (False, True, False)
    assert sorted(map(str, seen.calls)) == sorted(map(str, ['forward'] + [of_weight] * 2))


def test_gradients_of_weights_can_be_ruled_out_and_second_derivatives_stay():
    x, w = inputs([4, 6, 3, 3])
    dx, dw = (torch.autograd.grad(conv2d(x, w, padding=1).square().sum(), [x, w], create_graph=True))
    (expected,) = torch.autograd.grad(dx.square().sum(), w)
    with conv2d_gradfix.no_weight_gradients():
        y = conv2d(x, w, padding=1).square().sum()
        ruled, none = torch.autograd.grad(y, [x, w], create_graph=True, allow_unused=True)
    assert none is None and torch.equal(ruled, dx) and dw.any()
    assert torch.equal(torch.autograd.grad(ruled.square().sum(), w)[0], expected)


def test_no_graph_is_made_where_nothing_asks_for_gradients():
    x, w = inputs([4, 6, 3, 3])
    with torch.no_grad():
        assert conv2d(x, w).grad_fn is None
    assert conv2d(x.detach(), w.detach()).grad_fn is None
    y = conv2d(x, w.detach())
    assert y.grad_fn is not None and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_activations_are_released_by_the_backward_pass():
    x, w = inputs([6, 6, 3, 3])
    y = conv2d(x * 2, w, padding=1)
    y.sum().backward()
    with pytest.raises(RuntimeError, match='second time'):
        y.sum().backward()


@pytest.mark.parametrize('compiling', [True, False])
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_torch_has_its_own_way_on_a_cpu_and_while_compiling(monkeypatch, compiling, device):
    monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    x, w = torch.empty(1, 3, 8, 8, device=device), torch.empty(2, 3, 3, 3, device=device, requires_grad=True)
    is_ours = type(conv2d(x, w).grad_fn).__name__ == '_ConvolutionBackward'
    assert is_ours == (device != 'cpu' and not compiling)
