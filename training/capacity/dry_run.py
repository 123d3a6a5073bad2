# SPDX-License-Identifier: Apache-2.0
"""What there is to know of a training before it starts: its data, its options, and what it will need."""
import contextlib
import json

import torch

from dnnlib.util import UserError
from training.capacity.estimate import describe, slow_precision
from training.capacity.label_report import describe_labels, ignored_labels_notice
from training.config import DatasetInfo, TrainConfig
from training.dataset import ImageFolderDataset, find_dataset
from training.datasets.labels import LabelError
from training.systems.table import make_networks


def open_dataset(name_or_path: str, cond: bool) -> tuple[DatasetInfo, str | None]:
    """What a run must know of a dataset (first picture, names, labels), and words on its labels.

    cond: whether the labels will be used. Raises UserError if the dataset cannot be.
    """
    path, labels = find_dataset(name_or_path), (False, 0)
    try:
        dataset = ImageFolderDataset(path=path, use_labels=True)
        # Labels that nobody asks for need not be right.
        with contextlib.nullcontext() if cond else contextlib.suppress(LabelError):
            labels = dataset.has_labels, dataset.label_dim
    except (UserError, OSError) as error:
        raise UserError(f'--data: {error}') from error
    text = '\n'.join(describe_labels(dataset)) if cond else ignored_labels_notice(dataset)
    info = DatasetInfo(path, len(dataset), dataset.height, dataset.width, dataset.num_channels, *labels)
    return info, text


def summarise_options(config: TrainConfig) -> str:
    """The options as JSON, then a summary that one can take in."""
    height, width = config.data.size
    summary = {
        'Output directory': config.run_dir,
        'Training data': config.data.path,
        'Training duration': f'{config.total_kimg} kimg',
        'Number of GPUs': config.num_gpus,
        'Number of images': config.data.max_size,
        'Image resolution': height if height == width else f'{width}x{height}',
        'Conditional model': config.data.use_labels,
        'Dataset x-flips': config.data.xflip,
    }
    lines = [f'{name + ":":<20}{value}' for name, value in summary.items()]
    return '\n'.join(['', 'Training options:', json.dumps(config.to_options(), indent=2), '', *lines])


def summarise_needs(config: TrainConfig, dataset: DatasetInfo) -> str:
    """How many numbers each network learns, and the memory and time that training will take on this machine.

    Takes some seconds; nothing large is allocated.
    """
    label_dim = dataset.label_dim if config.data.use_labels else 0
    # Tensors on the meta device have shapes and no memory.
    with torch.device('meta'):
        networks = make_networks(config, label_dim, dataset.channels)
    counts = [f'{name + ":":<20}{sum(p.numel() for p in network.parameters()):,} parameters'
              for name, network in zip(('Generator', 'Discriminator'), networks, strict=True)]
    return '\n'.join([*counts, *describe(config, label_dim, dataset.channels)])


def notes(config: TrainConfig) -> list[str]:
    """Sentences on what this machine does not do well."""
    note = slow_precision(config)
    return [] if note is None else [note]
