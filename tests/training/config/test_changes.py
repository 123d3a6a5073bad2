# SPDX-License-Identifier: Apache-2.0
"""Which options may differ when a run goes on, and how the others are called."""
import dataclasses

import pytest
from small_run import small_config

from dnnlib.util import UserError
from training.config import OPTIONS
from training.config.changes import CAUSES, MAY_CHANGE, changes, check_changes


def settings(config):
    """All dotted names."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        parts = dataclasses.fields(value) if dataclasses.is_dataclass(value) else None
        found += [field.name] if parts is None else [f'{field.name}.{part.name}' for part in parts]
    return found


def test_the_same_options_are_no_change():
    assert changes(small_config(), small_config()) == []
    check_changes(small_config(), small_config())


@pytest.mark.parametrize('flags', [
    {'kimg': 99}, {'snap': '7'}, {'snap': '30m'}, {'metrics': 'none'}, {'metrics_every': 5}, {'workers': 9},
    {'cache': 'ram'}, {'tick': 3.0}, {'device': 'auto'}, {'nobench': True}])
def test_what_does_not_touch_the_mathematics_may_change(flags):
    assert changes(small_config(), small_config(**flags))
    check_changes(small_config(), small_config(**flags))


@pytest.mark.parametrize('flags, names', [
    ({'gamma': 7.0}, ['--gamma']), ({'batch': 8}, ['--batch', '--batch-gpu']), ({'seed': 3}, ['--seed']),
    ({'mirror': True}, ['--mirror']), ({'glr': 0.1, 'dlr': 0.2}, ['--glr', '--dlr']),
    ({'aug': 'noaug'}, ['--aug', '--augpipe']), ({'target': 0.3}, ['--target']), ({'cmax': 8}, ['--cmax']),
    ({'precision': 'bf16'}, ['--precision']), ({'freezed': 2}, ['--freezed'])])
def test_what_makes_another_training_is_refused_by_the_names_of_the_flags(flags, names):
    with pytest.raises(UserError, match='another training') as caught:
        check_changes(small_config(), small_config(**flags))
    assert all(f'{name} (' in str(caught.value) for name in names) and '--allow-changes' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_both_values_are_told():
    with pytest.raises(UserError, match=r'--gamma \(loss\.r1_gamma was 0\.5, now 7\.0\)'):
        check_changes(small_config(), small_config(gamma=7.0))


def test_every_setting_that_flags_can_reach_has_the_name_of_one():
    found = set(settings(small_config()))
    assert found >= set(CAUSES) and found >= MAY_CHANGE
    # What several flags or a rule set is not in the table of options; presets alone decide the rest.
    named = MAY_CHANGE | set(CAUSES) | {path for option in OPTIONS for path in option.paths}
    rest = {name for name in found - named if '.' not in name}
    assert rest == {'ada_interval'}
