# SPDX-License-Identifier: Apache-2.0
"""Summary of a run before it starts: dataset, options, memory and time."""
import contextlib
import json
import os
import textwrap

import numpy as np
import torch

from dnnlib.util import UserError, printable
from metrics.detectors import FILES, is_local
from metrics.metric_main import detector_of
from training.capacity.estimate import describe, local_device, slow_precision, slow_training
from training.config import DatasetInfo, TrainConfig
from training.config.presets import PRESETS
from training.config.systems import SYSTEM_FORMS
from training.dataset import Dataset, ImageFolderDataset, find_dataset
from training.datasets.labels import LabelError
from training.systems.table import SYSTEMS


def open_dataset(
    name_or_path: str, cond: bool, preset: str | None = None, *, strict: bool = False,
) -> tuple[DatasetInfo, str | None]:
    """Properties of a dataset, and a text about its labels and what is not used of it, or None.

    cond: whether the labels will be used.  preset: of --cfg, if given.  strict: refuse a dataset of which
    something is not used. Raises UserError if the dataset is not usable.
    """
    path, labels = find_dataset(name_or_path), (False, 0, None)
    try:
        dataset = ImageFolderDataset(path=path, use_labels=True)
        # Errors in unused labels are ignored.
        with contextlib.nullcontext() if cond else contextlib.suppress(LabelError, OverflowError):
            names = dataset.class_names
            labels = dataset.has_labels, dataset.label_dim, None if names is None else tuple(names)
        ledger = dataset.ledger(cond=cond)
        ledger.check(strict=strict)
    except (UserError, OSError, OverflowError) as error:
        raise UserError(f'--data: {error}') from error
    text = '\n'.join(describe_labels(dataset)) if cond else ignored_labels_notice(dataset, preset)
    if ledger.groups:
        text = '\n'.join([*ledger.lines(), *([text] if text else [])])
    info = DatasetInfo(path, len(dataset), dataset.height, dataset.width, dataset.num_channels, *labels)
    return info, text


def summarise(config: TrainConfig, dataset: DatasetInfo, label_text: str | None, *, is_full: bool) -> str:
    """What is trained on which data, as lines.  label_text: from open_dataset().

    is_full: with the options as JSON and, before a dry run ends, an estimate of memory and time on this
    machine, which takes a few seconds.
    """
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
    lines = [f'{name + ":":<20}{printable(value)}' for name, value in summary.items()]
    if is_full:
        lines = ['', 'Training options:', json.dumps(config.to_options(), indent=2), '', *lines,
                 summarise_needs(config, dataset)]
    return '\n'.join([*lines, *([] if label_text is None else ['', label_text, ''])])


def summarise_needs(config: TrainConfig, dataset: DatasetInfo) -> str:
    """Parameters of each network, and an estimate of memory and time on this machine.

    Takes a few seconds and little memory.
    """
    label_dim = dataset.label_dim if config.data.use_labels else 0
    # Tensors on the meta device allocate no memory.
    with torch.device('meta'):
        networks = SYSTEMS[config.system].networks(config, label_dim, dataset.channels)
    counts = [f'{name + ":":<20}{sum(p.numel() for p in network.parameters()):,} parameters'
              for name, network in zip(('Generator', 'Discriminator'), networks, strict=True)]
    return '\n'.join([*counts, *describe(config, label_dim, dataset.channels)])


def notes(config: TrainConfig, dataset: DatasetInfo, *, is_estimated: bool) -> list[str]:
    """Notes on what makes the training slow on this machine. Takes seconds for long runs on a CPU.

    is_estimated: the time has been estimated already, or is known from the run that is resumed.
    """
    device = local_device(config)
    found = [slow_precision(config), *_missing_detectors(config)]
    if device is not None and device.type == 'cpu':
        found.append(_busy_cores())
        if not is_estimated and config.total_kimg >= LONG_KIMG:
            label_dim = dataset.label_dim if config.data.use_labels else 0
            found.append(slow_training(config, label_dim, dataset.channels))
    return [note for note in found if note is not None]


def _missing_detectors(config: TrainConfig) -> list[str]:
    """One note on the feature networks of --metrics that are not on this machine, if any."""
    missing = [name for name in FILES if not is_local(name, config.detector_dir)]
    waiting = [metric for metric in config.metrics if detector_of(metric) in missing]
    if not waiting:
        return []
    names = ' and '.join(name for name in missing if name in map(detector_of, waiting))
    return [f'{", ".join(waiting)}: {names} not found on this machine; will be downloaded, or these '
            'metrics are skipped (--metrics=swd needs no download).']


