# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run by the emulation in tests/cuda_emulation: the contract of the operators, and
the shapes and layouts at which launch geometry goes wrong. Recorded calls are in test_golden_ops.py.
"""
from unittest import mock

import pytest
import torch
from contract import test_op_contract as contract
from contract.samples import SAMPLES
from cuda_emulation import launcher

from torch_utils import custom_ops
from torch_utils.ops import (
    activated,
    bias_act,
    epilogue,
    epilogue_cuda,
    modulated_conv2d,
    native,
    pixel_product,
    upfirdn2d,
    upfirdn2d_cuda,
    warp,
)
from training import networks
from training.augment import AugmentPipe

pytestmark = pytest.mark.usefixtures('emulated')
CPU = torch.device('cpu')
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-7, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FORMATS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize('layout', FORMATS, ids=['nchw', 'nhwc'])
FILTER = [[1.0, 2.0, -1.0, 0.5], [0.5, 1.0, 3.0, 1.0], [2.0, 0.0, 1.0, -1.0], [1.0, 1.5, 0.5, 2.0]]


def agree(op, *args, by_kernel=True):
    """The kernel's results are those of the reference in float64, to the last places of the element type."""
    before = len(launcher.launched)
    actual = contract.results(op.run_native(*args))
    # The reference would agree with itself.
    assert (len(launcher.launched) > before) == by_kernel or args[0].numel() == 0, op.name
    exact = [a.double() if isinstance(a, torch.Tensor) and i != contract.filter_index(op) else a
             for i, a in enumerate(args)]
    with mock.patch.object(custom_ops, 'is_available', lambda device: False):
        exact = contract.results(op.reference(*exact))
    for value, expected in zip(actual, exact, strict=True):
        error = (value.double() - expected.double()).abs().max()
        assert error <= TOLERANCE[args[0].dtype] * expected.abs().max().clamp(min=1), op.name


def random_image(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)


@contract.every_sample
def test_derivatives_match_finite_differences(sample, emulated):
    function, tensors = contract.call_on(sample, sample.make(torch.float64, CPU))
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    assert emulated or sample.op.native is None or not sample.has_kernel


@contract.every_sample
def test_results_have_the_strides_that_the_fake_promises(sample):
    contract.test_fake_tensors_have_the_shape_and_strides_of_real_ones(sample, 'as they are', CPU)


@pytest.mark.parametrize('layout', ['channels last', 'spread'])
@pytest.mark.parametrize(
    'name', ['bias_act_grad-lrelu', 'bias_act_grad_both-lrelu', 'scale_channels_grad',
             'modulated_epilogue_grad-all', 'pixel_layer_grad-nhwc', 'pixel_outer-nhwc'])
def test_gradients_have_the_promised_strides_however_they_come_in(name, layout):
    sample = next(s for s in contract.SAMPLES if s.name == name)
    contract.test_fake_tensors_have_the_shape_and_strides_of_real_ones(sample, layout, CPU)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', [
    'upfirdn2d-up', 'upfirdn2d-channels_last', 'bias_act-lrelu_clamped', 'bias_act-swish',
    'bias_act_grad-lrelu', 'bias_act_grad_both-lrelu', 'bias_act_grad_both-channels_last',
    'modulated_epilogue-noise_per_sample', 'modulated_epilogue_grad-all', 'filtered_epilogue-channels_last',
    'modulated_weight', 'pixel_product-nhwc', 'pixel_layer-nhwc_to_nchw', 'pixel_layer_grad-nhwc',
    'pixel_outer-nhwc'])
def test_low_precision_agrees_with_float64(name, dtype):
    sample = next(s for s in SAMPLES if s.name == name)
    contract.test_low_precision_agrees_with_float64(sample, dtype, TOLERANCE[dtype], CPU)


@both_layouts
@pytest.mark.parametrize('up, down, padding', [
    ([1, 1], [1, 1], [2, 1, 2, 1]), ([2, 2], [1, 1], [2, 1, 3, 2]), ([1, 1], [2, 2], [1, 1, 0, 2]),
    ([2, 1], [1, 2], [-1, 2, 1, -2])])
