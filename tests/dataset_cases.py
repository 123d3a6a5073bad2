# SPDX-License-Identifier: Apache-2.0
"""What the dataset tests share: small images, files of them, and which golden sources we read better."""
import functools
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from golden_cases import golden_dir
from PIL import Image

import dataset_tool
from dnnlib.cli import run_command

PUBLISHED_MODES = {'L', 'RGB', 'RGBA'}
EXIF_ORIENTATION = 0x0112


def make_image(seed=0, height=8, width=8, channels=3):
    """Random pixels uint8 [H, W, C]."""
    return np.random.RandomState(seed).randint(0, 256, [height, width, channels], dtype=np.uint8)


def encode(image, image_format='png', **kwargs):
    """The bytes of a Pillow image or of pixels [H, W, C]."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **kwargs)
    return buffer.getvalue()


def write_zip(path, files):
    """A zip of {name: bytes}; a value that is a dict becomes JSON."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in files.items():
            archive.writestr(name, json.dumps(data) if isinstance(data, dict) else data)
    return str(path)


def write_folder(path, files):
    """A folder of {relative name: bytes}; a value that is a dict becomes JSON."""
    for name, data in files.items():
        file = Path(path, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(json.dumps(data).encode() if isinstance(data, dict) else data)
    return str(path)


def run_tool(capsys, source, dest, *args):
    """Exit status and printed text (stdout and stderr) of dataset_tool; dest None leaves the option out."""
    paths = ['--source', source] + ([] if dest is None else ['--dest', dest])
    with pytest.raises(SystemExit) as caught:
        run_command(dataset_tool.convert_command, [str(arg) for arg in [*paths, *args]])
    output = capsys.readouterr()
    return caught.value.code or 0, output.out + output.err


def source_path(source):
    """Where the golden folder has a source."""
    return golden_dir() / 'dataset_sources' / source.rstrip('/')


@functools.cache
def is_read_better(source):
    """Whether a golden source holds what the published code reads as something else than its colours.

    Palettes, bilevel, 16-bit, CMYK and turned (EXIF) images: we give true colours, upright, where the
    published code gives indices, fails, or depends on the decoder that is installed. Such cases are compared
    loosely.
    """
    path = source_path(source)
    if path.is_dir():
        contents = [file.read_bytes() for file in path.rglob('*') if file.is_file() and file.suffix != '.mdb']
    elif path.suffix == '.zip':
        with zipfile.ZipFile(path) as archive:
            contents = [archive.read(name) for name in archive.namelist()]
    else:
        return False
    return any(_is_unusual(data) for data in contents)


def _is_unusual(data):
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode not in PUBLISHED_MODES or image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except (OSError, SyntaxError):
        return False
