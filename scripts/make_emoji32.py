# SPDX-License-Identifier: Apache-2.0
"""Make the bundled dataset: python -m scripts.make_emoji32 emoji64.zip [training/datasets/emoji32.zip]

Halves images of 64x64 by averaging 2x2 pixels and stores them as compressed PNG, so that 1,906 take 3 MB. The
classes get names.
"""
import json
import sys

from dnnlib.util import UserError
from training.dataset import DATA_FOLDER, ImageFolderDataset
from training.datasets.files import LABEL_FILE
from training.datasets.images import encode_png
from training.datasets.sources import FileSource
from training.datasets.transforms import TransformSettings
from training.datasets.writer import dataset_writer

SIDE = 32
CLASS_NAMES = ('activities', 'animals', 'flags', 'food', 'objects', 'people', 'smileys', 'symbols', 'travel')


def shrink_dataset(source: str, dest: str) -> int:
    """Write the images of a labelled RGB dataset at SIDE x SIDE to the zip `dest`; returns their number.

    Keeps the names and labels. The bytes depend on the images and the installed zlib only.
    """
    images = FileSource(source)
    settings = TransformSettings(width=SIDE, height=SIDE, resize_filter='box', mode='RGB')
    with dataset_writer(dest) as write:
        for image in images:
            write(image.name, encode_png(settings.apply(image.decode().pixels), compress_level=9))
        labels = json.loads(images.files.read(LABEL_FILE))
        write(LABEL_FILE, json.dumps({**labels, 'class_names': CLASS_NAMES}).encode())
    return len(images)


def main(args: list[str]) -> int:
    """Command line; returns the exit status."""
    if not 1 <= len(args) <= 2 or args[0].startswith('-'):
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    dest = args[1] if len(args) == 2 else str(DATA_FOLDER / 'emoji32.zip')
    try:
        count = shrink_dataset(args[0], dest)
        dataset = ImageFolderDataset(dest, resolution=SIDE, use_labels=True)
    except UserError as error:
        print(f'Error: {error}', file=sys.stderr)
        return 2
    print(f'{dest}: {count} images of {dataset.image_shape}, {dataset.label_dim} classes')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
