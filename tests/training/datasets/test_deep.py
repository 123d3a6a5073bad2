# SPDX-License-Identifier: Apache-2.0
"""Images of more than 8 bits per channel: all bits are read, and the range that occurs fills 0 to 255."""
import struct
import zlib

import numpy as np
import pytest
from dataset_cases import encode, make_image, run_tool, write_folder
from PIL import Image

from training.dataset import ImageFolderDataset
from training.datasets.deep import Extent
from training.datasets.images import Reading, decode_image, measure

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8)  # 0 to 63


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png16(values, color_type, *extra):
    """A PNG of 16 bits per channel from [H, W, C]."""
    height, width = values.shape[:2]
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    header = struct.pack('>IIBBBBB', width, height, 16, color_type, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + b''.join(extra)
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def color(scale):
    return np.stack([RAMP * scale, RAMP[::-1] * scale, RAMP.T * scale], axis=2)


def converted(tmp_path, capsys, files, *args):
    """(output, pixels of all images) of a conversion."""
    source = write_folder(tmp_path / 'source', files)
    status, output = run_tool(capsys, source, tmp_path / 'out.zip', *args)
    assert status == 0, output
    dataset = ImageFolderDataset(str(tmp_path / 'out.zip'))
    return output, [dataset[i][0] for i in range(len(dataset))]


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_12_bits_fill_the_range_and_it_is_said(tmp_path, capsys, name):
    image = Image.fromarray((RAMP * 65).astype(np.uint16))  # 0 to 4095
    data = encode(image, 'png' if name == 'a.png' else 'tiff')
    output, (pixels,) = converted(tmp_path, capsys, {name: data})
    assert 'values 0 to 4095: 0 to 4095 becomes 0 to 255' in output
    np.testing.assert_array_equal(pixels[0], RAMP * 65 >> 4)


def test_12_bits_of_color_fill_the_range(tmp_path, capsys):
    output, (pixels,) = converted(tmp_path, capsys, {'a.png': png16(color(65), 2)})
    assert '0 to 4095 becomes' in output
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), color(65) >> 4)


def test_all_bits_of_a_color_tiff_are_read(tmp_path):
    tifffile_like = encode(Image.fromarray(make_image()), 'tiff')
    assert measure(tifffile_like) is None
    values = color(1000)
    header = struct.pack('<2sHI', b'II', 42, 8)
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, 1, 140), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, values.nbytes), (284, 3, 1, 1)]
    table = b''.join(struct.pack('<HHII', *entry) for entry in entries)
    data = header + struct.pack('<H', len(entries)) + table + bytes(4) + struct.pack('<3H', 16, 16, 16)
    data += values.astype('<u2').tobytes()
    assert measure(data) == Extent(0, 63000, is_integer=True)
    np.testing.assert_array_equal(decode_image(data, Reading((0, 65535))), values >> 8)


def test_one_range_serves_all_images(tmp_path, capsys):
    files = {f'{i}.png': encode(Image.fromarray((RAMP * i).astype(np.uint16))) for i in (1, 16)}
    output, pixels = converted(tmp_path, capsys, files)
    assert '2 images have more than 8 bits' in output and [p.max() for p in pixels] == [15, 252]


def test_full_range_keeps_the_upper_byte(tmp_path, capsys):
    values = (RAMP * 1040).astype(np.uint16)
    _, (pixels,) = converted(tmp_path, capsys, {'a.png': encode(Image.fromarray(values))})
    np.testing.assert_array_equal(pixels[0], values >> 8)


@pytest.mark.parametrize(('low', 'high', 'text'), [
    (0, 1, '0 to 1 becomes'), (-1, 1, '-1 to 1 becomes'), (-1000, 3000, '-1000 to 3000 becomes'),
    (0, 200, '0 to 255 becomes')])
def test_floats_have_a_range_chosen_and_said(tmp_path, capsys, low, high, text):
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    output, (pixels,) = converted(tmp_path, capsys, {'a.tif': encode(Image.fromarray(values), 'tiff')})
    assert text in output and pixels.min() == 0 and pixels.max() == (200 if high == 200 else 255)


def test_a_given_range_is_used(tmp_path, capsys):
    output, (pixels,) = converted(
        tmp_path, capsys, {'a.png': encode(Image.fromarray(RAMP))}, '--range=16,31')
    assert '16 to 31 becomes' in output
    np.testing.assert_array_equal(pixels[0], ((RAMP.astype(int) - 16) * 16).clip(0, 255))


def test_values_in_a_narrow_band_fill_the_range():
    assert Extent(30000, 34000, is_integer=True).automatic_range() == (30000, 34000)
    assert Extent(5, 5, is_integer=True).automatic_range() == (0, 255)
    assert Extent(0, 0.001, is_integer=False).automatic_range() == (0, 0.001)


@pytest.mark.parametrize('text', ['1', '5,1', 'a,b', 'nan,1', '0,inf', ''])
def test_odd_ranges_are_refused(tmp_path, capsys, text):
    source = write_folder(tmp_path / 'source', {'a.png': encode(make_image())})
    status, output = run_tool(capsys, source, tmp_path / 'out', f'--range={text}')
    assert status == 2 and '--range=' in output


def test_non_finite_values_are_refused(tmp_path, capsys):
    values = np.full([8, 8], np.nan, dtype=np.float32)
    source = write_folder(tmp_path / 'source', {'a.tif': encode(Image.fromarray(values), 'tiff')})
    status, output = run_tool(capsys, source, tmp_path / 'out')
    assert status == 2 and 'a.tif' in output and 'non-finite' in output


def test_check_reports_data_that_use_little_of_their_range(tmp_path, capsys):
    for scale, is_said in ((65, True), (1000, False)):
        data = encode(Image.fromarray((RAMP * scale).astype(np.uint16)))
        source = write_folder(tmp_path / f'{scale}', {'a.png': data})
        status, output = run_tool(capsys, source, None, '--check')
        assert status == 0 and ('less than a quarter' in output) == is_said, output


@pytest.mark.parametrize('color_type', [0, 2])
def test_a_transparent_color_of_16_bits_is_compared_exactly(color_type):
    values = color(257) if color_type == 2 else (RAMP * 257)[:, :, None]
    key = values[3, 4]
    near = values.copy()
    near[0, 0] = key + 1  # the same upper byte
    pixels = decode_image(png16(near, color_type, chunk(b'tRNS', key.astype('>u2').tobytes())))
    np.testing.assert_array_equal(pixels[:, :, -1] == 0, (near == key).all(axis=2))
    assert pixels.shape[2] == (2 if color_type == 0 else 4)
    assert pixels[3, 4, -1] == 0 and pixels[0, 0, -1] == 255
