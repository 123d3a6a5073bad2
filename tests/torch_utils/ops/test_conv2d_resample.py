# SPDX-License-Identifier: Apache-2.0
"""Each cheap form of conv2d_resample equals its four-step definition."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import upfirdn2d
from torch_utils.ops.conv2d_resample import conv2d_resample


def by_definition(x, w, f, up, down, padding, groups, flip_weight):
    fw, fh = f.shape[::-1]
    x0, x1, y0, y1 = padding
    if up > 1:
        x0, x1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2
        y0, y1 = y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2
        y0, y1 = y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    x = upfirdn2d.upfirdn2d(x, f if up > 1 else None, up=up, padding=[x0, x1, y0, y1], gain=up ** 2)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return upfirdn2d.upfirdn2d(x, f, down=down) if down > 1 else x


@pytest.mark.parametrize('up, down, kernel, groups, flip', list(itertools.product(
    [1, 2], [1, 2, 3], [(1, 1), (3, 2)], [1, 2], [True, False])))
def test_every_form_equals_the_definition(up, down, kernel, groups, flip):
    x, f = torch.randn(2, 4, 9, 8).double(), torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])
    w = torch.randn(6, 4 // groups, *kernel).double()
    for padding in ([0, 0, 0, 0], [2, 1, 1, 3]):
        expected = by_definition(x, w, f, up, down, padding, groups, flip)
        actual = conv2d_resample(x, w, f, up=up, down=down, padding=padding, groups=groups, flip_weight=flip)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('kernel', [1, 3, 5])
@pytest.mark.parametrize('taps', [[1.0, 3.0, 3.0, 1.0], [1.0, 2.0, 1.0], [1.0, 4.0]])
def test_a_convolution_that_changes_nothing_leaves_plain_resampling(kernel, taps):
    x, f = torch.randn(2, 3, 6, 8).double(), upfirdn2d.setup_filter(taps)
    w = torch.zeros(3, 3, kernel, kernel).double()
    w[range(3), range(3), kernel // 2, kernel // 2] = 1
    # Half the kernel on each side keeps every image in its place.
    larger = conv2d_resample(x, w, f, up=2, padding=kernel // 2)
    torch.testing.assert_close(larger, upfirdn2d.upsample2d(x, f))
    smaller = conv2d_resample(x, w, f, down=2, padding=kernel // 2)
    torch.testing.assert_close(smaller, upfirdn2d.downsample2d(x, f))


def test_a_pointwise_kernel_keeps_the_layout_and_has_gradients_of_second_order():
    x = torch.randn(2, 4, 5, 3).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(6, 4, 1, 1).double().requires_grad_()
    y = conv2d_resample(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.conv2d(x, w))
    assert torch.autograd.gradcheck(conv2d_resample, (x, w))
    assert torch.autograd.gradgradcheck(conv2d_resample, (x, w))
