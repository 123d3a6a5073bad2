# SPDX-License-Identifier: Apache-2.0
"""Sheets inside the page: which, which part of them, and how large."""
import base64
import io

import numpy as np
import PIL.Image
import pytest

from training.report.thumbnails import (
    SHEET_BYTES,
    THUMBNAIL_BYTES,
    encode,
    evenly,
    fake_sheets,
    sheet_uri,
    thumbnail_uri,
)


def save(path, height, width, mode='RGB', noise=False):
    """A sheet whose red is the column and green the row, or noise."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 256, y % 256, 0 * x], axis=2).astype(np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(path)
    return path


def decode(uri):
    head, _, data = uri.partition(',')
    assert head in ('data:image/png;base64', 'data:image/jpeg;base64')
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def test_sheets_come_in_the_order_of_training(tmp_path):
    for name in ('fakes_init.png', 'fakes000100.png', 'fakes000020.png', 'fakes1000000.png', 'fakes_x.png',
                 'reals.png'):
        save(tmp_path / name, 2, 2)
    found = fake_sheets(tmp_path)
    assert [(kimg, path.name) for kimg, path in found] == [
        (0, 'fakes_init.png'), (20, 'fakes000020.png'), (100, 'fakes000100.png'),
        (1000000, 'fakes1000000.png')]


def test_chosen_sheets_are_spread_over_time_with_both_ends():
    sheets = [(kimg, None) for kimg in [*range(100), 1000, 2000]]
    chosen = [kimg for kimg, _ in evenly(sheets, 5)]
    assert chosen[0] == 0 and chosen[-1] == 2000 and 1000 in chosen and len(chosen) <= 5
    assert evenly(sheets[:5], 5) == sheets[:5]
    assert [kimg for kimg, _ in evenly([(k, None) for k in range(0, 1100, 100)], 6)] == [
        0, 200, 400, 600, 800, 1000]


def test_whole_images_are_cut_from_the_top_left(tmp_path):
    sheet = save(tmp_path / 'fakes.png', 32 * 16, 32 * 20)
    image = decode(sheet_uri(sheet, (32, 32)))
    # 8 by 8 images, enlarged by a whole factor.
    assert image.size == (512, 512) and image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((511, 511)) == (255, 255, 0)
    assert decode(thumbnail_uri(sheet, (32, 32))).size == (96, 96)


def test_wide_images_get_more_rows(tmp_path):
    sheet = save(tmp_path / 'fakes.png', 16 * 32, 64 * 10)
    width, height = decode(sheet_uri(sheet, (16, 64))).size
    assert width == height  # 8 columns of 64, 32 rows of 16


def test_small_sheets_and_unknown_sizes_are_shown_whole(tmp_path):
    sheet = save(tmp_path / 'fakes.png', 40, 80)
    for tile in (None, (40, 40)):
        width, height = decode(sheet_uri(sheet, tile)).size
        assert width == 2 * height


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'P', '1'])
def test_every_kind_of_image_can_be_shown(mode, tmp_path):
    sheet = save(tmp_path / 'fakes.png', 64, 64, mode)
    assert decode(sheet_uri(sheet, (8, 8))).mode == 'RGB'


def test_noise_of_any_size_stays_within_the_limit(tmp_path):
    sheet = save(tmp_path / 'fakes.png', 2048, 2048, noise=True)
    for uri, limit in ((sheet_uri(sheet, (256, 256)), SHEET_BYTES),
                       (thumbnail_uri(sheet, (256, 256)), THUMBNAIL_BYTES)):
        assert len(base64.b64decode(uri.partition(',')[2])) <= limit
    assert encode(PIL.Image.new('RGB', (1, 1)), 1).startswith('data:image/')


def test_files_that_cannot_be_read_are_none(tmp_path):
    broken = tmp_path / 'fakes.png'
    broken.write_bytes(b'no image')
    for path in (broken, tmp_path / 'missing.png'):
        assert sheet_uri(path, None) is None and thumbnail_uri(path, None) is None


def test_a_sheet_that_is_written_again_is_read_again(tmp_path):
    path = save(tmp_path / 'fakes.png', 8, 8)
    first = thumbnail_uri(path, (8, 8))
    path.unlink()
    PIL.Image.new('RGB', (8, 8), 'white').save(path)
    assert thumbnail_uri(path, (8, 8)) != first
