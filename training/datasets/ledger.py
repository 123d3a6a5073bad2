# SPDX-License-Identifier: Apache-2.0
"""The ledger of a source: which of its entries are not used, and why, grouped and counted."""
import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from typing import Protocol

from dnnlib.util import UserError, printable
from training.datasets.images import HEIF_REMEDY, HEIF_START, count_frames, is_image_name, read_header

SYSTEM_FILES = {'thumbs.db', 'ehthumbs.db', 'desktop.ini', '__macosx'}
START_BYTES = 16  # of a file, to recognize its format
SIGNATURES = (
    (rb'\x89PNG\r\n\x1a\n', '.png'), (rb'\xff\xd8\xff', '.jpg'), (rb'GIF8[79]a', '.gif'),
    (rb'RIFF....WEBP', '.webp'), (rb'II\*\0|MM\0\*', '.tif'), (rb'BM....\0\0\0\0', '.bmp'),
    (HEIF_START, '.heic'), (rb'....ftypavif', '.avif'))
FRAMES_REMEDY = 'only the first is; dataset_tool.py --frames=all uses all'
LOWER_BYTE = 'lower byte per value of images with 16 bits per channel'
DEEP_REMEDY = 'dataset_tool.py --range=auto maps the range that occurs to 0 to 255'
ANIMATED_SUFFIXES = ('.gif', '.webp', '.apng', '.tif', '.tiff')
MAX_LOOKED_INTO = 1000


def _table(*groups: tuple[str, str]) -> dict[str, str]:
    return {f'.{suffix}': reason for suffixes, reason in groups for suffix in suffixes.split()}


# Suffixes of what users take for images; a loss if it is not used.
UNREADABLE = _table(
    ('heic heif hif', HEIF_REMEDY), ('avif jxl jxr', 'not readable here; convert to PNG or JPEG'),
    ('cr2 cr3 crw nef nrw arw srf sr2 dng orf rw2 raf pef srw x3f 3fr raw',
     'camera raw; develop to PNG or TIFF'),
    ('svg svgz pdf eps ps ai wmf emf', 'not an image of pixels; render to PNG'),
    ('psb xcf kra ora clip afphoto indd sketch', 'a file of an image editor; export to PNG'),
    ('mp4 mov avi mkv webm m4v mpg mpeg wmv mts m2ts 3gp',
     'video; extract frames: ffmpeg -i FILE frame%06d.png'),
    ('dcm dicom nii czi nd2 lif lsm oib vsi svs mrc fits fit exr hdr npy npz h5 hdf5 mat',
     'scientific data; export to PNG or 16-bit TIFF'),
    ('zip rar 7z tar tgz gz bz2 xz zst', 'a nested archive; unpack it'))
TABLES = _table(('json jsonl csv tsv', 'labels are read from dataset.json, or the file of --labels=FILE.csv'))


class Files(Protocol):
    """What the ledger needs of a source."""

    names: list[str]
    others: list[str]
    unused: list[tuple[str, str]]

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        ...

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """At least its first bytes."""
        ...

    def label_tables(self) -> list[str]:
        """The names of label tables, which are used."""
        ...


@dataclasses.dataclass
class Group:
    """What is not used for one reason: how many, in how many entries, the first one, whether it is a loss."""

    count: int
    entries: int
    first: str
    is_loss: bool


