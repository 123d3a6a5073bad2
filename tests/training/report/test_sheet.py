# SPDX-License-Identifier: Apache-2.0
"""The sheet of samples: size, choice of images, pixels."""
import numpy as np
import PIL.Image
import pytest
import torch
from golden_cases import index

from dnnlib.util import UserError
from training.report.sheet import grid_indices, grid_size, save_image_grid, tile_images

LOOP = index('loop_misc')


@pytest.mark.parametrize('case', LOOP.get('grid_sizes', []))
def test_golden_sizes(case):
    assert list(grid_size(case['height'], case['width'])) == case['grid']


def test_the_size_follows_width_and_height_separately():
    assert grid_size(height=1024, width=256) == (30, 4)


@pytest.mark.parametrize('max_images', [1, 2, 7, 64, 100, 1023])
def test_fewer_images_keep_the_proportions(max_images):
    columns, rows = grid_size(32, 32, max_images)
    assert max_images * 0.5 <= columns * rows <= max_images and abs(columns - rows) <= max(columns, rows) // 2
    assert grid_size(1024, 1024, 28) == (7, 4)


@pytest.mark.parametrize('case', LOOP.get('grid_indices', []))
def test_golden_choices(case):
    height, width = case['image_shape'][1:]
    grid = grid_size(height, width)
    assert list(grid) == case['grid']
    labels = None if case['raw_labels'] is None else np.array(case['raw_labels'])
    assert grid_indices(case['num_images'], grid, labels) == case['indices']


def test_rows_of_a_label_go_on_where_its_row_before_ended():
    labels = [0] * 5 + [1] * 2
    rows = np.reshape(grid_indices(7, (2, 6), labels), [6, 2])
    assert [{labels[i] for i in row} for row in rows] == [{0}, {1}] * 3
    shown = rows[::2].ravel()
    assert set(shown[:5]) == set(range(5)) and shown[5] == shown[0]


def test_vector_labels_are_sorted_by_their_last_element_first():
    labels = np.array([[0, 1], [1, 0], [0, 1], [1, 0]])
    rows = np.reshape(grid_indices(4, (2, 2), labels), [2, 2])
    assert [set(row) for row in rows.tolist()] == [{1, 3}, {0, 2}]


def test_every_image_of_a_small_set_is_shown_again_and_again():
    chosen = grid_indices(3, (2, 3))
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2] and chosen[:3] == chosen[3:]


@pytest.mark.parametrize('case', LOOP.get('grid_pixels', []))
def test_golden_pixels(case, tmp_path):
    save_image_grid(tmp_path / 'a.png', np.array(case['images']), case['drange'], case['grid'])
    with PIL.Image.open(tmp_path / 'a.png') as image:
        assert image.mode == case['mode']
        assert np.asarray(image).tolist() == case['pixels']


@pytest.mark.parametrize(('channels', 'mode'), [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA'), (5, 'RGB')])
def test_any_number_of_channels_can_be_shown(channels, mode, tmp_path):
    images = (torch.arange(2 * channels) * 10.0).reshape(2, channels, 1, 1).expand(-1, -1, 3, 2)
    save_image_grid(tmp_path / 'a.png', images, (0, 255), (1, 2))
    with PIL.Image.open(tmp_path / 'a.png') as image:
        assert (image.mode, image.size) == (mode, (2, 6))
        pixels = np.asarray(image).reshape(6, 2, -1)
    shown = pixels.shape[2]
    assert pixels[0, 0].tolist() == [10 * c for c in range(shown)]
    assert pixels[5, 1].tolist() == [10 * (channels + c) for c in range(shown)]


def test_uint8_images_stay_as_they_are_and_nan_becomes_black():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(tile_images(images, (0, 255), (1, 1)), images[0, 0])
    assert tile_images(torch.full([1, 1, 1, 1], float('nan')), (-1, 1), (1, 1)).tolist() == [[0]]


def test_a_wrong_number_of_images_is_refused():
    with pytest.raises(ValueError, match=r'2x2 needs images \[4, C, H, W\], got \[3, 1, 2, 2\]'):
        tile_images(np.zeros([3, 1, 2, 2]), (0, 1), (2, 2))


def test_an_unwritable_place_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match='missing'):
        save_image_grid(tmp_path / 'missing' / 'a.png', np.zeros([1, 1, 2, 2]), (0, 1), (1, 1))
    assert not list(tmp_path.iterdir())
