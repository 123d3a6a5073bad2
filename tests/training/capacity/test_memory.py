# SPDX-License-Identifier: Apache-2.0
"""Running out of memory: smaller rounds, an untouched state, and one line that says so."""
import dataclasses
import gc
import weakref

import pytest
import torch
from small_run import SmallRun, small_config

from dnnlib.util import UserError
from training.capacity import memory
from training.capacity.memory import fit_batch_gpu, fit_to_memory, is_out_of_memory, rehearse, smaller_batches

MESSAGES = ['CUDA out of memory. Tried to allocate 2.00 GiB', 'enforce fail: DefaultCPUAllocator: not enough']


def limited(most, error=RuntimeError, tried=None):
    """An attempt for which `most` images at a time are all that fits."""
    def attempt(config):
        if tried is not None:
            tried.append(config.batch_gpu)
        if config.batch_gpu > most:
            raise error(MESSAGES[0])
    return attempt


def snapshot(run):
    """Everything that an iteration may change, as copies."""
    state = run.state
    tensors = {f'{name}.{key}': value for name in ('G', 'D', 'G_ema')
               for key, value in getattr(state, name).state_dict().items()}
    tensors |= {'pl_mean': state.loss.pl_mean, 'p': state.augment_pipe.p, 'pending': state.ada.pending}
    for name, opt in (('G_opt', state.G_opt), ('D_opt', state.D_opt)):
        for i, values in opt.state_dict()['state'].items():
            tensors |= {f'{name}.{i}.{key}': torch.as_tensor(value) for key, value in values.items()}
    tensors['rng'] = torch.get_rng_state()
    return {key: value.detach().clone() for key, value in tensors.items()}


def assert_unchanged(run, before):
    after = snapshot(run)
    assert after.keys() == before.keys()
    assert [key for key in before if not torch.equal(after[key], before[key])] == []
    assert not any(p.requires_grad for p in [*run.state.G.parameters(), *run.state.D.parameters()])


@pytest.mark.parametrize(('message', 'expected'), [*[(m, True) for m in MESSAGES], ('shape mismatch', False)])
def test_errors_of_memory_are_told_from_others(message, expected):
    assert is_out_of_memory(RuntimeError(message)) is expected
    assert is_out_of_memory(torch.cuda.OutOfMemoryError(message)) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize('error', [RuntimeError, torch.cuda.OutOfMemoryError, MemoryError])
def test_the_batch_is_halved_until_it_fits_and_one_line_says_so(error):
    lines, tried = [], []
    fitted = fit_batch_gpu(small_config(batch=16), limited(4, error, tried), lines.append)
    assert tried == [16, 8, 4] and fitted.batch_gpu == 4 and fitted.batch_size == 16
    (line,) = lines
    assert '--batch-gpu=16' in line and '--batch-gpu=4' in line and '\n' not in line


def test_what_fits_is_left_alone_and_silent():
    config = small_config(batch=16)
    assert fit_batch_gpu(config, limited(16), pytest.fail) is config


@pytest.mark.parametrize(('batch', 'expected'), [(16, [8, 4, 2, 1]), (12, [6, 3, 1]), (9, [3, 1]), (1, [])])
def test_smaller_rounds_divide_the_batch(batch, expected):
    assert [config.batch_gpu for config in smaller_batches(small_config(batch=batch))] == expected


def test_groups_of_minibatch_deviation_keep_dividing_the_round():
    lines = []
    fitted = fit_batch_gpu(small_config(batch=12), limited(6), lines.append)
    assert (fitted.batch_gpu, fitted.D.mbstd_group_size) == (6, 3)
    assert 'groups of 3 images instead of 4' in lines[0]
    assert fit_batch_gpu(small_config(batch=16), limited(8), print).D.mbstd_group_size == 4


def test_when_not_even_one_image_fits_the_error_says_what_helps():
    with pytest.raises(UserError, match=r'--batch-gpu=4.*--cbase=16.*--cmax=2.*--width') as caught:
        fit_batch_gpu(small_config(batch=4), limited(0), pytest.fail)
    assert '\n' not in str(caught.value) and '--precision' in str(caught.value)


def test_other_errors_pass_through():
    def attempt(config):
        raise RuntimeError('shape mismatch')
    with pytest.raises(RuntimeError, match='shape mismatch'):
        fit_batch_gpu(small_config(), attempt, pytest.fail)


