# SPDX-License-Identifier: Apache-2.0
"""Distances of images: what they see of alpha, of sizes and of values out of range; PSNR."""
import numpy as np
import pytest
import torch
from metrics_stand_in import write_detectors

from dnnlib.util import UserError
from metrics.detectors import DetectorMissingError
from training.projection.distance import (
    MAX_PSNR_DB,
    opaque_views,
    open_distance,
    perceptual_distance,
    pixel_distance,
    psnr,
    visible,
)

CPU = torch.device('cpu')


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 255


def offline(url, **_):
    raise UserError(f'{url}: no connection')


def between(distance, a, b):
    return distance.between(distance.describe(a), distance.describe(b))


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('name', ['pixel', 'vgg16'])
def test_distances_are_zero_for_equal_images_and_have_gradients(tmp_path, channels, name):
    distance = open_distance(name, CPU, write_detectors(tmp_path))
    assert distance.name == name
    a, b = images(2, channels, 12, 20), images(2, channels, 12, 20, seed=1).requires_grad_()
    assert between(distance, a, a).tolist() == [0, 0]
    apart = between(distance, a, b)
    assert apart.shape == (2,) and (apart > 0).all()
    apart.sum().backward()
    assert (b.grad.abs().amax(dim=(2, 3)) > 0).all()


def test_the_pixel_distance_is_the_mean_difference_over_levels():
    black, gray = torch.zeros([1, 3, 16, 16]), torch.full([1, 3, 16, 16], 127.5)
    assert between(pixel_distance(), black, gray).item() == pytest.approx(0.5)
    # A checkerboard is gray from the second of three levels on.
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 255.0).expand(1, 3, -1, -1)
    assert between(pixel_distance(), board, gray).item() == pytest.approx(0.5 / 3)


def test_what_nobody_can_see_is_no_pixel_distance_but_values_find_their_way_back():
    white = torch.full([1, 3, 8, 8], 255.0)
    assert between(pixel_distance(), white, white + 90).item() == 0
    far = torch.full([1, 3, 8, 8], 300.0, requires_grad=True)
    between(pixel_distance(), torch.zeros_like(white), far).sum().backward()
    assert (far.grad > 0).all()
    assert visible(torch.tensor([-7.0, 30.0, 256.0])).tolist() == [0, 30, 255]


def test_large_images_are_reduced_for_the_perceptual_network_only():
    seen = []

    def detector(images, **options):
        seen.append(tuple(images.shape))
        assert options == {'resize_images': False, 'return_lpips': True}
        return images.mean(dim=(2, 3))
    for size in ((512, 512), (300, 600), (256, 400), (64, 1000)):
        perceptual_distance(detector).describe(torch.zeros([1, 1, *size]))
    assert seen == [(1, 3, 256, 256), (1, 3, 256, 512), (1, 3, 256, 400), (1, 3, 64, 1000)]


def test_views_tell_transparency_from_white_and_hidden_colours_apart():
    red_hidden, clear = torch.tensor([255.0, 0, 0, 0]), torch.tensor([9.0, 9, 9, 0])
    white = torch.tensor([255.0, 255, 255, 255])
    a, b, c = (torch.stack(opaque_views(x.view(1, 4, 1, 1))).flatten() for x in (red_hidden, clear, white))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.tolist() == [0, 0, 0, 255, 255, 255]


def test_auto_falls_back_to_pixels_with_a_line_and_vgg16_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr('metrics.detectors.util.open_url', offline)
    assert open_distance('auto', CPU).name == 'pixel'
    assert '--distance=pixel' in capsys.readouterr().out
    with pytest.raises(DetectorMissingError, match='--distance=pixel'):
        open_distance('vgg16', CPU)
    assert open_distance('auto', CPU, write_detectors(tmp_path / 'here')).name == 'vgg16'


def test_psnr_of_known_differences():
    a = np.full([3, 4, 4], 100, np.uint8)
    assert psnr(a, a) == MAX_PSNR_DB
    assert psnr(a, a + 10) == pytest.approx(20 * np.log10(25.5))
    clear, hidden = np.zeros([4, 2, 2], np.uint8), np.zeros([4, 2, 2], np.uint8)
    hidden[0] = 200
    assert psnr(clear, hidden) == MAX_PSNR_DB
