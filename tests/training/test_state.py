# SPDX-License-Identifier: Apache-2.0
"""All that a run is goes into its state dictionary and comes out of it, to the bit."""
import copy
import dataclasses
import io

import pytest
import torch
from small_run import SmallRun, small_config

from dnnlib.util import UserError
from torch_utils import distributed
from training.formats.pickled import HostCopies
from training.run.snapshots import make_payload, write_state


def config(**flags):
    """With everything that has a memory: ADA, style mixing, path lengths, gradient accumulation."""
    plain = small_config(batch_gpu=2, gamma=0.1, dlr=0.006, **flags)
    loss = dataclasses.replace(plain.loss, pl_weight=2, style_mixing_prob=0.9)
    # A target in the range of this D's mean sign, so that p moves both ways within a few steps.
    augment = dataclasses.replace(plain.augment, target=-0.5)
    return dataclasses.replace(plain, loss=loss, augment=augment, ada_kimg=0.5)


def leaves(value, name=''):
    """(dotted name, leaf) of all that a nested structure holds."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in pairs for leaf in leaves(item, f'{name}.{key}')]
    return [(name, value)]


def assert_same(first, second):
    first, second = leaves(first), leaves(second)
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, a), (_, b) in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def through_a_file(state):
    """The dictionary as another process reads it."""
    file = io.BytesIO()
    write_state(file, make_payload({}, **HostCopies().tree(state)))
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_a_run_that_is_replaced_again_and_again_is_the_one_that_is_not():
    whole, parts = SmallRun(config()), SmallRun(config())
    whole.step(20)
    for steps in (1, 2, 7, 10):
        parts.step(steps)
        state = through_a_file(parts.state.state_dict())
        parts = SmallRun(config(seed=3))  # nothing of it may stay
        parts.config = config()
        parts.state.load_state_dict(state)
    assert whole.state.cur_nimg == parts.state.cur_nimg == 80 and whole.state.batch_idx == 20
    assert whole.state.augment_p > 0 and whole.state.loss.pl_mean != 0
    assert_same(whole.state.state_dict(), parts.state.state_dict())


def test_a_process_that_the_run_did_not_have_knows_the_names_that_all_add_up(monkeypatch):
    before, added = SmallRun(config()), SmallRun(config())
    before.step(2)
    monkeypatch.setattr(distributed, 'rank', lambda: 1)
    added.state.load_state_dict(through_a_file(before.state.state_dict()))
    assert added.state.statistics.names == before.state.statistics.names != []
    assert all(not table.any() for table in added.state.statistics.tensors())


def test_moments_get_the_strides_of_their_parameters():
    # As on a GPU, where weights are channels_last; the state is of a run on a CPU.
    run, other = SmallRun(config()), SmallRun(config())
    run.step(1)
    other.state.G.to(memory_format=torch.channels_last)
    other.state.load_state_dict(through_a_file(run.state.state_dict()))
    (weight, *_) = [p for p in other.state.G.parameters() if p.ndim == 4 and p.shape[2] == 3]
    moments = other.state.G_opt.state[weight]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert moments['exp_avg'].stride() == moments['exp_avg_sq'].stride() == weight.stride()
    assert_same(run.state.state_dict(), other.state.state_dict())


def test_a_state_has_everything_in_it():
    run = SmallRun(config())
    run.step(1)
    state = run.state.state_dict()['run']
    assert set(state) == {'G', 'D', 'G_ema', 'G_opt', 'D_opt', 'pl_mean', 'augment_p', 'ada', 'cur_nimg',
                          'batch_idx'}
    G = run.state.G
    assert set(state['G']) == {name for name, _ in [*G.named_parameters(), *G.named_buffers()]}
    assert 'mapping.w_avg' in state['G'] and state['ada']['pending'][1] > 0
    moments = state['D_opt']['state'][0]
    assert {'step', 'exp_avg', 'exp_avg_sq'} == set(moments) and moments['exp_avg_sq'].any()


@pytest.mark.parametrize('flags', [{'aug': 'noaug'}, {'aug': 'fixed', 'p': 0.3}])
def test_a_run_without_adaptive_augmentation_has_less_to_keep(flags):
    first, second = SmallRun(config(**flags)), SmallRun(config(**flags))
    first.step(2)
    second.state.load_state_dict(through_a_file(first.state.state_dict()))
    assert first.state.state_dict()['run']['ada'] is None
    assert_same(first.state.state_dict(), second.state.state_dict())


def test_settings_are_those_of_the_run_that_goes_on():
    first, second = SmallRun(config()), SmallRun(config(glr=0.5, aug='fixed', p=0.25))
    first.step(2)
    second.state.load_state_dict(through_a_file(first.state.state_dict()))
    assert second.state.G_opt.param_groups[0]['lr'] == pytest.approx(0.5 * 4 / 5)
    assert second.state.augment_p == 0.25


def test_other_networks_are_refused_by_the_name_of_a_tensor():
    state = through_a_file(SmallRun(config()).state.state_dict())
    with pytest.raises(UserError, match=r'--resume: G\.[\w.]+ is \(.*\) in the training state, but \('):
        SmallRun(config(cmax=8, cbase=64)).state.load_state_dict(state)
    del state['run']['D']['b4.out.bias']
    with pytest.raises(UserError, match=r'D\.b4\.out\.bias is absent in the training state'):
        SmallRun(config()).state.load_state_dict(state)


@pytest.mark.parametrize('part, name', [
    ('run', 'G'), ('run', 'D_opt'), ('run', 'pl_mean'), ('run', 'batch_idx'), ('loop', 'tick'),
    ('extra', 'statistics')])
@pytest.mark.parametrize('value', [None, 'x'])
def test_a_state_without_some_of_its_parts_is_refused_in_one_line(part, name, value):
    run = SmallRun(small_config())
    saved = copy.deepcopy(run.state.state_dict())
    del saved[part][name]
    if value is not None and name not in ('batch_idx', 'tick'):
        saved[part][name] = value
    with pytest.raises(UserError, match=r'^--resume: ') as error:
        run.state.load_state_dict(saved)
    assert '\n' not in str(error.value)