def test_memory_of_a_failed_attempt_is_freed_before_the_next():
    alive = []

    def attempt(config):
        large = torch.zeros(10)
        assert not [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(large))
        if config.batch_gpu > 1:
            raise RuntimeError(MESSAGES[0])
    gc.disable()
    try:
        assert fit_batch_gpu(small_config(batch=4), attempt, print).batch_gpu == 1
    finally:
        gc.enable()


@pytest.mark.parametrize('steps', [0, 5])
def test_a_rehearsal_changes_nothing(steps):
    run = SmallRun(small_config())
    run.state.loss.pl_weight = 2
    run.step(steps)
    before = snapshot(run)
    run.collector.update()
    rehearse(run.state, run.phases, run.config)
    assert_unchanged(run, before)
    run.collector.update()
    assert all(run.collector.num(name) == 0 for name in run.collector.names())


def test_a_training_goes_on_after_a_rehearsal_as_without():
    plain, rehearsed = SmallRun(small_config()), SmallRun(small_config())
    assert fit_to_memory(rehearsed.state, rehearsed.phases, rehearsed.config, pytest.fail) is rehearsed.config
    plain.step(5)
    rehearsed.step(5)
    assert_unchanged(rehearsed, snapshot(plain))


def test_a_rehearsal_augments_every_image():
    run, seen = SmallRun(small_config()), []
    original = run.state.augment_pipe.forward
    run.state.augment_pipe.forward = lambda img: seen.append(float(run.state.augment_pipe.p)) or original(img)
    rehearse(run.state, run.phases, run.config)
    assert seen and set(seen) == {1.0} and float(run.state.augment_pipe.p) == 0


def fail_above(run, most, name):
    """Let a phase of the run raise an error of memory, after its losses, where it sees more than `most`."""
    phase = run.phase(name)
    original = phase.losses

    def losses(batch):
        yield from original(batch)
        if len(batch.gen_z) > most:
            raise RuntimeError(MESSAGES[0])
    phase.losses = losses


@pytest.mark.parametrize('name', ['Gmain', 'Dmain', 'Dreg'])
def test_a_phase_that_fails_half_way_leaves_no_trace(name):
    run = SmallRun(small_config(batch=12))
    run.step(2)
    before = snapshot(run)
    fail_above(run, 6, name)
    lines = []
    fitted = fit_to_memory(run.state, run.phases, run.config, lines.append)
    assert fitted.batch_gpu == 6 and len(lines) == 1
    assert run.state.D.b4.mbstd.group_size == 3
    assert_unchanged(run, before)
    assert type(run.state.D)(**run.state.D.init_kwargs).b4.mbstd.group_size == 3
    run.config = fitted
    run.step(2)
    assert all(p.isfinite().all() for p in run.state.G.parameters())


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    whole = SmallRun(small_config(batch=8, aug='noaug'))
    parts = SmallRun(dataclasses.replace(whole.config, batch_gpu=4))
    for run in (whole, parts):
        run.state.D.b4.mbstd.group_size = 1  # groups may not mix images of several rounds
        for module in run.state.G.modules():
            module.use_noise = False
        run.step()
    for a, b in zip(whole.state.D.parameters(), parts.state.D.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_all_processes_take_the_batch_that_fits_the_poorest(monkeypatch):
    # This process always succeeds; another one, whose flag is added, fails above 4 images.
    reduced, tried = [], []

    def add_other(flag):
        reduced.append(flag.item())
        return flag + (tried[-1] > 4)
    monkeypatch.setattr(memory.distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(memory.distributed, 'all_reduce_sum', add_other)
    monkeypatch.setattr(torch.distributed, 'get_backend', lambda: 'gloo')
    fitted = fit_batch_gpu(small_config(batch=16), limited(16, tried=tried), lambda line: None)
    assert fitted.batch_gpu == 4 and reduced == [0.0, 0.0, 0.0]


def test_a_rehearsal_does_not_wait_for_other_processes(monkeypatch):
    run = SmallRun(small_config())
    monkeypatch.setattr(memory.distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(memory.distributed, 'all_reduce_sum', lambda tensor: pytest.fail('communicates'))
    rehearse(run.state, run.phases, run.config)
    assert not any(phase.gradients.is_local for phase in run.phases)
