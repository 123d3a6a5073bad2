# SPDX-License-Identifier: Apache-2.0
"""On a GPU: steps and images by CUDA graphs are the same to the bit, and no step waits for the device."""
import copy
import dataclasses
import importlib.util

import pytest
import torch
from small_networks import small_generator
from small_run import SmallRun, small_config

from training.accelerate import compile_networks, use_graphs
from training.sampling.graphs import by_graphs
from training.sampling.sampler import Sampler
from training.sampling.sources import SeedSource

pytestmark = pytest.mark.gpu
CUDA = torch.device('cuda')
# On CUDA the gradients of grid_sample and of F.pad by reflection add in any order. With these transforms, and
# at this side, every sample lies on a pixel, so that there is nothing but zeros to add; and where
# deterministic algorithms are wanted, images are padded in another way.
SIDE = 32
FLAGS = {'aug': 'ada', 'augpipe': 'blit', 'device': 'cuda', 'mirror': False}


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


def small_run(cuda_graphs='off', **flags):
    flags = {**FLAGS, **flags}
    if flags['aug'] == 'noaug':
        del flags['augpipe']
    config = small_config(SIDE, cuda_graphs=cuda_graphs, **flags).for_device('cuda')
    config = dataclasses.replace(config, G_reg_interval=2, D_reg_interval=3, ada_interval=2, ada_kimg=0.1)
    run = SmallRun(config, CUDA)
    if run.state.augment_pipe is not None:
        run.state.augment_pipe.p.fill_(0.6)
    run.lines = []
    use_graphs(run.state, run.phases, config, CUDA, run.lines.append)
    return run


def num_graphs(run):
    return [phase.graphs._run.num_graphs for phase in run.phases]


def differing(a, b):
    """Names of what is not the same in two runs."""
    pairs = [(f'{name}.{key}', value, getattr(b.state, name).state_dict()[key])
             for name in ('G', 'D', 'G_ema') for key, value in getattr(a.state, name).state_dict().items()]
    pairs.append(('pl_mean', a.state.loss.pl_mean, b.state.loss.pl_mean))
    return [name for name, x, y in pairs if not torch.equal(x, y)]


@pytest.mark.parametrize('flags', [{}, {'batch_gpu': 2}, {'aug': 'noaug', 'precision': 'fp16'}],
                         ids=['ada', 'rounds', 'fp16'])
def test_training_by_graphs_is_the_same_to_the_bit(deterministic, flags):
    plain, graphed = small_run(**flags), small_run('on', **flags)
    for run in (plain, graphed):
        run.step(12)
    assert graphed.lines == [] and min(num_graphs(graphed)) >= 1
    assert differing(plain, graphed) == []


def test_a_run_that_goes_on_by_graphs_is_the_same_as_one_in_one_piece(deterministic):
    whole, first, second = (small_run('on') for _ in range(3))
    whole.step(16)
    first.step(7)
    second.state.load_state_dict(copy.deepcopy(first.state.state_dict()))
    second.step(9)
    assert [run.lines for run in (whole, first, second)] == [[], [], []]
    assert differing(whole, second) == []


@pytest.mark.parametrize('cuda_graphs', ['off', 'on'])
def test_the_host_never_waits_within_a_step(cuda_graphs):
    # ADA reads p when it has moved; fixed, nobody needs to.
    run = small_run(cuda_graphs, aug='fixed', p=0.5)
    run.step(12)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        run.step(6)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert run.lines == []


@pytest.mark.parametrize('noise_mode', ['const', 'random'])
@pytest.mark.parametrize('batch', [1, 4])
def test_images_by_graphs_are_the_same_to_the_bit(deterministic, noise_mode, batch):
    G = small_generator().to(CUDA)
    network = by_graphs(G.synthesis, CUDA, 'auto')
    plain, graphed = Sampler(G, CUDA, noise_mode), Sampler(G, CUDA, noise_mode, synthesis=network)
    for start in range(0, 5 * batch, batch):
        seeds = range(start, start + batch)
        images = [each.images(SeedSource(each, seeds).ws(range(batch)), seeds)
                  for each in (plain, graphed)]
        assert (images[0] == images[1]).all()
    assert network._run.num_graphs == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='torch.compile needs Triton')
def test_compiled_networks_train_the_same_within_rounding():
    plain, other = small_run(aug='noaug'), small_run(aug='noaug')
    compile_networks(other.state.loss)
    for run in (plain, other):
        run.step(2)
    for name, value in plain.state.G.state_dict().items():
        torch.testing.assert_close(other.state.G.state_dict()[name], value, rtol=1e-3, atol=1e-4)
