# SPDX-License-Identifier: Apache-2.0
"""Writes network output as PNG files: one image per file, or a contact sheet."""
import io
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin

from dnnlib.util import UserError, replace_file

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # channels -> Pillow's name: gray, gray with alpha, ...
MAX_SHEET_PX = 16384  # side of a sheet; larger ones are downscaled
CAPTION_PX = 14  # height of a caption in Pillow's built-in font
MAX_CAPTION = 40  # characters
CAPTION_COLOR = {1: 255, 2: (128, 255), 3: (255, 255, 255), 4: (128, 128, 128, 255)}  # by channels


def check_channels(channels: int) -> None:
    """Raise UserError unless images of this many channels can be PNG files."""
    if channels not in MODES:
        raise UserError(f'--network: generates images of {channels} channels; a PNG file has 1 (gray), 2 '
                        '(gray and alpha), 3 (RGB) or 4 (RGBA); use the network in Python for raw values')


def quantize(img: Any) -> Any:
    """Tensor in [-1, 1] -> uint8 tensor of the same shape: round((x + 1) * 127.5), clamped to 0..255."""
    # Add 128 and truncate, as the published tools do: images are identical.
    return (img * 127.5 + 128).nan_to_num(0).clamp(0, 255).byte()


def to_uint8(img: Any) -> np.ndarray:
    """quantize() as an array on the CPU."""
    return quantize(img).to('cpu').numpy()


def save_png(path: str | os.PathLike, pixels: np.ndarray, info: Mapping[str, str] | None = None) -> None:
    """Write uint8 [C, H, W] as gray, gray with alpha, RGB or RGBA, atomically.

    info: texts by keyword, stored beside the pixels (`image.info` of Pillow). Raises UserError if the file
    cannot be written or C is not 1, 2, 3 or 4.
    """
    image = _to_image(pixels)
    with replace_file(path) as temporary:
        image.save(temporary, format='PNG', pnginfo=_texts(info))


def png_bytes(pixels: np.ndarray, info: Mapping[str, str] | None = None) -> bytes:
    """The PNG file of save_png as bytes."""
    with io.BytesIO() as file:
        _to_image(pixels).save(file, format='PNG', pnginfo=_texts(info))
        return file.getvalue()


def _texts(info: Mapping[str, str] | None) -> PIL.PngImagePlugin.PngInfo:
    texts = PIL.PngImagePlugin.PngInfo()
    for keyword, text in (info or {}).items():
        # Lone surrogates, as in file names that are no UTF-8, have no bytes.
        texts.add_text(keyword, text.encode('utf-8', 'replace').decode())
    return texts


class ContactSheet:
    """A black (or transparent) sheet of images, which are downscaled if the sheet would be huge.

    shape: (C, H, W) of each image.  captions: of the images, if any; small images are enlarged to the width
    of the longest.
    """

    def __init__(
        self, columns: int, rows: int, shape: tuple[int, int, int], captions: Iterable[str] = (),
    ):
        channels, height, width = shape
        check_channels(channels)
        font = PIL.ImageFont.load_default()
        longest_px = max((math.ceil(font.getlength(_printable(text))) for text in captions), default=0)
        self._caption_px = CAPTION_PX if longest_px else 0
        self._enlarged = max(-(-longest_px // width), 1)
        height, width = height * self._enlarged + self._caption_px, width * self._enlarged
        longest = max(columns * width, rows * height)
        self._factor = min(-(-longest // MAX_SHEET_PX), height, width)
        self._cell = (-(-width // self._factor), -(-height // self._factor))
        size = (columns * self._cell[0], rows * self._cell[1])
        self._image = PIL.Image.new(MODES[channels], size)

    def put(self, column: int, row: int, pixels: np.ndarray, caption: str = '') -> None:
        """Put uint8 [C, H, W] at a place counted from the top left."""
        cell = _to_image(pixels)
        if self._caption_px:
            cell = self._captioned(cell, len(pixels), caption)
        if self._factor > 1:
            cell = cell.reduce(self._factor)
        self._image.paste(cell, (column * self._cell[0], row * self._cell[1]))

    def _captioned(self, image: PIL.Image.Image, channels: int, caption: str) -> PIL.Image.Image:
        width, height = (side * self._enlarged for side in image.size)
        cell = PIL.Image.new(image.mode, (width, height + self._caption_px))
        cell.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST))
        draw = PIL.ImageDraw.Draw(cell)
        draw.text((0, height), _printable(caption), CAPTION_COLOR[channels], PIL.ImageFont.load_default())
        return cell

    def save(self, path: str | os.PathLike, info: Mapping[str, str] | None = None) -> None:
        """Write a PNG with texts. Raises UserError if the file cannot be written."""
        with replace_file(path) as temporary:
            self._image.save(temporary, format='PNG', pnginfo=_texts(info))


def _printable(caption: str) -> str:
    """A caption in the letters of the built-in font, shortened."""
    short = caption if len(caption) <= MAX_CAPTION else caption[:MAX_CAPTION - 3] + '...'
    return short.encode('ascii', 'replace').decode()


def _to_image(pixels: np.ndarray) -> PIL.Image.Image:
    check_channels(len(pixels))
    array = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
