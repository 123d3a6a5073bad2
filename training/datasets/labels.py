# SPDX-License-Identifier: Apache-2.0
"""Labels of images from `dataset.json`, CSV files and folders, as checked arrays."""
import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from dnnlib.util import UserError

Label: TypeAlias = int | list[float]
LabelTable: TypeAlias = dict[str, Label]
MAX_CLASSES = 1_000_000  # a class becomes a one-hot vector of this length


class LabelError(UserError):
    """Labels that can be read but not used for training; harmless without --cond."""


def normalise_name(name: str) -> str:
    """A relative file name with forward slashes, so that tables from any system match."""
    return name.replace('\\', '/').removeprefix('./')


def parse_label_json(data: bytes, origin: str) -> LabelTable | None:
    """The table in the bytes of a `dataset.json`: {"labels": [[name, class or vector], ...] or null}.

    None where "labels" is null. Raises UserError, whose message starts with `origin`, for malformed text.
    """
    try:
        # utf-8-sig: editors on Windows put a byte order mark first.
        content = json.loads(data.decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{origin}: not valid JSON ({error})') from error
    if not isinstance(content, dict) or 'labels' not in content:
        raise UserError(f'{origin}: no key "labels"; write {{"labels": [["a.png", 0], ...]}}, or '
                        'null for none')
    entries = content['labels']
    if entries is None:
        return None
    # Not in the published format, but a common mistake.
    if isinstance(entries, dict):
        entries = list(entries.items())
    if not isinstance(entries, list):
        raise UserError(f'{origin}: "labels" must be a list of [name, label] pairs or null')
    return {normalise_name(name): label for name, label in (_checked_pair(pair, origin) for pair in entries)}


def _checked_pair(pair: object, origin: str) -> tuple[str, Label]:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise UserError(f'{origin}: {str(pair)[:80]} is not a [name, label] pair')
    return pair[0], pair[1]


def label_array(names: Sequence[str], table: LabelTable, origin: str) -> np.ndarray:
    """The labels of the images `names`, in their order, as one checked array.

    Classes: int64 [N]. Vectors: float32 [N, length]. Entries for other names are ignored.
    Raises LabelError, naming the image, if one has no label, a label is neither a class >= 0 nor a vector
    of finite numbers, or it differs in kind or length from the first.
    """
    missing = [name for name in names if name not in table]
    if missing:
        raise LabelError(f'{origin}: {len(missing)} of {len(names)} images have no label, the first is '
                        f'{missing[0]}; add them, or train without --cond')
    labels = [_checked_label(table[name], f'{origin}: the label of {name}') for name in names]
    for name, label in zip(names, labels, strict=True):
        if _layout(label) != _layout(labels[0]):
            raise LabelError(f'{origin}: the label of {name} is {_layout(label)}, but that of {names[0]} is '
                            f'{_layout(labels[0])}; all must be alike')
    if labels and isinstance(labels[0], int):
        return np.array(labels, dtype=np.int64)
    # Empty vectors need the explicit 0: -1 cannot be inferred from no values.
    return np.array(labels, dtype=np.float32).reshape(len(labels), -1 if labels and labels[0] else 0)


def _checked_label(label: object, what: str) -> Label:
    if _is_number(label):
        # The published code silently truncates 0.5 to class 0.
        if label != int(label) or label < 0:
            raise LabelError(f'{what} is {label}; a class is 0, 1, 2, ..., and a number goes in a list: '
                            f'[{label}]')
        if label >= MAX_CLASSES:
            raise LabelError(f'{what} is {label}; classes are counted from 0 without gaps, and at most '
                            f'{MAX_CLASSES}')
        return int(label)
    if not isinstance(label, list) or not all(_is_number(value) for value in label):
        raise LabelError(f'{what} is {json.dumps(label)[:60]}; give a class such as 3 or a vector such as '
                        '[0.5, 1]')
    return label


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layout(label: Label) -> str:
    return 'a class number' if isinstance(label, int) else f'a vector of {len(label)}'


def labels_from_folders(names: Iterable[str], origin: str) -> tuple[LabelTable, list[str]]:
    """Classes by first folder: (name -> class, folder of each class in sorted order).

    Raises UserError for an image that is not in a folder.
    """
    names = list(names)
    loose = [name for name in names if '/' not in name]
    if loose:
        raise UserError(f'{origin}: {loose[0]} is in no class folder, which --labels=folders requires; '
                        f'{len(loose)} such images')
    # Sorted, so that the numbers do not depend on the file system.
    classes = sorted({name.split('/')[0] for name in names})
    index = {folder: i for i, folder in enumerate(classes)}
    return {name: index[name.split('/')[0]] for name in names}, classes


def labels_from_csv(path: str | os.PathLike) -> LabelTable:
    """The table in a CSV file: each row a file name, then one class or several numbers; a header may lead.

    If every row has one whole number, these are classes, else vectors. Raises UserError naming the line.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = [(line, row) for line, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'--labels={os.fspath(path)}: cannot be read ({error})') from error
    # A first row without any number after the name is a header.
    if rows and len(rows[0][1]) > 1 and not any(_is_numeric(cell) for cell in rows[0][1][1:]):
        rows = rows[1:]
    vectors = {}
    for line, (name, *cells) in rows:
        if not cells or not all(_is_numeric(cell) for cell in cells):
            raise UserError(f'--labels={os.fspath(path)}: line {line} must be a file name, then numbers')
        vectors[normalise_name(name.strip())] = [float(cell) for cell in cells]
    # A single fraction such as 0.5 makes the whole column a value, not a class.
    if all(len(vector) == 1 and vector[0].is_integer() for vector in vectors.values()):
        return {name: int(vector[0]) for name, vector in vectors.items()}
    return vectors


def _is_numeric(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