def test_specialised_filters_of_images_larger_than_a_tile(layout, up, down, padding, emulated):
    x = random_image(2, 4, 37, 70, layout=layout)
    agree(upfirdn2d._upfirdn2d, x, torch.tensor(FILTER), up, down, padding, False, 1.5)
    entry = 'upfirdn2d_tile' if layout == torch.contiguous_format else 'upfirdn2d_pixel'
    assert emulated[-1].entry == entry


OUTER = [1.0, 3.0, 3.0, 2.0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('blocks', [1, 10 ** 6], ids=['long strips', 'short strips'])
@pytest.mark.parametrize('up, down, padding', [
    ([1, 1], [1, 1], [2, 1, 2, 1]), ([2, 2], [1, 1], [2, 1, 3, 2]), ([1, 1], [2, 2], [1, 1, 0, 2]),
    ([2, 2], [2, 2], [1, 2, 1, 1]), ([2, 1], [1, 2], [-1, 2, 1, -2])])
def test_strips_of_nhwc_by_vectors_of_eight(up, down, padding, blocks, dtype, emulated, monkeypatch):
    monkeypatch.setattr(upfirdn2d_cuda, 'PIXEL_BLOCKS', blocks)
    # An idle lane; more columns than a block has; rows that end within a strip.
    x = random_image(2, 24, 41, 35, dtype=dtype, layout=torch.channels_last)
    wide = random_image(1, 8, 19, 71, dtype=dtype, layout=torch.channels_last)
    outer = torch.outer(torch.tensor(OUTER), torch.tensor([1.0, 2.0, -4.0, 0.5]))
    for f in (torch.tensor(FILTER), outer, torch.outer(torch.ones(2), torch.ones(3))):
        for flip in (False, True):
            agree(upfirdn2d._upfirdn2d, x, f, up, down, padding, flip, 0.25)
        agree(upfirdn2d._upfirdn2d, wide, f, up, down, padding, False, 0.25)
    assert {kernel.entry for kernel in emulated} == {'upfirdn2d_pixel'}


@both_layouts
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('blocks', [1, 10 ** 6], ids=['long strips', 'short strips'])
@pytest.mark.parametrize('up, down', [([2, 2], [1, 1]), ([1, 1], [1, 1]), ([1, 1], [2, 2])])
def test_a_filter_plus_a_tensor_in_one_kernel(layout, up, down, blocks, dtype, emulated, monkeypatch):
    monkeypatch.setattr(upfirdn2d_cuda, 'PIXEL_BLOCKS', blocks)
    for f in (torch.tensor(FILTER), torch.outer(torch.tensor(OUTER), torch.tensor(OUTER)) / 81):
        x = random_image(2, 24, 19, 35, dtype=dtype, layout=layout)
        args = (x, f, up, down, [2, 1, 2, 2], False, 0.25)
        r = random_image(*upfirdn2d._upfirdn2d.fake(*args).shape, dtype=dtype, layout=layout)
        agree(upfirdn2d._upfirdn2d_plus, *args, r)
        agree(upfirdn2d._upfirdn2d_plus, *args, r[:1, :1].expand(r.shape))
    assert len(emulated) == 4 and all(dict(kernel.defines)['ADDEND'] == '1' for kernel in emulated)


def test_filters_with_many_taps_take_fewer_channels_a_thread(emulated):
    x = random_image(1, 16, 9, 8, dtype=torch.float16, layout=torch.channels_last)
    agree(upfirdn2d._upfirdn2d, x, torch.randn(6, 6), [2, 2], [1, 1], [2, 3, 3, 2], False, 1.0)
    assert emulated[-1].entry == 'upfirdn2d_pixel' and dict(emulated[-1].defines)['VEC'] == '4'


def test_samples_beyond_offsets_of_32_bits_are_left_to_others(emulated, monkeypatch):
    monkeypatch.setattr(native, 'MAX_OFFSET', 8 * 6 * 6 - 1)
    x, d = random_image(2, 8, 6, 6, layout=torch.channels_last), torch.randn(2, 8)
    agree(epilogue.scale_channels, x, d, by_kernel=False)
    agree(epilogue.scale_channels_grad, x, x, d, by_kernel=False)
    assert not emulated
    agree(upfirdn2d._upfirdn2d, x, torch.tensor(FILTER), [1, 1], [1, 1], [1, 2, 2, 1], False, 1.0)
    assert [kernel.entry for kernel in emulated] == ['upfirdn2d']


@pytest.mark.parametrize('up, down', [(2, 1), (1, 2)])
def test_the_separable_filter_of_the_augmentation(up, down, emulated):
    x = random_image(1, 3, 34, 69)
    agree(upfirdn2d._upfirdn2d, x, torch.randn(12), [up] * 2, [down] * 2, [6, 5, 6, 5], True, 2.0)
    assert [kernel.entry for kernel in emulated] == ['upfirdn2d_tile']


@both_layouts
@pytest.mark.parametrize('up, down', [([1, 1], [1, 1]), ([3, 1], [2, 4])])
def test_any_other_filter_goes_through_the_general_kernel(layout, up, down, emulated):
    for f in (torch.randn(32, 31), torch.randn(24)):
        x = random_image(2, 3, 9, 7, layout=layout)
        agree(upfirdn2d._upfirdn2d, x, f, up, down, [17, 16, 18, 15], False, 0.1)
    assert {kernel.entry for kernel in emulated} == {'upfirdn2d'}


def test_a_filter_that_is_not_contiguous_and_an_input_with_gaps():
    x = random_image(2, 6, 20, 40)[:, ::2, 1:, ::2]
    agree(upfirdn2d._upfirdn2d, x, torch.tensor(FILTER).t(), [1, 1], [1, 1], [1, 2, 2, 1], False, 1.0)
    agree(bias_act._bias_act, x, torch.randn(6)[::2], 1, 'lrelu', 0.2, 1.4, 0.8)


@both_layouts
@pytest.mark.parametrize('shape', [(2, 8, 6, 6), (1, 3, 5, 5), (3, 1, 9, 4), (1, 300, 3, 3), (2, 16, 24, 24)])
def test_epilogue_and_its_gradient_at_many_shapes(shape, layout):
    x, dy, y = (random_image(*shape, layout=layout) for _ in range(3))
    d, b, noise = torch.randn(shape[:2]), torch.randn(shape[1]), torch.randn(shape[0], 1, *shape[2:])
    spec = ('lrelu', 0.2, 1.3, 0.9)
    agree(epilogue.epilogue, x, d, noise, b, *spec)
    agree(epilogue.epilogue_grad, dy, x, y, d, noise.shape, [True] * 4, *spec)
    agree(epilogue.epilogue_grad, dy, None, y, None, noise.shape[2:], [True, False, True, True], *spec)
    agree(epilogue.scale_channels, x, d)
    agree(epilogue.scale_channels_grad, dy, x, d)
    agree(bias_act.act_grad_both, dy, y, *spec)


@both_layouts
@pytest.mark.parametrize('act', ['linear', 'relu', 'lrelu'])
def test_both_gradients_of_a_bias_and_an_activation_come_of_one_kernel(act, layout, emulated):
    x = random_image(2, 8, 6, 5, layout=layout).requires_grad_()
    b = torch.randn(8, requires_grad=True)
    y = bias_act.bias_act(x, b, act=act, gain=1.5, clamp=1.0)
    emulated.clear()
    torch.autograd.grad(y.sum(), [x, b])
    assert [kernel.entry for kernel in emulated] == ['epilogue_grad', 'partial_sums']
    emulated.clear()
    torch.autograd.grad(bias_act.bias_act(x.flatten(2), b, act=act, clamp=1.0).sum(), [x, b])
    assert [kernel.entry for kernel in emulated] == ['bias_act', 'bias_act_grad']


# As large layers: many blocks, of which each goes down several rows. Odd sides; in NCHW only one, for VEC=8.
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape, layout', [
    ((3, 24, 107, 107), torch.channels_last), ((2, 264, 33, 33), torch.channels_last),
    ((4, 267, 24, 41), torch.contiguous_format)], ids=['nhwc_narrow', 'nhwc_wide', 'nchw'])
