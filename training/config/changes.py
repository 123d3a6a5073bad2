# SPDX-License-Identifier: Apache-2.0
"""Which settings may change when a run is resumed, and which would make it a different training."""
import dataclasses
from collections.abc import Iterator
from typing import Any

from dnnlib.util import UserError
from training.config.options import OPTIONS
from training.config.schema import TrainConfig


def check_changes(before: TrainConfig, after: TrainConfig) -> None:
    """Raise UserError that names all changes that affect training."""
    told = [f'{_option(path)} ({path} was {old}, now {new})'
            for path, may_change, old, new in changes(before, after) if not may_change]
    if told:
        raise UserError(f'--resume: training would change because of {", ".join(told)}; omit '
                        'options that the run was not started with, or add --allow-changes=1')


def changes(before: TrainConfig, after: TrainConfig) -> list[tuple[str, bool, Any, Any]]:
    """(dotted name, may_change, old, new) of the settings that differ."""
    pairs = zip(settings_of(before), settings_of(after), strict=True)
    return [(*old, new) for old, (*_, new) in pairs if old[-1] != new]


def settings_of(config: TrainConfig) -> Iterator[tuple[str, bool, Any]]:
    """(dotted name, may_change, value) of all settings, those of sections included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            for part in dataclasses.fields(value):
                yield f'{field.name}.{part.name}', 'may_change' in part.metadata, getattr(value, part.name)
        else:
            yield field.name, 'may_change' in field.metadata, value


def _option(path: str) -> str:
    """The options that decide a setting; those that no other does are decided by the preset."""
    names = [f'--{option.name}' for option in OPTIONS if path in option.paths + option.also]
    return ' or '.join(names) or '--cfg'
