# SPDX-License-Identifier: Apache-2.0
"""Parsers of option values, and properties of the dataset that the configuration depends on."""
import os
import re
from dataclasses import dataclass

from dnnlib import resolution
from dnnlib.util import UserError

UNIT_SEC = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
METRICS = ('fid50k_full', 'kid50k_full', 'pr50k3_full', 'ppl2_wend', 'is50k', 'fid50k', 'kid50k', 'pr50k3',
           'ppl_zfull', 'ppl_wfull', 'ppl_zend', 'ppl_wend', 'fid5k_full', 'kid5k_full', 'dc50k3_full', 'swd')
HIGHER_IS_BETTER = ('is', 'pr', 'dc')  # prefixes of metric names
SWITCH = {'auto': None, **dict.fromkeys(('1', 'true', 'yes', 'on', 'y', 't'), True),
          **dict.fromkeys(('0', 'false', 'no', 'off', 'n', 'f'), False)}
SNAPSHOT_FORMATS = ('pkl', 'safetensors')


@dataclass(frozen=True)
class DatasetInfo:
    """Properties of a dataset.

    path: directory or zip.  num_images: without mirror images.  height, width: pixels.  channels: 1 gray,
    2 gray with alpha, 3 RGB, 4 RGBA, or any other number.  label_dim: length of a label vector, 0 without
    labels.  class_names: in the order of the classes, None if they have none.
    """

    path: str
    num_images: int
    height: int
    width: int
    channels: int = 3
    has_labels: bool = False
    label_dim: int = 0
    class_names: tuple[str, ...] | None = None


def split_resolution(height: int, width: int) -> tuple[int, int, int]:
    """As dnnlib.resolution.split_resolution(), but raises UserError that names the nearest valid size."""
    try:
        return resolution.split_resolution((height, width))
    except ValueError as error:
        h, w = resolution.nearest_resolution(height, width)
        raise UserError(f'--data: {error}; resize with dataset_tool.py --width={w} --height={h}') from error


def parse_duration(text: str) -> float:
    """Seconds of '45s', '90m', '3h', '1.5d', '1d12h', '02:30:00' or '2-00:00:00' (days-h:m:s).

    Raises UserError for other formats and for zero.
    """
    text = str(text).strip()
    clock = re.fullmatch(r'(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)', text)
    seconds = 0.0
    if clock:
        days, hours, minutes, sec = (int(part or 0) for part in clock.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + sec
    elif re.fullmatch(r'(?:\d+(?:\.\d+)?[smhd])+', text):
        seconds = sum(float(n) * UNIT_SEC[unit] for n, unit in re.findall(r'([\d.]+)([smhd])', text))
    if seconds <= 0:
        raise UserError(f'--time-limit={text} must be a duration such as 90m, 3h, 1d12h or 2-00:00:00')
    return seconds


def parse_snap(text: str) -> tuple[int | None, float | None]:
    """(ticks, None) of '50', or (None, minutes) of '30m' or '1.5m'. Raises UserError for other formats."""
    match = re.fullmatch(r'(\d+)|(\d+(?:\.\d*)?)m', str(text).strip())
    number = float(match[1] or match[2]) if match else 0
    if not match or number <= 0 or (match[1] and number < 1):
        raise UserError(f'--snap={text} must be a number of ticks, at least 1, or minutes such as 30m')
    return (int(number), None) if match[1] else (None, number)


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names of a comma-separated list; () for 'none'. Raises UserError for unknown metrics."""
    if text.lower() == 'none':
        return ()
    names = tuple(dict.fromkeys(text.split(',')))
    for name in names:
        if name not in METRICS:
            raise UserError(f'--metrics={text}: {name!r} is not a metric; use none or, comma-separated: '
                            f'{", ".join(METRICS)}')
    return names


def parse_switch(name: str, value: str | bool) -> bool | None:
    """True, False, or None for auto.  name: of the option. Raises UserError for other values."""
    word = str(value).strip().lower()
    if word not in SWITCH:
        raise UserError(f'--{name}={value} must be auto, 1 or 0')
    return SWITCH[word]


def parse_folder(name: str, path: str) -> str:
    """The path.  name: of the option. Raises UserError if there is no such folder."""
    if not os.path.isdir(path):
        raise UserError(f'--{name}={path}: no such folder; check the path, or omit it')
    return path


def parse_formats(text: str) -> tuple[str, ...]:
    """Snapshot formats of a comma-separated list. Raises UserError if it is empty or one is unknown."""
    names = tuple(text.split(','))
    if not set(names) <= set(SNAPSHOT_FORMATS) or len(set(names)) < len(names):
        raise UserError(f'--snapshot-format={text} must be one or more of {",".join(SNAPSHOT_FORMATS)}, each '
                        'once')
    return names