def test_blocks_that_go_down_several_rows(shape, layout, dtype, monkeypatch):
    monkeypatch.setattr(epilogue_cuda, 'MANY_BLOCKS', 264)
    walk = epilogue_cuda.Walk(
        shape[0], shape[1], shape[2] * shape[3], layout is torch.channels_last, vec=8)
    assert walk.blocks >= 264 and walk.chunk_rows > native.THREADS // walk.lanes
    x, dy, y = (random_image(*shape, dtype=dtype, layout=layout) for _ in range(3))
    d, b = torch.randn(shape[:2]).to(dtype), torch.randn(shape[1]).to(dtype)
    noise = torch.randn(shape[0], 1, *shape[2:]).to(dtype)
    spec = ('lrelu', 0.2, 1.3, 0.875)  # the same clamp in every datatype
    agree(epilogue.epilogue, x, d, noise, b, *spec)
    agree(epilogue.epilogue_grad, dy, x, y, d, noise.shape, [True] * 4, *spec)
    moving = [kernel for kernel in launcher.launched if kernel.entry != 'partial_sums']
    assert all(dict(kernel.defines)['VEC'] == '8' for kernel in moving)


@both_layouts
def test_sums_of_many_rows_on_few_blocks(layout, monkeypatch):
    monkeypatch.setattr(epilogue_cuda, 'MANY_BLOCKS', 1)
    for shape in [(1, 16, 37, 40), (1, 300, 9, 9), (2, 200, 16, 3)]:
        x, dy, y = (random_image(*shape, layout=layout) for _ in range(3))
        d, noise = torch.randn(shape[:2]), torch.randn(1, 1, *shape[2:])
        agree(epilogue.epilogue, x, d, noise, torch.randn(shape[1]), 'lrelu', 0.2, 1.3, -1.0)
        agree(epilogue.epilogue_grad, dy, x, y, d, noise.shape, [True] * 4, 'lrelu', 0.2, 1.3, -1.0)
        agree(epilogue.scale_channels_grad, dy, x, d)


