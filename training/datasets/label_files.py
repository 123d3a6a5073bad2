# SPDX-License-Identifier: Apache-2.0
"""Labels of a folder or zip: finds the table, and matches its names with those of the images."""
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from dnnlib.util import printable
from training.datasets.files import LABEL_FILE, ImageFiles
from training.datasets.labels import LabelError, Labels, LabelTable, parse_label_json

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
        count = f'none of {len(table)} labels matches' if not found else (
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
