# SPDX-License-Identifier: Apache-2.0
"""Labels of images from `dataset.json`, CSV files and folders, matched with names, as checked arrays."""
import codecs
import csv
import dataclasses
import io
import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dnnlib.util import UserError, printable
from training.datasets.files import LABEL_FILE, ImageFiles
from training.datasets.images import is_image_name

Label: TypeAlias = int | list[float]
LabelTable: TypeAlias = dict[str, Label]
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_CLASSES = 1_000_000  # a class becomes a one-hot vector of this length
CLASS_NAMES = 'class_names'  # the key in dataset.json and in the options of a dataset
HEADER_WORDS = {'file', 'filename', 'file_name', 'name', 'image', 'image_id', 'img', 'path', 'id', 'sample'}
BYTES_PER_LIST = 5  # JSON: more lists than that are no labels, and would take 30 times the memory of the file


class LabelError(UserError):
    """Labels that can be read but not used for training; harmless without --cond."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels by relative name, and the names of the classes, or None."""

    table: LabelTable
    class_names: tuple[str, ...] | None = None


def normalise_name(name: str) -> str:
    """A relative file name with forward slashes, so that tables from any system match."""
    return name.replace('\\', '/').removeprefix('./')


def decode_text(data: bytes) -> str:
    """The text of a table: UTF-8, or UTF-16 as Excel writes it. Raises ValueError for anything else."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode('utf-16')
    # utf-8-sig: editors on Windows put a byte order mark first.
    text = data.decode('utf-8-sig')
    if '\0' in text:
        raise ValueError('it has zero bytes, as UTF-16 without a byte order mark does')
    return text


def parse_label_json(data: bytes, origin: str) -> Labels | None:
    """The labels in the bytes of a `dataset.json`: {"labels": [[name, class or vector], ...] or null}.

    A class is a number, or in all entries a word; "class_names": ["cat", ...] may name the classes. None
    where "labels" is null. Raises UserError, whose message starts with `origin`, for malformed text.
    """
    try:
        if data.count(b'[') + data.count(b'{') > 1000 + len(data) // BYTES_PER_LIST:
            raise ValueError('almost nothing but brackets')
        content = json.loads(decode_text(data))
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
    table: dict[str, Any] = {}
    for name, label in (_checked_pair(pair, origin) for pair in entries):
        _insert(table, normalise_name(name), label, origin)
    return _named_classes(table, content.get(CLASS_NAMES), origin)


def _insert(table: dict[str, Any], name: str, label: Any, origin: str) -> None:
    if name in table and table[name] != label:
        raise LabelError(f'{origin}: two labels for {printable(name)}, {_short(table[name])} and '
                         f'{_short(label)}; remove one')
    table[name] = label


def _named_classes(table: dict[str, Any], names: object, origin: str) -> Labels:
    """Labels with class names: those given, or the words that stand in place of class numbers."""
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise LabelError(f'{origin}: "{CLASS_NAMES}" must be a list of words, one per class')
    if not table or not all(isinstance(label, str) for label in table.values()):
        highest = max((label for label in table.values() if type(label) is int), default=-1)
        if names is not None and highest >= len(names):
            raise LabelError(f'{origin}: class {_short(highest)} has no name in "{CLASS_NAMES}", which has '
                             f'{len(names)}')
        return Labels(table, None if names is None else tuple(names))
    # Numbers in quotes are numbers.
    if names is None and all(label.strip().isdecimal() and len(label) < 10 for label in table.values()):
        return Labels({name: int(label) for name, label in table.items()})
    words = sorted(set(table.values())) if names is None else names
    index = {word: i for i, word in enumerate(words)}
    unknown = next((name for name, label in table.items() if label not in index), None)
    if unknown is not None:
        raise LabelError(f'{origin}: the label of {printable(unknown)} is {_short(table[unknown])}, which '
                         f'"{CLASS_NAMES}" does not list')
    return Labels({name: index[label] for name, label in table.items()}, tuple(words))


def class_names_of(options: Mapping[str, Any] | None) -> list[str] | None:
    """The names of the classes in the options of a dataset (training_set_kwargs), in order; None: none."""
    names = (options or {}).get(CLASS_NAMES)
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if is_list and names else None


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
            raise LabelError(f'{what} is {_short(label)}; a class is 0, 1, 2, ..., and a number goes in a '
                             f'list: [{_short(label)}]')
        if label >= MAX_CLASSES:
            raise LabelError(f'{what} is {_short(label)}; classes are counted from 0 without gaps, and at '
                             f'most {MAX_CLASSES}')
        return int(label)
    if not isinstance(label, list) or not all(_is_number(value) for value in label):
        raise LabelError(f'{what} is {_short(label)}; give a class such as 3 or a vector such as [0.5, 1]')
    if any(abs(value) > FLOAT32_MAX for value in label):
        raise LabelError(f'{what} is {_short(label)}, too large for 32-bit floats; scale the labels')
    return label


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)  # isfinite refuses integers of 400 digits


def _short(label: object) -> str:
    return json.dumps(label)[:60]


def _layout(label: Label) -> str:
    return 'a class number' if isinstance(label, int) else f'a vector of {len(label)}'


def labels_from_folders(names: Iterable[str], origin: str) -> Labels:
    """Classes by first folder, in sorted order; folders that hold all images and more folders are skipped.

    Raises UserError for an image that is not in a folder.
    """
    parts = {name: name.split('/') for name in names}
    loose = [name for name, part in parts.items() if len(part) == 1]
    if loose:
        raise UserError(f'{origin}: {loose[0]} is in no class folder, which --labels=folders requires; '
                        f'{len(loose)} such images')
    # A zip of a folder has that folder around all classes.
    while len({part[0] for part in parts.values()}) == 1 and all(len(part) > 2 for part in parts.values()):
        parts = {name: part[1:] for name, part in parts.items()}
    # Sorted, so that the numbers do not depend on the file system; numbers keep their value where they can.
    classes = sorted({part[0] for part in parts.values()})
    if all(folder.isdecimal() and folder.isascii() for folder in classes):
        classes.sort(key=int)
    index = {folder: i for i, folder in enumerate(classes)}
    return Labels({name: index[part[0]] for name, part in parts.items()}, tuple(classes))


def labels_from_csv(data: bytes, origin: str) -> Labels:
    """The labels in a CSV file: each row a file name, then a class or several numbers; a header may lead.

    Separated by commas, semicolons, tabs or bars; Excel's line sep=; may lead. If every row has one whole
    number, these are classes, if every row has one word, these are names of classes, else vectors. Raises
    UserError naming the line.
    """
    try:
        text = decode_text(data)
        # Excel's own line; what follows keeps its line numbers.
        text = re.sub(r'\Asep=.(?=[\r\n])', '', text)
        separator = _separator(text)
        rows = [(line, [cell.strip() for cell in row]) for line, row
                in enumerate(csv.reader(io.StringIO(text, newline=''), delimiter=separator), start=1) if row]
    except (ValueError, csv.Error) as error:
        raise UserError(f'{origin}: cannot be read ({error}); save it as CSV in UTF-8') from error
    if rows and _is_header(rows):
        rows = rows[1:]
    table: dict[str, Any] = {}
    is_words = bool(rows) and all(len(row) == 2 and _number(row[1], separator) is None for _, row in rows)
    for line, (name, *cells) in rows:
        values = [_number(cell, separator) for cell in cells]
        if is_words and cells[0]:
            _insert(table, normalise_name(name), cells[0], f'{origin}: line {line}')
        elif not cells or None in values or not all(map(math.isfinite, values)):
            raise UserError(f'{origin}: line {line} must be a file name, then numbers, or one word in each '
                            'line')
        else:
            _insert(table, normalise_name(name), values, f'{origin}: line {line}')
    if is_words:
        return _named_classes(table, None, origin)
    # A single fraction such as 0.5 makes the whole column a value, not a class.
    if all(len(vector) == 1 and vector[0].is_integer() for vector in table.values()):
        table = {name: int(vector[0]) for name, vector in table.items()}
    return Labels(table)


def _separator(text: str) -> str:
    """The separator of the first line that has one."""
    for line in text.splitlines():
        # A name in quotes may contain any of them.
        outside = ''.join(line.split('"')[::2])
        counts = {mark: outside.count(mark) for mark in ',;\t|'}
        if any(counts.values()):
            # A decimal comma beside other separators is none.
            return max(counts, key=lambda mark: (counts[mark] > 0, mark != ',', counts[mark]))
    return ','


def _is_header(rows: Sequence[tuple[int, list[str]]]) -> bool:
    """Whether the first row has neither a number nor, where rows have a word, the name of an image."""
    (_, (name, *cells)), others = rows[0], rows[1:]
    if not cells or any(_number(cell, ';') is not None for cell in cells):
        return False
    if is_image_name(normalise_name(name)):
        return False
    has_images = any(is_image_name(normalise_name(row[0])) for _, row in others)
    has_numbers = any(_number(cell, ';') is not None for _, row in others for cell in row[1:])
    return name.lower() in HEADER_WORDS or has_images or has_numbers


def _number(cell: str, separator: str) -> float | None:
    """The number in a cell, NaN and Inf too; None: a word. Beside other separators commas are decimal."""
    try:
        return float(cell if separator == ',' else cell.replace(',', '.'))
    except ValueError:
        return None


# Encodings of names in zips and on disks that are not marked as UTF-8.
CODECS = ('utf-8', 'cp932', 'gbk', 'big5', 'euc_kr', 'cp1252', 'cp1251', 'cp850')


def _composed(name: str) -> str:
    return unicodedata.normalize('NFC', name)


def _caseless(name: str) -> str:
    return _composed(name).casefold()


def _stem(name: str) -> str:
    folder, slash, file = _caseless(name).rpartition('/')
    return folder + slash + (file.rpartition('.')[0] or file)


# What names may differ in, from harmless to bold; each is tried on the names that are left.
FORMS = (_composed, _caseless, _stem)


def label_source(files: ImageFiles) -> str | None:
    """The name of the label table of a folder or zip; None if there is none.

    Raises LabelError if there are several, all of them outside the root.
    """
    tables = files.label_tables()
    if len(tables) > 1:
        raise LabelError(f'{files.path}: {len(tables)} label tables, {printable(tables[0])}, '
                         f'{printable(tables[1])}, ...; join them in one {LABEL_FILE}')
    return tables[0] if tables else None


def read_labels(files: ImageFiles) -> Labels | None:
    """The labels of a folder or zip by names of its images; None without, or if they are null.

    A table in a folder is relative to that folder. Raises UserError if it is malformed, LabelError if it has
    labels that match no image while images have no label.
    """
    name = label_source(files)
    if name is None:
        return None
    origin = f'{files.path}: {name}'
    labels = parse_label_json(files.read_label_table(name), origin)
    if labels is None:
        return None
    folder = name.rpartition('/')[0]
    table = {f'{folder}/{row}': label for row, label in labels.table.items()} if folder else labels.table
    return Labels(match_labels(files.names, table, origin, files.raw_names), labels.class_names)


def match_labels(
    names: Sequence[str], table: LabelTable, origin: str,
    raw_names: Callable[[str], Mapping[str, str]] | None = None,
) -> LabelTable:
    """The labels by names of images, with the rows that name no image.

    Rows may differ from names in letter case, Unicode form, suffix, leading folders or, by raw_names(codec)
    -> {name: decoded name}, encoding, as long as one row fits one image.  Raises LabelError if rows and
    images are left.
    """
    found = {name: table[name] for name in names if name in table}
    rows = {row: label for row, label in table.items() if row not in found}
    aliases = {name: name for name in names if name not in found}
    for form in FORMS if rows else ():
        _match(found, rows, aliases, form)
    for codec in CODECS if rows and raw_names is not None else ():
        decoded = {name: text for name, text in raw_names(codec).items() if name in aliases}
        # A wrong encoding may fit a few names by chance, not all.
        if decoded and set(map(_caseless, decoded.values())) <= set(map(_caseless, rows)):
            _match(found, rows, decoded, _caseless)
            aliases = {name: alias for name, alias in aliases.items() if name not in found}
    if rows and aliases:
        count = f'none of {len(table)} labels matches an' if not found else (
            f'{len(rows)} of {len(table)} labels match no')
        raise LabelError(f'{origin}: {count} image, the first is {printable(next(iter(rows)))}; an image '
                         f'without label is {printable(next(iter(aliases)))}')
    return {**found, **rows}


def _match(
    found: LabelTable, rows: LabelTable, aliases: dict[str, str], form: Callable[[str], str],
) -> None:
    """Move what fits in this form from `rows` and `aliases` (name -> text to compare) to `found`."""
    candidates = defaultdict(set)
    images, wanted = _index(aliases, form), _index({row: row for row in rows}, form)
    for row in rows:
        # The longest common end counts: a table may have more leading folders, or fewer.
        candidates[row].update(next((images[end] for end in _ends(form(row)) if end in images), ()))
    for name, alias in aliases.items():
        for row in next((wanted[end] for end in _ends(form(alias)) if end in wanted), ()):
            candidates[row].add(name)
    claims = defaultdict(list)
    for row, fitting in candidates.items():
        for name in fitting:
            claims[name].append(row)
    for row, fitting in candidates.items():
        if len(fitting) == 1 and len(claims[name := next(iter(fitting))]) == 1:
            found[name] = rows.pop(row)
            del aliases[name]


def _index(texts: Mapping[str, str], form: Callable[[str], str]) -> dict[str, list[str]]:
    index = defaultdict(list)
    for key, text in texts.items():
        index[form(text)].append(key)
    return dict(index)


def _ends(name: str) -> Iterable[str]:
    """The name, then without its first folder, and so on."""
    while name:
        yield name
        name = name.partition('/')[2]