@both_layouts
def test_filter_and_epilogue_in_one_kernel(layout, emulated):
    shape = (2, 8, 18, 40)
    x, d, b = random_image(2, 8, 19, 41, layout=layout), torch.randn(2, 8), torch.randn(8)
    agree(epilogue.filtered_epilogue, x, torch.tensor(FILTER), [1] * 4, False, 4.0, d,
          torch.randn(2, 1, *shape[2:]), b, 'lrelu', 0.2, 1.3, 9.0)
    assert len(emulated) == 1


@both_layouts
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('keeps_y', [True, False])
@pytest.mark.parametrize('shape', [(2, 8, 18, 40), (1, 8, 5, 7), (2, 4, 34, 65)])
def test_a_scaled_epilogue_and_its_gradient(layout, dtype, keeps_y, shape, emulated):
    n, c, h, w = shape
    x = random_image(n, c, h + 1, w + 1, dtype=dtype, layout=layout)
    d, s = torch.randn(n, c).to(dtype), torch.randn(n, c).to(dtype)
    noise, b = torch.randn(n, 1, h, w).to(dtype), torch.randn(c).to(dtype)
    spec = ('lrelu', 0.2, 1.3, 3.0)
    agree(epilogue.scaled_filtered_epilogue, x, torch.tensor(FILTER) / 8, [1] * 4, False, 1.0, d, noise, b, s,
          keeps_y, *spec)
    assert len(emulated) == 1
    dscaled, dy, y = (random_image(*shape, dtype=dtype, layout=layout) for _ in range(3))
    for wants in ([True] * 4, [True, False, False, True]):
        for of_y in (dy, None):
            agree(epilogue.scaled_epilogue_grad, dscaled, of_y, y, s, noise.shape, wants, *spec)


def in_eighths(x):
    """x rounded so that no rounding of act(x) * 1.5 crosses a clamp of 1, where gradients jump."""
    return (8 * x).round() / 8