class Ledger:
    """Entries that are not used, by (what they are, reason)."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], Group] = {}

    def add(self, what: str, reason: str, name: str, *, count: int = 1, is_loss: bool = True) -> None:
        """Note an entry.  what: completes 'Not used: 3 '; {files} in it becomes the number of entries.

        is_loss: it may be what the user wants to use.
        """
        group = self.groups.setdefault((what, reason), Group(0, 0, name, is_loss))
        group.count += count
        group.entries += 1

    def add_frames(self, name: str, num_frames: int, remedy: str = FRAMES_REMEDY) -> None:
        """Note an image file of which only the first frame is used."""
        if num_frames > 1:
            self.add('further frames of {files} animations or stacks', remedy, name, count=num_frames - 1)

    def add_rows(self, rows: Iterable[str], names: Iterable[str]) -> None:
        """Note the rows of a label table that name none of the images."""
        for row in sorted(set(rows).difference(names)):
            self.add('labels', 'no image has this name', row)

    def join(self, other: 'Ledger') -> None:
        """Add the entries of another ledger."""
        for key, group in other.groups.items():
            mine = self.groups.setdefault(key, Group(0, 0, group.first, group.is_loss))
            mine.count += group.count
            mine.entries += group.entries

    def lines(self) -> list[str]:
        """One line per group, losses first."""
        return [*self._lines(is_loss=True), *self._lines(is_loss=False)]

    def _lines(self, *, is_loss: bool) -> list[str]:
        lines = []
        for (what, reason), group in self.groups.items():
            if group.is_loss == is_loss:
                what = what.replace('{files}', str(group.entries))
                end = f': {reason}' if reason else ''
                lines.append(f'Not used: {group.count} {what} (first: {printable(group.first)}){end}')
        return lines

    def check(self, *, strict: bool) -> None:
        """Raise UserError if `strict` and there is a loss."""
        losses = self._lines(is_loss=True)
        if strict and losses:
            more = f' (and {len(losses) - 1} more kinds)' if len(losses) > 1 else ''
            raise UserError(f'--strict: {losses[0][0].lower()}{losses[0][1:]}{more}')


def account(files: Files, *, look_inside: bool = False) -> Ledger:
    """The ledger of a folder or zip, by names and, for unknown suffixes, the first bytes of files.

    look_inside: count the frames of what may be animations or stacks, of the first MAX_LOOKED_INTO.
    """
    tables = set(files.label_tables())
    ledger = account_names([name for name in files.others if name not in tables],
                           lambda name: files.read_start(name, START_BYTES))
    for what, name in files.unused:
        ledger.add(what, '', name)
    if look_inside and files.names:
        with contextlib.suppress(UserError):
            if read_header(files.read(files.names[0])).is_deep:
                ledger.add(LOWER_BYTE, DEEP_REMEDY, files.names[0], is_loss=False)
        animated = [name for name in files.names if name.lower().endswith(ANIMATED_SUFFIXES)]
        for name in animated[:MAX_LOOKED_INTO]:
            with contextlib.suppress(UserError):  # reported when it is read
                ledger.add_frames(name, count_frames(files.read(name)))
    return ledger


def account_names(names: Iterable[str], read_start: Callable[[str], bytes]) -> Ledger:
    """The ledger of entries that are not used.  read_start(name): the first bytes of an entry."""
    ledger = Ledger()
    for name in names:
        _classify(ledger, name, read_start)
    return ledger


def _classify(ledger: Ledger, name: str, read_start: Callable[[str], bytes]) -> None:
    parts = name.lower().split('/')
    if any(part.startswith('.') or part in SYSTEM_FILES for part in parts):
        ledger.add('hidden or system files', '', name, is_loss=False)
        return
    suffix = os.path.splitext(parts[-1])[1]
    what = suffix or 'without suffix'
    if suffix in UNREADABLE:
        ledger.add(what, UNREADABLE[suffix], name)
        return
    try:
        start = read_start(name)
    except (UserError, OSError):
        ledger.add(what, 'not readable', name, is_loss=False)
        return
    matching = [known for pattern, known in SIGNATURES if re.match(pattern, start, re.DOTALL)]
    if matching:
        format_suffix = matching[0]
        is_readable = is_image_name(f'x{format_suffix}')
        ledger.add(what, f'an image under another name; call it {format_suffix}' if is_readable
                   else UNREADABLE[format_suffix], name)
    else:
        ledger.add(what, TABLES.get(suffix, 'not an image format'), name, is_loss=False)
