# SPDX-License-Identifier: Apache-2.0
"""The augmentation pipeline: recorded outputs, bits, channels, shapes, gradients and pickles."""
import copy
import inspect
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from golden_cases import arrays, cases, index
from torch.autograd import gradcheck, gradgradcheck

from dnnlib.util import UserError
from torch_utils import host_draws
from torch_utils.ops import warp
from training.augment import TRANSFORMS, AugmentPipe
from training.augmentation import resample

BLIT, GEOM = ['xflip', 'rotate90', 'xint'], ['scale', 'rotate', 'aniso', 'xfrac']
COLOR = ['brightness', 'contrast', 'lumaflip', 'hue', 'saturation']
ALL = BLIT + GEOM + COLOR + ['imgfilter', 'noise', 'cutout']


def build(names, p=1.0, device='cpu', **settings):
    pipe = AugmentPipe(**dict.fromkeys(names, 1), **settings).to(device)
    pipe.p.fill_(p)
    return pipe


def recorded(key, device='cpu'):
    return torch.from_numpy(arrays('augment.npz')[key]).float().to(device)


@pytest.mark.parametrize('case', cases('augment'))
def test_recorded_output(case, device):
    images, randn = recorded(case['input'], device), torch.randn

    def recorded_noise(shape, **kwargs):
        is_image = 'noise' in case and list(shape) == list(images.shape)
        return recorded(case['noise'], device) if is_image else randn(shape, **kwargs)
    pipe = build([], case['p'], device, **case['kwargs'])
    with mock.patch.object(torch, 'randn', recorded_noise):
        output = pipe(images, debug_percentile=case['debug_percentile'])
    torch.testing.assert_close(output, recorded(case['output'], device), rtol=0, atol=2e-5)


def test_recorded_buffers():
    if 'buffers' not in index('augment'):
        pytest.skip('no recorded filters in this folder')
    state = AugmentPipe().state_dict()
    assert list(state) == ['p', 'Hz_geom', 'Hz_fbank'] and state['p'] == 1
    for name, key in index('augment')['buffers'].items():
        torch.testing.assert_close(state[name], recorded(key), rtol=0, atol=1e-6)


def test_every_row_has_a_multiplier_that_is_off_by_default():
    defaults = {k: p.default for k, p in inspect.signature(AugmentPipe.__init__).parameters.items()}
    assert [row.name for row in TRANSFORMS] == [
        *BLIT, 'scale', 'rotate', 'aniso', 'rotate', 'xfrac', *COLOR, 'imgfilter', 'noise', 'cutout']
    assert all(defaults[row.name] == 0 for row in TRANSFORMS)
    images = torch.randn(2, 3, 8, 8)
    assert AugmentPipe()(images) is images


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_p_of_zero_is_the_identity_to_the_bit(channels, dtype, device):
    images = torch.randn(3, channels, 9, 7, device=device).to(dtype)
    output = build(ALL, p=0.0, device=device)(images)
    assert output.dtype == dtype and torch.equal(output, images)


@pytest.mark.parametrize('names', [BLIT + GEOM, COLOR, ['imgfilter'], ['noise'], ['cutout']], ids='+'.join)
def test_images_that_draw_nothing_are_unchanged_to_the_bit_beside_others(names, device):
    images = torch.randn(40, 3, 24, 24, device=device)
    output = build(names, p=0.12, device=device)(images)
    is_same = (output == images).flatten(1).all(dim=1)
    close = (output - images).abs().flatten(1).amax(dim=1) < 1e-5
    assert 0 < is_same.sum() < 40 and torch.equal(is_same, close)


def test_draws_are_independent_for_each_image_and_follow_the_seed(device):
    images, pipe = torch.randn(1, 3, 8, 8, device=device).repeat(6, 1, 1, 1), build(ALL, device=device)
    torch.manual_seed(5)
    first, second = pipe(images), pipe(images)
    torch.manual_seed(5)
    assert torch.equal(pipe(images), first) and not torch.equal(first, second)
    assert len({tuple(x.flatten().tolist()) for x in first}) == 6


@pytest.mark.gpu
def test_both_devices_draw_the_same():
    images, outputs = torch.randn(8, 3, 16, 16), []
    for device in ('cpu', 'cuda'):
        torch.manual_seed(3)
        pipe = build(BLIT + GEOM + COLOR + ['imgfilter', 'cutout'], p=0.5, device=device)
        outputs.append(pipe(images.to(device)).cpu())
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_no_wait_for_the_gpu_unless_p_was_changed():
    images, pipe = torch.randn(4, 3, 32, 32, device='cuda'), build(ALL, p=0.5, device='cuda')
    pipe(images)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(5):
            pipe(images)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    pipe.p.fill_(0)
    assert torch.equal(pipe(images), images)