@both_layouts
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('act', ['linear', 'relu', 'lrelu'])
def test_an_activation_plus_a_tensor_and_the_gradient_from_its_input(layout, dtype, act, emulated):
    for shape in [(2, 16, 7, 6), (3, 5, 5, 3), (2, 264, 9, 11)]:
        x, r = (in_eighths(random_image(*shape, dtype=dtype, layout=layout)) for _ in range(2))
        b = in_eighths(torch.randn(shape[1])).to(dtype)
        agree(activated.bias_act_plus, x, b, r, act, 0.2, 1.5, 1.0)
        agree(activated.bias_act_plus, x, b, r[:1, :1].expand(r.shape), act, 0.2, 1.5, -1.0)
        for wants_db in (True, False):
            agree(activated.input_grad, r, x, b, wants_db, act, 0.2, 1.5, 1.0)
    assert {kernel.entry for kernel in emulated} == {'bias_act', 'epilogue_grad', 'partial_sums'}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('blocks', [1, 10 ** 6], ids=['long strips', 'short strips'])
@pytest.mark.parametrize('act', ['linear', 'relu', 'lrelu'])
def test_an_activation_before_a_filter_and_gradients_after_one(dtype, blocks, act, emulated, monkeypatch):
    monkeypatch.setattr(upfirdn2d_cuda, 'PIXEL_BLOCKS', blocks)
    outer = torch.outer(torch.tensor(OUTER), torch.tensor(OUTER)) / 81
    for f in (torch.tensor(FILTER) / 8, outer):
        for n, c, h, w in [(2, 24, 19, 35), (1, 8, 5, 4), (1, 128, 6, 3)]:
            x = in_eighths(random_image(n, c, h, w, dtype=dtype, layout=torch.channels_last))
            dy = random_image(n, c, h + 1, w + 1, dtype=dtype, layout=torch.channels_last)
            b, s = in_eighths(torch.randn(c)).to(dtype), torch.randn(n, c).to(dtype)
            agree(activated.activated_filter, x, f, [2] * 4, False, b, act, 0.2, 1.5, 1.0)
            agree(activated.activated_filter, x, f, [2] * 4, True, b, act, 0.2, 1.5, -1.0)
            for wants_db in (True, False):
                agree(activated.filtered_input_grad, dy, f, [1] * 4, True, x, b, wants_db, act, 0.2, 1.5, 1.0)
            agree(epilogue.filtered_scale_grad, dy, f, [1] * 4, True, 4.0, x, s)
    assert [kernel.entry for kernel in emulated[-6:]] == [
        'upfirdn2d_pixel', 'upfirdn2d_pixel', 'partial_sums', 'upfirdn2d_pixel', 'upfirdn2d_pixel',
        'partial_sums']


@pytest.mark.parametrize('changed', ['activated_filter', 'filtered_scale_grad'])
def test_what_fusing_kernels_do_not_know_is_left_to_separate_ones(changed, emulated):
    x, dy = random_image(2, 8, 9, 7), random_image(2, 8, 10, 8)  # NCHW
    f, b = torch.tensor(FILTER) / 8, torch.randn(8)
    if changed == 'activated_filter':
        agree(activated.activated_filter, x, f, [2] * 4, False, b, 'lrelu', 0.2, 1.5, 1.5)
        steep = x.contiguous(memory_format=torch.channels_last)
        agree(activated.activated_filter, steep, f, [2] * 4, False, b, 'lrelu', 1.2, 1.5, 1.5)
        agree(activated.filtered_input_grad, dy, f, [1] * 4, True, x, b, True, 'lrelu', 0.2, 1.5, 1.5)
    else:
        agree(epilogue.filtered_scale_grad, dy, f, [1] * 4, True, 4.0, x, torch.randn(2, 8))
    assert not {'PRELUDE', 'GRADIENT'} & {name for kernel in emulated for name, _ in kernel.defines}


