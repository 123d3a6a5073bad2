# SPDX-License-Identifier: Apache-2.0
"""Pixels: how they are rounded, stored and put on sheets."""
import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import image_io
from dnnlib.util import UserError


def read(path):
    with PIL.Image.open(path) as image:
        return image.mode, np.asarray(image)


def test_values_are_rounded_and_limited():
    nan, inf = float('nan'), float('inf')
    values = torch.tensor([-9.0, -1.0, -0.9980, 0.0, 0.4980, 1.0, 7.0, nan, inf, -inf])
    assert image_io.to_uint8(values).tolist() == [0, 0, 0, 128, 191, 255, 255, 0, 255, 0]


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA')])
def test_a_png_holds_exactly_the_pixels(tmp_path, channels, mode):
    pixels = np.random.default_rng(0).integers(0, 256, [channels, 5, 7], dtype=np.uint8)
    image_io.save_png(tmp_path / 'x.png', pixels)
    found_mode, found = read(tmp_path / 'x.png')
    assert found_mode == mode
    assert np.array_equal(found.reshape(5, 7, channels).transpose(2, 0, 1), pixels)
    assert [p.name for p in tmp_path.iterdir()] == ['x.png']


@pytest.mark.parametrize('channels', [0, 5])
def test_other_numbers_of_channels_are_refused(tmp_path, channels):
    with pytest.raises(UserError, match=f'{channels} channels'):
        image_io.save_png(tmp_path / 'x.png', np.zeros([channels, 2, 2], np.uint8))
    with pytest.raises(UserError, match=f'{channels} channels'):
        image_io.ContactSheet(1, 1, (channels, 2, 2))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot be written'):
        image_io.save_png(tmp_path / 'absent' / 'x.png', np.zeros([1, 2, 2], np.uint8))


def test_a_sheet_puts_images_in_their_places_and_leaves_the_rest_black(tmp_path):
    sheet = image_io.ContactSheet(3, 2, (1, 2, 4))
    sheet.put(2, 1, np.full([1, 2, 4], 9, np.uint8))
    sheet.save(tmp_path / 'sheet.png')
    mode, pixels = read(tmp_path / 'sheet.png')
    assert mode == 'L' and pixels.shape == (4, 12)
    assert (pixels[2:, 8:] == 9).all() and pixels.sum() == 8 * 9


def test_a_huge_sheet_is_scaled_down(tmp_path, monkeypatch):
    monkeypatch.setattr(image_io, 'MAX_SHEET_PX', 10)
    sheet = image_io.ContactSheet(4, 1, (3, 5, 6))  # 24 pixels wide: every third one is kept
    sheet.put(3, 0, np.full([3, 5, 6], 200, np.uint8))
    sheet.save(tmp_path / 'sheet.png')
    pixels = read(tmp_path / 'sheet.png')[1]
    assert pixels.shape == (2, 8, 3) and (pixels[:, 6:] == 200).all() and not pixels[:, :6].any()
