# SPDX-License-Identifier: Apache-2.0
"""--compile: the same training within rounding, hooks and second derivatives as ever, one line on failure."""
import multiprocessing
import shutil

import pytest
import torch
from small_run import SmallRun, small_config

from dnnlib.util import UserError
from training import accelerate
from training.accelerate import CompiledNetwork
from training.capacity import memory
from training.guards import AnomalyDetector
from training.loss import MicroBatch
from training.networks import Conv2dLayer, SynthesisLayer

# What the default compiler makes, in the least time.
QUICK = {'options': {**accelerate.OPTIONS, 'cpp.simdlen': 1, 'aot_inductor.debug_compile': True}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting(module, *args, **kwargs):
    """A compiled network that counts its calls, without a compiler."""
    network = CompiledNetwork(module, backend='eager', options=None)
    inner, network.num_calls = network._compiled, 0

    def call(*args):
        network.num_calls += 1
        return inner(*args)
    network._compiled = call
    return network


def test_only_losses_without_second_derivatives_are_compiled_and_training_is_the_same():
    plain, run = (SmallRun(small_config(aug='noaug')) for _ in range(2))
    loss = run.state.loss
    loss.compiled = {name: counting(module) for name, module in loss.differentiated_once().items()}
    calls = {}
    for same, phase in zip(plain.phases, run.phases, strict=True):
        before = {name: network.num_calls for name, network in loss.compiled.items()}
        for each in (same, phase):
            torch.manual_seed(4)
            each.run([micro_batch(run)])
        after = {name: network.num_calls for name, network in loss.compiled.items()}
        calls[phase.name] = {name: count - before[name] for name, count in after.items()}
    assert calls == {'Gmain': {'synthesis': 1, 'D': 1}, 'Greg': {'synthesis': 0, 'D': 0},
                     'Dmain': {'synthesis': 1, 'D': 1}, 'Dreg': {'synthesis': 0, 'D': 0}}
    for module, expected in ((run.state.G, plain.state.G), (run.state.D, plain.state.D)):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def micro_batch(run):
    n, G = run.config.batch_size, run.state.G
    c = torch.zeros([n, 0])
    return MicroBatch(torch.rand([n, 3, 8, 8]) * 2 - 1, c, torch.randn([n, G.z_dim]), c)


def test_a_detector_sees_every_layer():
    run, found = SmallRun(small_config(aug='noaug')), []
    loss, phase = run.state.loss, run.phase('Dmain')
    loss.compiled = {name: counting(module) for name, module in loss.differentiated_once().items()}
    with torch.no_grad():
        run.state.D.b4.out.weight.fill_(float('nan'))
    phase.detector = AnomalyDetector(phase, {'G': run.state.G, 'D': run.state.D}, {}, found.append)
    phase.run([micro_batch(run)])
    assert [finding.where for finding in found] == ['D.b4.out.weight']
    assert all(network.num_calls == 0 for network in loss.compiled.values())


def broken_backend(_graph, _inputs):
    raise OSError('no compiler\nanywhere')


def test_what_cannot_be_compiled_is_one_line():
    network = CompiledNetwork(Conv2dLayer(2, 2, 1), backend=broken_backend, options=None)
    with pytest.raises(UserError, match=r'--compile=1: torch.compile fails here \(no compiler\);') as caught:
        network(torch.zeros(1, 2, 4, 4))
    assert '\n' not in str(caught.value)


def test_memory_that_runs_out_is_told_as_such():
    def full(_graph, _inputs):
        raise torch.OutOfMemoryError('full')
    network = CompiledNetwork(Conv2dLayer(2, 2, 1), backend=full, options=None)
    with pytest.raises(torch.OutOfMemoryError):
        network(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize('cfg, names', [('demo', {'synthesis', 'D'}), ('dcgan', {'G', 'D'})])
def test_the_start_compiles_what_the_option_says(cfg, names):
    for flag in (False, True):
        side = {'side': 64, 'cbase': None, 'cmax': None} if cfg == 'dcgan' else {}
        run = SmallRun(small_config(cfg=cfg, compile=flag, aug='noaug', **side))
        memory.compile_kernels(run.state, run.phases, run.config, torch.device('cpu'))
        assert set(run.state.loss.compiled) == (names if flag else set())


def test_graphs_and_the_compiler_exclude_each_other():
    with pytest.raises(UserError, match='--cuda-graphs=on conflicts with --compile=1'):
        small_config(cuda_graphs='on', compile=True, device='auto')


class Layers(torch.nn.Module):
    """A layer of G that enlarges, and one of D that shrinks: all operators of training."""

    def __init__(self):
        super().__init__()
        self.up = SynthesisLayer(3, 4, w_dim=5, resolution=8, up=2)
        self.down = Conv2dLayer(4, 2, 3, activation='lrelu', down=2, conv_clamp=1.0)
        torch.nn.init.ones_(self.up.noise_strength)

    def forward(self, x, w):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.down(self.up(x, w, fused_modconv=False))


def compare():
    """Fail unless a compiled module gives the same numbers and gradients."""
    module, x, w = Layers(), torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5)
    results = []
    for call in (module, CompiledNetwork(module, **QUICK)):
        torch.manual_seed(1)
        y = call(x, w)
        # A mean spreads one number over an image: strides of 0 reach the operators.
        results.append([y, *torch.autograd.grad(y.square().mean(), [x, *module.parameters()])])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which('c++') is None and shutil.which('g++') is None, reason='no C++ compiler')
def test_the_default_compiler_gives_the_same_images_and_gradients():
    # Setuptools, which the compiler imports, minds what else a process has imported.
    process = multiprocessing.get_context('spawn').Process(target=compare)
    process.start()
    process.join()
    assert process.exitcode == 0
