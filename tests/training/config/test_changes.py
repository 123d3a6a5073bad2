# SPDX-License-Identifier: Apache-2.0
"""Which options may differ when a run is resumed, and how the others are named."""
import pytest
from small_run import small_config

from dnnlib.util import UserError
from training.config import OPTIONS
from training.config.changes import changes, check_changes, settings_of


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
def test_what_affects_training_is_refused_by_the_names_of_the_flags(flags, names):
    with pytest.raises(UserError, match='training would change') as caught:
        check_changes(small_config(), small_config(**flags))
    assert all(f'{name} (' in str(caught.value) for name in names) and '--allow-changes' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_both_values_are_told():
    with pytest.raises(UserError, match=r'--gamma \(loss\.r1_gamma was 1, now 7\.0\)'):
        check_changes(small_config(), small_config(gamma=7.0))


@pytest.mark.parametrize('flags, names', [
    ({'subset': 9}, '--data or --subset (data.max_size'), ({'augpipe': 'noise'}, '--augpipe (augment.mult'),
    ({'resume': 'a.pkl'}, '--resume (resume_pkl'), ({'precision': 'bf16'}, '--precision (G.num_fp16_res'),
    ({'nhwc': True}, '--nhwc (G.channels_last'), ({'cfg': 'stylegan2'}, '--cfg (ema_kimg')])
def test_settings_that_a_rule_or_a_preset_decides_are_named_by_its_flag(flags, names):
    with pytest.raises(UserError, match='training would change') as caught:
        check_changes(small_config(), small_config(**flags))
    assert names in str(caught.value)


def test_the_settings_of_each_option_exist():
    found = {path for path, *_ in settings_of(small_config())}
    assert found >= {path for option in OPTIONS for path in option.paths + option.also}


def test_settings_without_an_option_are_decided_by_presets():
    named = {path for option in OPTIONS for path in option.paths + option.also}
    rest = {path for path, may_change, _ in settings_of(small_config()) if not may_change} - named
    assert rest == {
        'ema_kimg', 'ema_rampup', 'ada_kimg', 'ada_interval', 'G_reg_interval', 'D_reg_interval', 'system',
        'G.z_dim', 'G.w_dim', 'G.use_noise', 'D.mbstd_group_size', 'D.architecture', 'G_opt.betas',
        'G_opt.eps', 'D_opt.betas', 'D_opt.eps', 'loss.pl_weight', 'loss.style_mixing_prob',
        'loss.pl_batch_shrink', 'loss.pl_decay'}
