# SPDX-License-Identifier: Apache-2.0
"""What files hold beside pixels: transparency, color profiles, large texts, frames, names of HEIC."""
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from dataset_cases import encode, make_image, run_tool, write_folder
from PIL import Image, ImageCms, PngImagePlugin

from training.dataset import ImageFolderDataset
from training.datasets import images
from training.datasets.images import (
    Reading,
    count_frames,
    decode_image,
    iterate_frames,
    read_header,
    read_image,
)

RGB = Image.fromarray(make_image(0, 8, 8))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
FRAMES = [Image.new('RGB', (8, 8), name) for name in ('red', 'green', 'blue', 'white', 'black')]


def swapped(profile, first=b'rXYZ', second=b'gXYZ'):
    """The profile with two primaries exchanged: red means green."""
    data = bytearray(profile)
    tags = {}
    for i in range(struct.unpack_from('>I', data, 128)[0]):
        name, offset, size = struct.unpack_from('>4sII', data, 132 + 12 * i)
        tags[name] = slice(offset, offset + size)
    data[tags[first]], data[tags[second]] = data[tags[second]], data[tags[first]]
    return bytes(data)


def small_gray(bits, key):
    """An 8x8 gray PNG of few bits whose rows are 0, 1, 2, ..., and a transparent value."""
    top = 2 ** bits
    values = np.arange(8) % top
    packed = np.packbits((values[:, None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8).reshape(-1))
    parts = [(b'IHDR', struct.pack('>IIBBBBB', 8, 8, bits, 0, 0, 0, 0)), (b'tRNS', struct.pack('>H', key)),
             (b'IDAT', zlib.compress((b'\0' + packed.tobytes()) * 8)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(c)) + k + c + struct.pack('>I', zlib.crc32(k + c)) for k, c in parts)


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_a_transparent_gray_of_any_depth_is_alpha(bits):
    pixels = decode_image(small_gray(bits, 1))
    assert pixels.shape == (8, 8, 2) and read_header(small_gray(bits, 1)).shape == (8, 8, 2)
    np.testing.assert_array_equal(pixels[0, :, 1] == 0, np.arange(8) % 2 ** bits == 1)


def test_a_transparent_color_becomes_white(tmp_path, capsys):
    image = Image.new('RGB', (8, 8), (255, 0, 255))
    image.paste((20, 200, 20), (2, 2, 6, 6))
    source = write_folder(tmp_path / 's', {'a.png': encode(image, transparency=(255, 0, 255))})
    assert run_tool(capsys, source, tmp_path / 'o', '--mode=RGB')[0] == 0
    pixels = ImageFolderDataset(str(tmp_path / 'o'))[0][0]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255] and pixels[:, 3, 3].tolist() == [20, 200, 20]
    status, output = run_tool(capsys, source, tmp_path / 'other')
    assert status == 2 and 'RGBA' in output and '--mode=RGB' in output


@pytest.mark.parametrize('image_format', ['png', 'jpeg', 'tiff', 'webp'])
def test_other_profiles_are_converted_to_srgb(image_format):
    kwargs = {'lossless': True} if image_format == 'webp' else {}
    data = encode(Image.new('RGB', (8, 8), (200, 30, 30)), image_format, icc_profile=swapped(SRGB), **kwargs)
    decoded = read_image(data)
    red, green, blue = decoded.pixels[4, 4].astype(int)
    assert green > 150 and red < 80 and blue < 80 and 'sRGB' in decoded.remark


def test_srgb_keeps_every_bit():
    for image in (RGB, RGB.convert('RGBA')):
        decoded = read_image(encode(image, icc_profile=SRGB))
        np.testing.assert_array_equal(decoded.pixels, np.asarray(image))
        assert decoded.remark is None


def test_alpha_survives_a_profile():
    pixels = make_image(0, 8, 8, 4)
    converted = decode_image(encode(pixels, icc_profile=swapped(SRGB)))
    np.testing.assert_array_equal(converted[:, :, 3], pixels[:, :, 3])
    assert (converted[:, :, :3] != pixels[:, :, :3]).any()


def test_a_profile_that_cannot_be_used_is_said(tmp_path, capsys):
    source = write_folder(tmp_path / 's', {'a.png': encode(RGB, icc_profile=b'rubbish' * 30)})
    status, output = run_tool(capsys, source, tmp_path / 'o')
    assert status == 0 and 'Not used: 1 color profiles (first: a.png)' in output
    pixels = ImageFolderDataset(str(tmp_path / 'o'))[0][0]
    np.testing.assert_array_equal(pixels, make_image().transpose(2, 0, 1))


