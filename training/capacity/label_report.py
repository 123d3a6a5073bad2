# SPDX-License-Identifier: Apache-2.0
"""What the labels of a dataset are, in words, so that a wrong table is noticed before training."""
import textwrap

import numpy as np

from dnnlib.util import UserError
from training.dataset import Dataset

MAX_CLASSES_SHOWN = 12
MAX_IMBALANCE = 10.0  # times as many pictures in the largest class as in the smallest, without a word
NOTICE_WIDTH = 78


def describe_labels(dataset: Dataset) -> list[str]:
    """Lines on the layout of the labels of a dataset that was opened with use_labels=True.

    Kind (class numbers, one-hot, multi-hot or floats), length, pictures of each class, a hint where they
    differ much. Labels that cannot be used, as where pictures have none, are one line that says why.
    """
    try:
        labels = raw_labels(dataset)
    except UserError as error:
        return [f'Labels: cannot be used: {error}']
    if not dataset.has_labels:
        return ['Labels: none']
    kind = label_kind(labels)
    if kind == 'floats':
        low, high = labels.min(), labels.max()
        return [f'Labels: vectors of {labels.shape[1]} numbers, {low:.4g} to {high:.4g}, used as they are']
    # The dataset knows classes that this subset of the pictures lacks.
    num_classes = dataset.label_dim
    if kind == 'class numbers':
        counts = np.bincount(labels, minlength=num_classes)
    else:
        counts = labels.sum(axis=0).astype(np.int64)
    first = f'Labels: {num_classes} classes, given as {kind}'
    return [first, *_count_lines(counts), *_empty_line(labels, kind)]


def raw_labels(dataset: Dataset) -> np.ndarray:
    """Labels as they are in the file, mirror images not counted: int64 [N], or float32 [N, length]."""
    details = [dataset.get_details(i) for i in range(len(dataset))]
    return np.stack([item.raw_label for item in details if not item.xflip])


def label_kind(labels: np.ndarray) -> str:
    """'class numbers', 'one-hot', 'multi-hot' (any number of ones) or 'floats'."""
    if labels.dtype == np.int64:
        return 'class numbers'
    if not np.isin(labels, (0, 1)).all():
        return 'floats'
    return 'one-hot' if (labels.sum(axis=1) == 1).all() else 'multi-hot'


def ignored_labels_notice(dataset: Dataset) -> str | None:
    """A frame of several lines for runs without --cond; None where there are no labels to use.

    The dataset must have been opened with use_labels=True.
    """
    lines = describe_labels(dataset)
    if lines == ['Labels: none']:
        return None
    text = ['THE LABELS OF THIS DATASET ARE NOT USED', '', *lines, '',
            'This run learns all pictures as one kind. For a generator that can be asked for a class, stop '
            'it and add --cond=1.']
    rows = [row for line in text for row in textwrap.wrap(line, NOTICE_WIDTH) or ['']]
    rule = '*' * (NOTICE_WIDTH + 4)
    return '\n'.join([rule, *(f'* {row.ljust(NOTICE_WIDTH)} *' for row in rows), rule])


def _count_lines(counts: np.ndarray) -> list[str]:
    shown = [f'{i}: {count}' for i, count in enumerate(counts[:MAX_CLASSES_SHOWN])]
    if len(counts) > MAX_CLASSES_SHOWN:
        shown.append(f'and {len(counts) - MAX_CLASSES_SHOWN} more')
    lines = [f'Pictures of each class: {", ".join(shown)}']
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        lines.append(f'{len(missing)} classes have no picture, the first is {missing[0]}; the network learns '
                     'nothing of them')
    present = counts[counts > 0]
    if len(present) > 1 and present.max() > MAX_IMBALANCE * present.min():
        lines.append(f'The largest class has {present.max() / present.min():.0f} times as many pictures as '
                     'the smallest: rare classes will look alike; repeat or add pictures of them')
    return lines


def _empty_line(labels: np.ndarray, kind: str) -> list[str]:
    if kind != 'multi-hot':
        return []
    empty = int((labels.sum(axis=1) == 0).sum())
    return [f'{empty} pictures belong to no class (all zeros), which is allowed'] if empty else []
