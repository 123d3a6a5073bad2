# SPDX-License-Identifier: Apache-2.0
"""Decoding: true colours for every pixel format, the same with and without pyspng, damage is reported."""
import numpy as np
import pytest
from dataset_cases import encode, make_image
from PIL import Image

from training.datasets import images
from training.datasets.images import (
    ImageError,
    convert_mode,
    decode_image,
    encode_png,
    is_image_name,
    read_header,
)

RGB = Image.fromarray(make_image(0, 6, 10))
RGBA = Image.fromarray(make_image(1, 6, 10, 4))
GRAY = RGB.convert('L')
PALETTE = RGB.quantize(16)
GRAY16 = Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000)


def expected(image, mode):
    pixels = np.asarray(image.convert(mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


SAMPLES = {
    'rgb': (encode(RGB), expected(RGB, 'RGB')),
    'rgba': (encode(RGBA), expected(RGBA, 'RGBA')),
    'gray': (encode(GRAY), expected(GRAY, 'L')),
    'gray and alpha': (encode(RGBA.convert('LA')), expected(RGBA, 'LA')),
    'palette': (encode(PALETTE), expected(PALETTE, 'RGB')),
    'palette with transparency': (encode(PALETTE, transparency=3), None),
    'gif': (encode(PALETTE, 'gif'), expected(PALETTE, 'RGB')),
    'bilevel': (encode(GRAY.point(lambda v: 255 * (v > 127)).convert('1')),
                expected(GRAY.point(lambda v: 255 * (v > 127)), 'L')),
    '16-bit gray': (encode(GRAY16), (np.asarray(GRAY16) >> 8).astype(np.uint8)[:, :, None]),
    '16-bit gray tiff': (encode(GRAY16, 'tiff'), (np.asarray(GRAY16) >> 8).astype(np.uint8)[:, :, None]),
    'cmyk tiff': (encode(RGB.convert('CMYK'), 'tiff'), expected(RGB.convert('CMYK'), 'RGB')),
    'bmp': (encode(RGB, 'bmp'), expected(RGB, 'RGB')),
    'colour key': (encode(RGB, transparency=(0, 0, 0)),
                   np.dstack([np.asarray(RGB), np.full([6, 10], 255, dtype=np.uint8)])),
    'with resolution': (encode(RGB, dpi=(72, 72)), expected(RGB, 'RGB')),
}


@pytest.mark.parametrize('name', SAMPLES)
def test_every_pixel_format_becomes_true_colours(name):
    data, pixels = SAMPLES[name]
    actual = decode_image(data)
    assert actual.dtype == np.uint8 and actual.ndim == 3
    assert read_header(data).shape == actual.shape
    if pixels is None:
        assert actual.shape == (6, 10, 4) and set(np.unique(actual[:, :, 3])) == {0, 255}
    else:
        np.testing.assert_array_equal(actual, pixels)


@pytest.mark.skipif(images.pyspng is None, reason='pyspng is not installed')
@pytest.mark.parametrize('name', SAMPLES)
def test_pyspng_changes_nothing(name, monkeypatch):
    data, _ = SAMPLES[name]
    fast = decode_image(data)
    monkeypatch.setattr(images, 'pyspng', None)
    np.testing.assert_array_equal(fast, decode_image(data))


@pytest.mark.skipif(images.pyspng is None, reason='pyspng is not installed')
def test_plain_png_goes_through_pyspng():
    assert images._decode_png_fast(images._Source(SAMPLES['rgb'][0], images.DEFAULT)) is not None
    assert images._decode_png_fast(images._Source(SAMPLES['palette'][0], images.DEFAULT)) is None


@pytest.mark.parametrize('image_format', ['jpeg', 'png', 'tiff'])
def test_exif_orientation_is_applied(image_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    data = encode(RGB, image_format, exif=exif)
    plain = encode(RGB, image_format)
    np.testing.assert_array_equal(decode_image(data), np.rot90(decode_image(plain), -1))
    assert read_header(data).shape == (10, 6, 3)


@pytest.mark.parametrize('keep', [0, 7, 30, 60, 0.5, 0.9])
@pytest.mark.parametrize('image_format', ['png', 'jpeg', 'bmp'])
def test_truncated_images_are_refused(image_format, keep):
    data = encode(Image.fromarray(make_image(3, 32, 32)), image_format)
    with pytest.raises(ImageError, match='cannot be decoded'):
        decode_image(data[:keep if isinstance(keep, int) else int(keep * len(data))])


def test_png_with_a_flipped_byte_is_refused():
    data = bytearray(encode(Image.fromarray(make_image(3, 32, 32))))
    data[len(data) // 2] ^= 0xff
    with pytest.raises(ImageError, match='cannot be decoded'):
        decode_image(bytes(data))


def test_text_is_no_image():
    with pytest.raises(ImageError, match='not an image'):
        decode_image(b'hello, this is text')


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(dtype):
    data = encode(Image.fromarray(np.ones([4, 4], dtype=dtype)), 'tiff')
    with pytest.raises(ImageError, match='no defined range'):
        decode_image(data)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_encoding_is_exact_and_uncompressed(channels):
    pixels = make_image(5, 16, 12, channels)
    data = encode_png(pixels)
    np.testing.assert_array_equal(decode_image(data), pixels)
    assert len(data) > pixels.size
    assert len(encode_png(np.zeros_like(pixels), compress_level=9)) < len(data)


def test_dropped_alpha_is_laid_over_white():
    pixels = np.zeros([2, 2, 4], dtype=np.uint8)
    pixels[0, 0, 3] = 255
    rgb = convert_mode(pixels, 'RGB')
    assert rgb[0, 0].tolist() == [0, 0, 0] and rgb[1, 1].tolist() == [255, 255, 255]


def test_gray_becomes_three_equal_channels():
    rgb = convert_mode(make_image(0, 4, 4, 1), 'RGB')
    assert (rgb == rgb[:, :, :1]).all()


@pytest.mark.parametrize(('name', 'is_image'), [
    ('a.png', True), ('d/e.JPG', True), ('a.webp', True), ('a.mpo', True), ('png', False), ('.png', False),
    ('a.txt', False), ('a.pdf', False), ('a.eps', False), ('d/._a.png', False), ('__MACOSX/a.png', False),
    ('.hidden/a.png', False), ('a.png.txt', False),
])
def test_images_are_recognised_by_suffix(name, is_image):
    assert is_image_name(name) == is_image
