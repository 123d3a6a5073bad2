# SPDX-License-Identifier: Apache-2.0
"""Phases as graphs train to the bit as without, on a CPU with a stand-in that freezes what graphs freeze."""
import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from graph_stand_in import Device, StandIn
from small_run import SmallRun, small_config

from dnnlib.util import UserError
from torch_utils import host_draws
from training.accelerate import capture_rounds, changed_by_rounds, fits_twice, use_graphs

# p so high that nearly all kinds of augmentation come up, and moving; all phases due often.
FLAGS = {'aug': 'ada', 'augpipe': 'bgcfnc', 'mirror': False}


def small_run(**flags):
    flags = flags if flags.get('aug') == 'noaug' else {**FLAGS, **flags}
    config = dataclasses.replace(
        small_config(**flags), G_reg_interval=2, D_reg_interval=3, ada_interval=2, ada_kimg=0.1)
    run = SmallRun(config)
    if run.state.augment_pipe is not None:
        run.state.augment_pipe.p.fill_(0.6)
    return run


def train(run, steps, fail_at=None, fail_after=None, graphs=True, make_backend=StandIn, **device):
    """Train on a GPU's stand-in, as graphs or not; returns the backend and the lines of warning."""
    lines = []
    with Device(**device).running() as gpu:
        parameters = [p for module in (run.state.G, run.state.D) for p in module.parameters()]
        backend = make_backend(gpu, fail_at, fail_after, parameters)
        if graphs:
            changes = functools.partial(changed_by_rounds, run.state)
            capture_rounds(run.phases, backend, lines.append, changes)
        for _ in range(steps):
            gpu.seed(run.state.cur_nimg)
            run.step()
    return backend, lines


def tensors(run):
    state = run.state
    named = {f'{name}.{key}': t for name, module in (('G', state.G), ('D', state.D), ('G_ema', state.G_ema))
             for key, t in module.state_dict().items()}
    named |= {f'broken.{p.name}': p.num_broken for p in run.phases}
    pipe_p = {} if state.augment_pipe is None else {'p': state.augment_pipe.p}
    return {**named, **pipe_p, 'pl_mean': state.loss.pl_mean}


def check_same(a, b):
    for name, value in tensors(a).items():
        assert torch.equal(value, tensors(b)[name]), name
    for run in (a, b):
        run.collector.update()
    assert a.collector.as_dict() == b.collector.as_dict()


@pytest.mark.parametrize('flags', [{}, {'batch_gpu': 2}, {'aug': 'noaug'}], ids=['ada', 'rounds', 'noaug'])
def test_training_by_graphs_is_the_same_to_the_bit(flags):
    plain, graphed = small_run(**flags), small_run(**flags)
    train(plain, 9, graphs=False)
    backend, lines = train(graphed, 9)
    check_same(plain, graphed)
    assert lines == [] and backend.num_captures >= 4 and backend.num_replays > 6


def test_the_stand_in_freezes_what_python_decided():
    value, weight = [1.0], torch.zeros(1)
    with Device().running() as gpu:
        replay, _ = StandIn(gpu).capture(lambda: weight.add_(value[0]).add_(torch.rand(1)))
        assert weight == 0
        value[0] = 100.0
        replay()
        first = weight.clone()
        replay()
    assert 1 < first < 2 and 2 < weight < 4 and weight != 2 * first


@pytest.mark.parametrize(('fail_at', 'fail_after'), [(1, 100), (1, None), (2, 40), (2, None)])
def test_a_capture_that_fails_changes_nothing_and_is_told_once(fail_at, fail_after):
    plain, graphed = small_run(), small_run()
    train(plain, 5, graphs=False)
    backend, lines = train(graphed, 5, fail_at, fail_after)
    check_same(plain, graphed)
    assert backend.num_captures == fail_at
    (line,) = lines
    assert 'not permitted when stream is capturing)' in line and '\n' not in line


class Wrong(StandIn):
    """Graphs that work, but give other numbers."""

    def replay(self, calls):
        super().replay([call for call in calls if call[0].overloadpacket.__name__ != 'leaky_relu_backward'])


class Full(StandIn):
    """Graphs for which there is no memory when they run."""

    def replay(self, calls):
        super().replay(calls[:len(calls) // 2])
        raise torch.OutOfMemoryError('full')


@pytest.mark.parametrize(('kind', 'why'), [(Wrong, 'other numbers'), (Full, 'full')])
def test_a_graph_that_does_not_do_the_same_changes_nothing_and_is_told_once(kind, why):
    plain, graphed = small_run(aug='noaug'), small_run(aug='noaug')
    train(plain, 4, graphs=False)
    backend, lines = train(graphed, 4, make_backend=kind)
    check_same(plain, graphed)
    assert backend.num_replays == 1 and len(lines) == 1 and why in lines[0]


def test_a_run_that_goes_on_by_graphs_is_the_same_as_one_in_one_piece():
    whole, first, second = small_run(), small_run(), small_run()
    train(whole, 8)
    train(first, 3)
    second.state.load_state_dict(copy.deepcopy(first.state.state_dict()))
    train(second, 5)
    for name, value in tensors(whole).items():
        if not name.startswith('broken'):
            assert torch.equal(value, tensors(second)[name]), name


def test_what_is_not_finite_is_counted_in_graphs_and_examined_without():
    run = small_run(aug='noaug')
    train(run, 6)
    with torch.no_grad():
        run.state.D.b4.out.weight.fill_(float('nan'))
    phase = run.phase('Dmain')
    train(run, 4, graphs=False)
    assert phase.num_broken == 4
    phase.detector = mock.MagicMock()
    with mock.patch.object(phase, 'graphs') as graphs:
        run.step()
    assert not graphs.called and phase.detector.__enter__.called


@pytest.mark.parametrize('flags', [{}, {'aug': 'noaug'}], ids=['ada', 'noaug'])
def test_the_host_never_waits_within_a_step(flags):
    run = small_run(**flags)
    train(run, 3, graphs=False, allow_waiting=False)


def test_a_step_that_waits_is_noticed():
    run = small_run(aug='noaug')
    run.state.loss.report = lambda name, values: values.mean().item()
    with pytest.raises(RuntimeError, match='would wait'):
        train(run, 1, graphs=False, allow_waiting=False)


def test_p_of_0_augments_nothing_and_draws_the_same():
    states = []
    for p in (0.0, 0.5):
        run = small_run()
        pipe = run.state.augment_pipe
        pipe.p.fill_(p)
        images = torch.rand(4, 3, 8, 8)
        with Device().running():
            torch.manual_seed(3)
            assert torch.equal(pipe(images), images) == (p == 0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_graphs_are_for_gpus_and_say_so():
    run = small_run()
    use_graphs(run.state, run.phases, run.config, torch.device('cpu'), pytest.fail)
    assert all(phase.graphs is None for phase in run.phases)
    with pytest.raises(UserError, match='--cuda-graphs=on conflicts with --device=cpu'):
        small_config(cuda_graphs='on')
    with pytest.raises(UserError, match='no GPU'):
        small_config(cuda_graphs='on', device='auto').for_device('cpu')


def test_auto_keeps_a_reserve_of_memory():
    assert fits_twice(40, 100) and not fits_twice(49, 100)


def test_a_tape_that_is_used_up_is_an_error():
    with host_draws.use(host_draws.Playing([])), pytest.raises(RuntimeError, match='more was drawn'):
        host_draws.take(host_draws.Draw, torch.device('cpu'))