def test_large_texts_and_profiles_are_no_obstacle():
    info = PngImagePlugin.PngInfo()
    info.add_text('workflow', 'x' * 2_000_000, zip=True)
    np.testing.assert_array_equal(decode_image(encode(RGB.quantize(16), pnginfo=info)),
                                  np.asarray(RGB.quantize(16).convert('RGB')))
    data = encode(RGB, icc_profile=swapped(SRGB) + bytes(2_000_000))
    assert read_header(data).shape == (8, 8, 3)
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(RGB, icc_profile=swapped(SRGB))))


def animation(image_format):
    kwargs = {'webp': {'lossless': True}, 'gif': {'duration': 100}}.get(image_format, {})
    return encode(FRAMES[0], image_format, save_all=True, append_images=FRAMES[1:], **kwargs)


@pytest.mark.parametrize('image_format', ['gif', 'webp', 'png', 'tiff'])
def test_all_frames_are_counted_and_read(image_format):
    data = animation(image_format)
    assert count_frames(data) == 5 and read_image(data).num_frames == 5
    frames = [frame[0, 0, :3].tolist() for frame in iterate_frames(data)]
    assert frames == [[255, 0, 0], [0, 128, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]


def test_frames_that_are_not_used_are_said(tmp_path, capsys):
    files = {'a.gif': animation('gif'), 'b.webp': animation('webp'), 'c.png': encode(RGB)}
    source = write_folder(tmp_path / 's', files)
    status, output = run_tool(capsys, source, tmp_path / 'first.zip')
    assert status == 0 and 'Not used: 8 further frames of 2 animations or stacks' in output
    assert '--frames=all' in output and len(ImageFolderDataset(str(tmp_path / 'first.zip'))) == 3
    status, output = run_tool(capsys, source, tmp_path / 'all.zip', '--frames=all')
    assert status == 0 and 'Not used' not in output
    assert len(ImageFolderDataset(str(tmp_path / 'all.zip'))) == 11


def test_a_stack_of_12_bits_has_one_range(tmp_path, capsys):
    pages = [Image.fromarray(np.full([8, 8], value, dtype=np.uint16)) for value in (100, 4095)]
    stack = encode(pages[0], 'tiff', save_all=True, append_images=pages[1:])
    source = write_folder(tmp_path / 's', {'a.tif': stack})
    status, output = run_tool(capsys, source, tmp_path / 'o', '--frames=all')
    assert status == 0 and 'values 100 to 4095: 0 to 4095 becomes' in output
    dataset = ImageFolderDataset(str(tmp_path / 'o'))
    assert [int(dataset[i][0].max()) for i in range(2)] == [6, 255]


def test_a_limit_on_pixels_can_be_raised(tmp_path, capsys):
    source = write_folder(tmp_path / 's', {'a.png': encode(Image.new('1', (1200, 1000), 1))})
    size = ['--mode=L', '--width=8', '--height=8', '--max-megapixels']
    status, output = run_tool(capsys, source, tmp_path / 'o', *size, 1)
    assert status == 2 and 'a.png has 1200x1000 pixels' in output and '--max-megapixels=2' in output
    assert run_tool(capsys, source, tmp_path / 'o', *size, 2)[0] == 0


def test_a_program_is_never_run_for_an_image():
    with pytest.raises(images.ImageError, match='not an image format'):
        decode_image(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n')


@pytest.mark.skipif(images.pillow_heif is None, reason='pillow-heif is not installed')
def test_heic_is_read():
    buffer = io.BytesIO()
    images.pillow_heif.from_pillow(Image.new('RGB', (64, 64), (200, 30, 30))).save(buffer)
    assert np.abs(decode_image(buffer.getvalue())[32, 32].astype(int) - [200, 30, 30]).max() < 12
    assert images.is_image_name('a.HEIC') and 'pillow_heif' in sys.modules


def test_deep_images_are_scaled_each_for_itself_on_request():
    image = Image.fromarray((np.arange(64).reshape(8, 8) * 65).astype(np.uint16))
    assert decode_image(encode(image), Reading('auto')).max() == 255
    assert decode_image(encode(image)).max() == 15