def test_at_p_of_zero_a_gpu_draws_as_many_numbers_but_does_nothing():
    states = []
    for p in (0.0, 0.5):
        torch.manual_seed(2)
        draw = build(ALL, p)._draw((3, 3, 8, 8), torch.float32, True, None)
        states.append(torch.get_rng_state())
        assert (draw.form == ()) == (p == 0)
    assert torch.equal(*states)


def test_settings_that_are_changed_later_count():
    images, pipe = torch.randn(8, 3, 8, 8), build(['contrast'])
    assert not torch.equal(pipe(images), images)
    pipe.contrast_std = 0
    assert torch.equal(pipe(images), images)
    pipe.contrast_std, pipe.contrast = 0.5, 1e-9
    assert torch.equal(pipe(images), images)


def test_changes_of_p_take_effect_at_once(device):
    images, pipe = torch.randn(8, 3, 8, 8, device=device), build(COLOR, p=0.0, device=device)
    assert torch.equal(pipe(images), images)
    pipe.p.copy_(torch.ones([]))
    assert not torch.equal(pipe(images), images)
    twin = copy.deepcopy(pipe)
    twin.p.zero_()
    assert torch.equal(twin(images), images) and not torch.equal(pipe(images), images)
    pipe.load_state_dict(twin.state_dict())
    assert torch.equal(pipe(images), images)


def test_alpha_is_left_alone_by_colours_and_moves_with_the_image():
    images = torch.randn(2, 4, 16, 16)
    output = build(COLOR)(images, debug_percentile=0.3)
    assert torch.equal(output[:, 3], images[:, 3])
    torch.testing.assert_close(output[:, :3], build(COLOR)(images[:, :3], debug_percentile=0.3))
    moved = build(GEOM)(images, debug_percentile=0.3)
    torch.testing.assert_close(moved[:, 3:], build(GEOM)(images[:, 3:], debug_percentile=0.3))


def test_grey_images_change_as_grey_rgb_images_do():
    grey = torch.randn(3, 1, 5, 5)
    output = build(COLOR)(grey, debug_percentile=0.7)
    assert not torch.allclose(output, grey)
    expected = build(COLOR)(grey.expand(-1, 3, -1, -1), debug_percentile=0.7).mean(dim=1, keepdim=True)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize('channels', [2, 5])
def test_other_channel_counts_work_but_for_colours(channels):
    images = torch.randn(2, channels, 24, 24)
    for names in (BLIT, GEOM, ['imgfilter'], ['noise'], ['cutout']):
        assert build(names)(images).shape == images.shape
    with pytest.raises(UserError, match=rf'brightness=1: .* {channels}; use --augpipe=bg'):
        build(COLOR)(images)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (5, 16), (16, 5), (21, 21)])
def test_images_of_any_size(size):
    images = torch.randn(4, 3, *size)
    output = build(ALL)(images)
    assert output.shape == images.shape and output.isfinite().all()


def test_flips_and_shifts_of_a_non_square_image():
    images = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 8), [16, 32], mode='bicubic')
    flipped = build(['xflip'])(images, debug_percentile=0.9)
    assert (flipped - images.flip(3)).abs().mean() < 0.05  # the low-pass filter is not symmetric
    assert (flipped - images).abs().mean() > 0.5
    shifted = build(['xint'])(images, debug_percentile=0.75)  # 1/16 of each side: x by 2, y by 1
    torch.testing.assert_close(shifted[:, :, 4:, 8:], images[:, :, 3:-1, 6:-2], rtol=0, atol=1e-4)


def test_reflection_by_more_than_the_image_continues_without_end():
    for size, margin in [((1, 4), 7), ((5, 5), 4), ((2, 3), 21)]:
        x = torch.randn(1, 1, *size)
        expected = np.pad(x.numpy(), [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode='reflect')
        np.testing.assert_array_equal(resample._pad_reflect(x, margin), expected)


@pytest.mark.parametrize('size', [(1, 1), (7, 12), (32, 20)])
def test_matrix_products_resample_as_filters_do(size):
    images, pipe = torch.randn(3, 2, *size, dtype=torch.float64), build(GEOM)
    torch.manual_seed(1)
    by_matrix = pipe(images)
    torch.manual_seed(1)
    with mock.patch.object(warp, 'MATRIX_SIDE', 0):
        by_filter = pipe(images)
    torch.testing.assert_close(by_matrix, by_filter, rtol=0, atol=1e-6)  # the filter is float32


def test_where_algorithms_are_to_be_deterministic_images_are_padded_by_joining(monkeypatch):
    x, margins = torch.randn(2, 3, 5, 6, dtype=torch.float64), [2, 5, 4, 0]
    expected = warp.continued(x, margins)
    gradient = warp.continued_grad(expected, [5, 6], margins)
    monkeypatch.setattr(warp.F, 'pad', lambda *args, **options: pytest.fail('F.pad'))
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert torch.equal(warp.continued(x, margins), expected)
        torch.testing.assert_close(warp.continued_grad(expected, [5, 6], margins), gradient)
    finally:
        torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize(('side', 'is_exact'), [(8, False), (32, True)])
def test_flips_turns_and_shifts_take_samples_at_pixels_where_the_enlarged_side_is_a_power_of_two(
        monkeypatch, side, is_exact):
    distances, sample = [], warp.F.grid_sample

    def measure(x, grid, **options):
        positions = ((grid + 1) * torch.tensor(x.shape[:1:-1]) - 1) / 2
        distances.append((positions - positions.round()).abs().max())
        return sample(x, grid, **options)
    monkeypatch.setattr(warp.F, 'grid_sample', measure)
    monkeypatch.setattr(warp, 'MATRIX_SIDE', 0)
    with host_draws.force_static():
        for _ in range(20):
            build(BLIT, p=0.6)(torch.randn(4, 3, side, side))
    assert (max(distances) == 0) == is_exact


def test_gradients_of_first_and_second_order_for_fixed_parameters():
    pipe = build([name for name in ALL if name != 'noise'])
    images = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: pipe(x, debug_percentile=0.3), images, fast_mode=True)
    assert gradgradcheck(lambda x: pipe(x, debug_percentile=0.3), images, fast_mode=True)