def test_noise_of_another_shape_is_left_to_the_reference(emulated):
    x, d, b = random_image(2, 3, 4, 5), torch.randn(2, 3), torch.randn(3)
    for shape in [(2, 3, 4, 5), (), (4, 1), (1, 3, 1, 1)]:
        agree(epilogue.epilogue, x, d, torch.randn(shape), b, 'lrelu', 0.2, 1.0, -1.0, by_kernel=False)
    assert not emulated


def test_what_kernels_do_not_know_is_left_to_the_reference(emulated):
    x = torch.zeros(0, 3, 4, 5)
    assert bias_act._bias_act.run_native(x, None, 1, 'lrelu', 0.2, 1.0, -1.0).shape == x.shape
    bias_act.bias_act(torch.randn(2, 3, dtype=torch.complex64), gain=2.0)
    bias_act.bias_act(torch.randn(2, 3).half(), torch.randn(3), act='relu')
    assert not emulated


@pytest.mark.parametrize('offset', [1, 2, 4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_memory_that_is_not_aligned_to_vectors(offset, dtype):
    memory = torch.randn(2 * 8 * 16 + offset).to(dtype)[offset:].view(2, 8, 4, 4)
    agree(bias_act._bias_act, memory, torch.randn(8).to(dtype), 1, 'relu', 0.0, 1.5, -1.0)
    agree(epilogue.scale_channels, memory, torch.randn(2, 8).to(dtype))


@pytest.mark.parametrize('shape, dim', [
    ((5, 7), 1), ((5, 8), 1), ((3, 4, 6), 2), ((6, 5), 0), ((2, 1, 3), 1)])
def test_bias_along_any_axis_of_any_layout(shape, dim):
    x, b = torch.randn(shape), torch.randn(shape[dim])
    agree(bias_act._bias_act, x, b, dim, 'lrelu', 0.2, 1.5, -1.0)
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    agree(bias_act._bias_act, x, b, dim, 'lrelu', 0.2, 1.5, -1.0)


@pytest.mark.parametrize('act', bias_act.activation_funcs)
def test_activations_at_extreme_inputs_and_not_a_number(act):
    x = torch.tensor([-1e4, -90.0, -1e-4, 0.0, 1e-4, 19.9, 20.1, 1e4, float('nan')])
    kernel = bias_act._bias_act.run_native(x, None, 0, act, 0.2, 1.0, 50.0)
    expected = bias_act._bias_act.reference(x.double(), None, 0, act, 0.2, 1.0, 50.0)
    torch.testing.assert_close(kernel.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_demodulation_and_modulated_weights_of_any_width(kernel_size):
    weight, styles = torch.randn(5, 67, kernel_size, kernel_size), torch.randn(11, 67)
    agree(modulated_conv2d._demodulation, weight, styles, 1e-8)
    agree(modulated_conv2d._modulated_weight, weight, styles, torch.randn(11, 5), torch.float32)


@both_layouts
@pytest.mark.parametrize('normalise', [True, False])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_what_a_layer_of_16_bits_needs_of_any_width(layout, normalise, dtype, kernel_size, emulated):
    weight = random_image(5, 67, kernel_size, kernel_size, layout=layout)
    args = weight, torch.randn(11, 67), 1e-8, normalise, dtype
    actual = modulated_conv2d._modulation.run_native(*args)
    expected = modulated_conv2d._modulation.reference(*args)
    assert [kernel.entry for kernel in emulated] == ['modulation']
    for value, reference in zip(actual, expected, strict=True):
        assert (value.dtype, value.shape, value.stride()) == (
            reference.dtype, reference.shape, reference.stride())
        # In 16 bits, a rounding error of float32 may tip the rounding to either side.
        tolerance = TOLERANCE[value.dtype] / (4 if value.dtype.itemsize == 2 else 1)
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=1e-6)


def image_layer_arguments(n, few, many, height, width, dtype, layout):
    """Features in NHWC, an image in any layout, and a matrix [N, many, few] with a bias."""
    features = random_image(n, many, height, width, dtype=dtype, layout=torch.channels_last)
    image = random_image(n, few, height, width, dtype=dtype, layout=layout)
    return features, image, torch.randn(n, many, few).to(dtype), torch.randn(many).to(dtype)


every_image = pytest.mark.parametrize('few, many, size', [
    (3, 32, (37, 29)), (1, 64, (8, 5)), (4, 24, (3, 7)), (3, 13, (5, 9)), (8, 40, (6, 6)), (3, 512, (4, 5)),
    (2, 260, (9, 3))])


@both_layouts
@every_image
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('blocks', [1, 10 ** 6], ids=['long walks', 'short walks'])
def test_products_between_images_and_features(few, many, size, layout, dtype, blocks, emulated, monkeypatch):
    monkeypatch.setattr(epilogue_cuda, 'MANY_BLOCKS', blocks)
    features, image, w, b = image_layer_arguments(2, few, many, *size, dtype, layout)
    spec, last = ('lrelu', 0.2, 1.25, 2.5), layout is torch.channels_last
    turned = w.transpose(1, 2)
    agree(pixel_product.pixel_product, image, w, None, True)
    agree(pixel_product.pixel_layer, image, w[:1].expand(2, -1, -1), b, True, *spec)
    agree(pixel_product.pixel_outer, image, features)
    agree(pixel_product.pixel_outer, features, image)
    assert {kernel.entry for kernel in emulated} == {'few_to_many', 'few_by_many'}
    if few * many < 2000:
        agree(pixel_product.pixel_product, features, turned, b[:few], last)
        agree(pixel_product.pixel_layer, features, turned, b[:few], last, *spec)
        assert {kernel.entry for kernel in emulated} == {'few_to_many', 'few_by_many', 'many_to_few'}


@both_layouts
@every_image
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_of_a_layer_from_an_image(few, many, size, layout, dtype, emulated, monkeypatch):
    monkeypatch.setattr(epilogue_cuda, 'MANY_BLOCKS', 4)
    y, image, w, _ = image_layer_arguments(2, few, many, *size, dtype, layout)
    dy = torch.randn_like(y)
    is_narrow = many <= 32 * native.VECTOR_BYTES // dtype.itemsize
    for wants in ([is_narrow, True, True], [False, True, False], [is_narrow, False, True]):
        emulated.clear()
        agree(pixel_product.pixel_layer_grad, dy, y, image, w, wants, 'lrelu', 0.2, 1.25, 1.5)
        assert [kernel.entry for kernel in emulated] == ['few_to_many_grad']
    agree(pixel_product.pixel_layer_grad, dy, y, image, w, [True] * 3, 'lrelu', 0.2, 1.25, 1.5)


def test_matrices_that_registers_do_not_hold_are_left_to_the_reference(emulated):
    features, _, w, _ = image_layer_arguments(1, 8, 512, 3, 4, torch.float32, torch.channels_last)
    agree(pixel_product.pixel_product, features, w.transpose(1, 2), None, False, by_kernel=False)
    nine = random_image(1, 9, 3, 4, layout=torch.channels_last)
    agree(pixel_product.pixel_product, nine, torch.randn(1, 16, 9), None, True, by_kernel=False)
    agree(pixel_product.pixel_outer, nine, features, by_kernel=False)
    assert not emulated


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('act, clamp', [('lrelu', 1.0), ('linear', None)])
def test_a_layer_from_an_image_is_the_convolution_it_replaces_to_the_second_order(
        channels, act, clamp, emulated):
    layer = networks.Conv2dLayer(channels, 16, 1, activation=act, conv_clamp=clamp)
    with torch.no_grad():
        layer.bias.normal_()
    image = random_image(2, channels, 7, 6).to(memory_format=torch.channels_last).requires_grad_()
    outcomes = []
    for is_native in (True, False):
        with mock.patch.object(custom_ops, 'is_available', lambda device, answer=is_native: answer):
            y = layer(image)
            assert y.is_contiguous(memory_format=torch.channels_last)
            (slope,) = torch.autograd.grad(y.square().sum(), image, create_graph=True)
            penalty = slope.square().sum()
            outcomes.append([y, slope, *torch.autograd.grad(penalty, [image, *layer.parameters()])])
        if is_native:
            assert {'few_to_many', 'few_to_many_grad', 'few_by_many'} <= {k.entry for k in emulated}
    for by_kernel, by_torch in zip(*outcomes, strict=True):
        largest = float(by_torch.detach().abs().max())
        torch.testing.assert_close(by_kernel, by_torch, rtol=1e-4, atol=1e-4 * largest)


@both_layouts
@pytest.mark.parametrize('dtypes', [
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('channels', [(5, 67), (270, 3), (3, 300)])
def test_the_gradient_of_modulation_of_any_width(layout, dtypes, kernel_size, channels, emulated):
    (o, i), (narrow, of_d) = channels, dtypes
    weight, to_scaled = (random_image(o, i, kernel_size, kernel_size, layout=layout) for _ in range(2))
    args = (weight, torch.randn(11, i), torch.randn(11, o), torch.randn(o, i), torch.rand(o), torch.rand(11),
            to_scaled.to(narrow), torch.randn(11, i).to(narrow), torch.randn(11, o).to(of_d))
    agree(modulated_conv2d._modulation_grad, *args, None, [True, True])
    agree(modulated_conv2d._modulation_grad, *args, torch.randn(o, i), [True, False])
    agree(modulated_conv2d._modulation_grad, *args[:6], None, None, args[8], None, [True, True])
    assert [kernel.entry for kernel in emulated] == ['modulation_grad'] * 3


def transform(kind):
    """A matrix [1, 3, 3] on positions in [-1, 1]^2."""
    rows = {
        'turned': [[0.5, -0.4, 0.1], [0.3, 0.6, -0.2]], 'mirrored': [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        'far outside': [[1.0, 0.0, 5.0], [0.0, 1e6, 0.0]],
        'enlarged': [[0.05, 0.0, 0.3], [0.02, 0.04, 0.1]], 'flattened': [[0.4, 0.4, 0.0], [0.2, 0.2, 0.1]]}
    return torch.tensor([[*rows[kind], [0.0, 0.0, 1.0]]])


@pytest.mark.parametrize('kind', ['turned', 'mirrored', 'far outside', 'enlarged', 'flattened'])
@pytest.mark.parametrize(
    'channels, size, margins', [(3, (19, 37), [36, 20, 5, 18]), (5, (9, 4), [0, 3, 8, 0])])
def test_images_are_warped_in_one_pass(kind, channels, size, margins, emulated):
    taps, matrix = torch.randn(12), transform(kind).double()
    x, out_size = random_image(1, channels, *size, dtype=torch.float64), [2 * side + 5 for side in size]
    with mock.patch.object(warp, 'MATRIX_SIDE', 0):
        agree(warp.warp, x, taps, matrix, out_size, margins)
        dy = random_image(1, channels, *out_size, dtype=torch.float64)
        agree(warp.warp_adjoint, dy, taps, matrix, list(size), margins)
    assert {kernel.entry for kernel in emulated} == {'warp', 'warp_adjoint'}


def test_another_filter_warps_by_the_reference(emulated):
    x, args = random_image(1, 3, 6, 5), (torch.randn(10), transform('turned'), [9, 8], [1, 2, 3, 0])
    torch.testing.assert_close(warp.warp.run_native(x, *args), warp.warp.reference(x, *args))
    assert 'warp' not in {kernel.entry for kernel in emulated}


def test_the_augmentation_by_kernels_is_the_one_by_torch(emulated):
    pipe = AugmentPipe(rotate90=1, xint=1, scale=1, rotate=1, aniso=1, xfrac=1)
    images, dy = random_image(3, 3, 20, 33).requires_grad_(), random_image(3, 3, 20, 33)
    outcomes = []
    for is_native in (True, False):
        torch.manual_seed(3)
        with mock.patch.object(custom_ops, 'is_available', lambda device, answer=is_native: answer):
            y = pipe(images)
            outcomes.append([y, *torch.autograd.grad(y, images, dy)])
    assert {'warp', 'warp_adjoint'} <= {kernel.entry for kernel in emulated}
    for by_kernel, by_torch in zip(*outcomes, strict=True):
        torch.testing.assert_close(by_kernel, by_torch, rtol=0, atol=3e-4)  # white noise, positions of 1e-5
