# SPDX-License-Identifier: Apache-2.0
"""upfirdn2d against its definition, and what it says to wrong arguments."""
import itertools

import numpy as np
import pytest
import torch

from torch_utils.ops import upfirdn2d


def by_definition(x, f, up, down, padding, flip_filter, gain):
    """The four steps of the definition in float64, one sum at a time."""
    f = np.outer(f, f) if f.ndim == 1 else np.asarray(f)
    f = f if flip_filter else f[::-1, ::-1]
    n, c, h, w = x.shape
    z = np.zeros([n, c, h * up[1], w * up[0]])
    z[:, :, ::up[1], ::up[0]] = x
    x0, x1, y0, y1 = padding
    z = np.pad(z, [(0, 0), (0, 0), (max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))])
    z = z[:, :, max(-y0, 0):z.shape[2] - max(-y1, 0), max(-x0, 0):z.shape[3] - max(-x1, 0)]
    windows = np.lib.stride_tricks.sliding_window_view(z, f.shape, axis=(2, 3))
    return gain * np.einsum('nchwab,ab->nchw', windows, f)[:, :, ::down[1], ::down[0]]


@pytest.mark.parametrize('up, down, padding', list(itertools.product(
    [(1, 1), (2, 3)], [(1, 1), (3, 2)], [(2, 2, 2, 2), (3, -1, -2, 4), (0, 5, 1, 2)])))
@pytest.mark.parametrize('taps', [(3, 2), (4,)])
def test_every_combination_of_sizes_follows_the_definition(up, down, padding, taps, device):
    rng = np.random.default_rng(0)
    x, f = rng.standard_normal([2, 3, 6, 5]), rng.standard_normal(taps)
    for flip in (False, True):
        y = upfirdn2d.upfirdn2d(
            torch.from_numpy(x).to(device), torch.from_numpy(f).float().to(device), list(up), list(down),
            list(padding),
            flip_filter=flip, gain=1.5)
        expected = by_definition(x, f.astype(np.float32), up, down, padding, flip, 1.5)
        np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=1e-6, atol=1e-6)  # the filter is float32


@pytest.mark.parametrize('padding', [(-6, 8, 2, 2), (9, -7, -7, 9)])
@pytest.mark.parametrize('up', [1, 2])
def test_one_side_may_crop_more_than_the_image_if_the_other_side_pads(up, padding):
    x, f = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True), torch.ones(2, 2)
    y = upfirdn2d.upfirdn2d(x, f, up=up, padding=list(padding))
    expected = by_definition(x.detach().numpy(), np.ones([2, 2]), (up, up), (1, 1), padding, False, 1)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: upfirdn2d.upfirdn2d(x, f, up=up, padding=list(padding)), [x])
    plain = upfirdn2d.upfirdn2d(x.detach(), None, padding=list(padding))
    np.testing.assert_array_equal(
        plain, by_definition(x.detach().numpy(), np.ones([1, 1]), (1, 1), (1, 1), padding, False, 1))


def test_layout_of_the_input_is_kept_and_does_not_change_the_numbers(device):
    x, f = torch.randn(2, 8, 6, 5, device=device), upfirdn2d.setup_filter([1, 3, 3, 1], device=device)
    for function in (upfirdn2d.filter2d, upfirdn2d.upsample2d, upfirdn2d.downsample2d):
        a, b = function(x, f), function(x.contiguous(memory_format=torch.channels_last), f)
        assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_cpu_enlarges_images_of_16_bits_in_32_bits_and_rounds_once(dtype):
    x = torch.randn(2, 3, 6, 5).to(dtype)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])  # whose taps 16 bits represent exactly
    expected = upfirdn2d.upsample2d(x.float(), f).to(dtype)
    assert torch.equal(upfirdn2d.upsample2d(x, f), expected)


def test_a_constant_image_stays_constant_inside_through_up_and_down_sampling():
    x, f = torch.ones(1, 1, 16, 16), upfirdn2d.setup_filter([1, 3, 3, 1])
    y = upfirdn2d.downsample2d(upfirdn2d.upsample2d(x, f), f)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], x[:, :, 2:-2, 2:-2])


@pytest.mark.parametrize('uses', ['both', 'x', 'filtered'])
def test_a_fork_has_the_gradients_of_its_branches_of_every_order(uses):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    f, padding = upfirdn2d.setup_filter([1, 3, 2, 1]), [1, 1, 0, 2]

    def penalty(fork):
        kept, filtered = fork(x, f, 2, padding)
        y = {'both': kept.pow(3).sum() + filtered.pow(3).sum(), 'x': kept.pow(3).sum(),
             'filtered': filtered.pow(3).sum()}[uses]
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return dx, torch.autograd.grad(dx.square().sum(), x)[0]
    plain = penalty(lambda x, f, down, padding: (x, upfirdn2d.upfirdn2d(x, f, down=down, padding=padding)))
    for value, expected in zip(penalty(upfirdn2d.fork), plain, strict=True):
        torch.testing.assert_close(value, expected)


def test_the_gradients_of_a_fork_are_added_by_the_filter(monkeypatch):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    kept, filtered = upfirdn2d.fork(x, upfirdn2d.setup_filter([1, 3, 3, 1]), 2, [1, 1, 1, 1])
    seen = []
    run = upfirdn2d._upfirdn2d_plus.kernels['cpu']
    monkeypatch.setitem(
        upfirdn2d._upfirdn2d_plus.kernels, 'cpu', lambda *args: seen.append(args) or run(*args))
    torch.autograd.grad(kept.sum() + filtered.sum(), x)
    assert len(seen) == 1 and kept.data_ptr() == x.data_ptr()


def test_setup_filter_leaves_the_callers_array_alone():
    f = np.array([1, 3, 3, 1], dtype=np.float32)
    upfirdn2d.setup_filter(f)
    assert f.tolist() == [1, 3, 3, 1]


@pytest.mark.parametrize('call, text', [
    (lambda x, f: upfirdn2d.upfirdn2d(x, f, up=0), 'up must be'),
    (lambda x, f: upfirdn2d.upfirdn2d(x, f, down=[1, 2, 3]), 'down must be'),
    (lambda x, f: upfirdn2d.upfirdn2d(x, f, padding=[1, 2, 3]), 'padding must be'),
    (lambda x, f: upfirdn2d.upfirdn2d(x, f, padding=-3), 'gives no pixels'),
    (lambda x, f: upfirdn2d.upfirdn2d(x, None, padding=[-2, 0]), r'filter \[\].* gives no pixels'),
    (lambda x, f: upfirdn2d.upfirdn2d(x, f[None]), '1 or 2 dimensions'),
    (lambda x, f: upfirdn2d.setup_filter(np.ones([2, 2, 2])), 'shape'),
    (lambda x, f: upfirdn2d.setup_filter([]), 'at least one tap'),
    (lambda x, f: upfirdn2d.setup_filter(np.ones([2, 2]), separable=True), '1-D'),
])
def test_wrong_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(1, 1, 4, 4), upfirdn2d.setup_filter([1, 3, 3, 1]))