def test_gradients_of_second_order_where_only_some_images_change():
    pipe = build(['xfrac', 'contrast', 'imgfilter', 'cutout', 'noise'], p=0.4)

    def seeded(x):
        torch.manual_seed(2)
        return pipe(x).square()  # second derivatives of a linear function alone would be zero
    images = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(seeded, images, fast_mode=True)


def test_filtering_beyond_the_matrix_size_has_second_derivatives_too():
    images = torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    with mock.patch.object(warp, 'MATRIX_SIDE', 0):
        assert gradgradcheck(lambda x: build(GEOM)(x, debug_percentile=0.6).square(), images, fast_mode=True)


def test_cutout_hole_has_the_wanted_size_and_leaves_the_rest():
    output = build(['cutout'], cutout_size=0.25)(torch.ones(1, 3, 16, 8), debug_percentile=0.5)
    assert (output == 0).sum() == 3 * 4 * 2 and (output[0, :, 6:10, 3:5] == 0).all()
    assert (output[output != 0] == 1).all()


def test_autocast_does_not_lower_the_precision():
    images, pipe = torch.randn(2, 3, 24, 24), build(GEOM + COLOR + ['imgfilter'])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = pipe(images, debug_percentile=0.3)
    torch.testing.assert_close(inside, pipe(images, debug_percentile=0.3), rtol=0, atol=1e-6)


def test_tables_made_in_inference_mode_serve_training_later():
    warp.axis_matrix.cache_clear()
    images, pipe = torch.randn(2, 3, 6, 6), build(GEOM)
    with torch.inference_mode():
        pipe(images)
    pipe(images.requires_grad_()).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize('quantile, names', [
    (-0.1, []), (1, ['xflip']), (1.5, []), (0, ['scale']), (0, ['contrast'])])
def test_quantiles_without_a_finite_parameter_are_refused(quantile, names):
    with pytest.raises(UserError, match='debug_percentile='):
        build(names)(torch.zeros(1, 3, 4, 4), debug_percentile=quantile)


@pytest.mark.parametrize('images', [torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_input_of_the_wrong_kind_is_refused(images):
    with pytest.raises(ValueError, match=r'images must be \[N, C, H, W\]'):
        AugmentPipe()(images)


@pytest.mark.parametrize('settings', [
    {'xflip': -1}, {'rotate': float('nan')}, {'noise_std': float('inf')}, {'imgfilter_bands': [1, 1]},
    {'imgfilter_bands': [1, 1, -1, 1]}])
def test_invalid_settings_name_themselves(settings):
    with pytest.raises(UserError, match=f'{next(iter(settings))}='):
        AugmentPipe(**settings)


def test_pickle_keeps_settings_buffers_and_behaviour():
    pipe = build(ALL, p=0.3, noise_std=0.05, imgfilter_bands=[1, 0, 1, 0.5])
    twin = pickle.loads(pickle.dumps(pipe))
    assert twin.init_kwargs['noise_std'] == 0.05 and twin.p == pipe.p and not hasattr(twin, '_p_read')
    images = torch.randn(4, 3, 8, 8)
    outputs = []
    for module in (pipe, twin):
        torch.manual_seed(9)
        outputs.append(module(images))
    assert torch.equal(*outputs)


def test_the_order_of_rows_is_the_order_of_effects():
    images = torch.rand(1, 3, 8, 8)
    both = build(['brightness', 'contrast'])(images, debug_percentile=0.8)
    steps = build(['contrast'])(build(['brightness'])(images, debug_percentile=0.8), debug_percentile=0.8)
    torch.testing.assert_close(both, steps)