def _busy_cores() -> str | None:
    """A note if other programs use this machine's cores; None where the system does not tell."""
    cores = os.cpu_count() or 1
    with contextlib.suppress(AttributeError, OSError):
        load = os.getloadavg()[0]
        if load > BUSY_SHARE * cores:
            return (f'Other programs use the {cores} cores (load {load:.1f}), so training is slower; '
                    '--threads=N uses fewer of them.')
    return None


LONG_KIMG = 1000  # runs on a CPU that are estimated before they start; --cfg=demo has 32
BUSY_SHARE = 0.5  # of the cores, by the load average of the last minute
MAX_CLASSES_SHOWN = 12
MAX_IMBALANCE = 10.0  # ratio of the sizes of the largest and the smallest class, without a warning
NOTICE_WIDTH = 78


def describe_labels(dataset: Dataset) -> list[str]:
    """Description of the labels of a dataset that was opened with use_labels=True, as lines.

    Kind (class numbers, one-hot, multi-hot or floats), length, images per class, and a warning if classes are
    imbalanced. For unusable labels, one line with the reason.
    """
    try:
        labels = raw_labels(dataset)
    except (UserError, OverflowError) as error:
        return [f'Labels: cannot be used: {error}']
    if not dataset.has_labels:
        return ['Labels: none']
    kind = label_kind(labels)
    if kind == 'floats':
        low, high = labels.min(), labels.max()
        return [f'Labels: vectors of {labels.shape[1]} numbers, {low:.4g} to {high:.4g}, used as is']
    # The dataset may have classes that are missing in this subset.
    num_classes = dataset.label_dim
    if kind == 'class numbers':
        counts = np.bincount(labels, minlength=num_classes)
    else:
        counts = labels.sum(axis=0).astype(np.int64)
    first = f'Labels: {num_classes} classes, given as {kind}'
    return [first, *_count_lines(counts), *_empty_line(labels, kind)]


def raw_labels(dataset: Dataset) -> np.ndarray:
    """Labels as in dataset.json, without mirror images: int64 [N], or float32 [N, length]."""
    details = [dataset.get_details(i) for i in range(len(dataset))]
    return np.stack([item.raw_label for item in details if not item.xflip])


def label_kind(labels: np.ndarray) -> str:
    """'class numbers', 'one-hot', 'multi-hot' (any number of ones) or 'floats'."""
    if labels.dtype == np.int64:
        return 'class numbers'
    if not np.isin(labels, (0, 1)).all():
        return 'floats'
    return 'one-hot' if (labels.sum(axis=1) == 1).all() else 'multi-hot'


def ignored_labels_notice(dataset: Dataset, preset: str | None = None) -> str | None:
    """A framed notice for runs without --cond; None if the dataset has no labels.

    The dataset must have been opened with use_labels=True.
    """
    lines = describe_labels(dataset)
    if lines == ['Labels: none']:
        return None
    is_refused = preset in PRESETS and 'cond' in SYSTEM_FORMS[PRESETS[preset].system].unused
    remedy = f'choose another --cfg than {preset}, with --cond=1' if is_refused else 'add --cond=1'
    text = ['THE LABELS OF THIS DATASET ARE NOT USED', '', *lines, '',
            f'This run trains an unconditional model. For a conditional one, stop it and {remedy}.']
    rows = [row for line in text for row in textwrap.wrap(line, NOTICE_WIDTH) or ['']]
    rule = '*' * (NOTICE_WIDTH + 4)
    return '\n'.join([rule, *(f'* {row.ljust(NOTICE_WIDTH)} *' for row in rows), rule])


def _count_lines(counts: np.ndarray) -> list[str]:
    shown = [f'{i}: {count}' for i, count in enumerate(counts[:MAX_CLASSES_SHOWN])]
    if len(counts) > MAX_CLASSES_SHOWN:
        shown.append(f'and {len(counts) - MAX_CLASSES_SHOWN} more')
    lines = [f'Images per class: {", ".join(shown)}']
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        lines.append(f'{len(missing)} classes have no images, the first is {missing[0]}; the model cannot '
                     'learn them')
    present = counts[counts > 0]
    if len(present) > 1 and present.max() > MAX_IMBALANCE * present.min():
        lines.append(f'The largest class has {present.max() / present.min():.0f} times as many images as '
                     'the smallest: rare classes will lack diversity; repeat or add images of them')
    return lines


def _empty_line(labels: np.ndarray, kind: str) -> list[str]:
    if kind != 'multi-hot':
        return []
    empty = int((labels.sum(axis=1) == 0).sum())
    return [f'{empty} images belong to no class (all zeros), which is allowed'] if empty else []
