# SPDX-License-Identifier: Apache-2.0
"""Images by graphs are the same to the bit, on a CPU with a stand-in that freezes what graphs freeze."""
import numpy as np
import pytest
import torch
from graph_stand_in import Device, StandIn
from small_networks import small_generator

from metrics.metric_utils import MetricOptions, generated_block
from training.sampling.graphs import GraphedNetwork, by_graphs
from training.sampling.sampler import Sampler
from training.sampling.sources import SeedSource

CPU = torch.device('cpu')


@pytest.fixture
def gpu():
    with Device().running() as device:
        yield device


def check_same(gpu, network, module, count=5, **options):
    """Call both with the same styles and the same random numbers."""
    with torch.no_grad():
        for seed in range(count):
            ws = torch.randn([2, module.num_ws, module.w_dim])
            gpu.seed(seed)
            expected = module(ws, **options)
            gpu.seed(seed)
            assert torch.equal(network(ws, **options), expected)


@pytest.mark.parametrize('noise_mode', ['const', 'random'])
def test_images_by_graphs_are_the_same_to_the_bit(gpu, noise_mode):
    backend, module = StandIn(gpu), small_generator().synthesis
    check_same(gpu, GraphedNetwork(module, backend, pytest.fail), module, noise_mode=noise_mode)
    assert (backend.num_captures, backend.num_replays) == (1, 4)


def test_other_options_and_batches_have_graphs_of_their_own(gpu):
    backend, module = StandIn(gpu), small_generator().synthesis
    network = GraphedNetwork(module, backend, pytest.fail)
    for options in ({'noise_mode': 'const'}, {'noise_mode': 'none'}, {'noise_mode': 'const'}):
        check_same(gpu, network, module, 3, **options)
    assert backend.num_captures == 2
    with torch.no_grad():
        assert len(network(torch.randn([1, module.num_ws, module.w_dim]), noise_mode='none')) == 1


def test_weights_that_change_in_place_are_followed_and_other_buffers_are_another_kind(gpu):
    backend, module = StandIn(gpu), small_generator().synthesis
    network = GraphedNetwork(module, backend, pytest.fail)
    check_same(gpu, network, module, 4, noise_mode='const')
    with torch.no_grad():
        module.b8.conv1.weight.mul_(-2)
    check_same(gpu, network, module, 2, noise_mode='const')
    assert backend.num_captures == 1
    module.b8.conv1.noise_const = torch.randn(8, 8)
    check_same(gpu, network, module, 4, noise_mode='const')
    assert backend.num_captures == 2


def test_a_capture_that_fails_costs_a_warning(gpu):
    lines, module = [], small_generator().synthesis
    backend = StandIn(gpu, fail_at=1)
    check_same(gpu, GraphedNetwork(module, backend, lines.append), module, noise_mode='random')
    assert backend.num_captures == 1 and backend.num_replays == 0
    (line,) = lines
    assert 'continuing without them' in line and '--cuda-graphs=off' in line


def test_memory_that_graphs_hold_is_given_back_when_it_is_needed(gpu):
    lines, module, shortage = [], small_generator().synthesis, []
    network = GraphedNetwork(module, StandIn(gpu), lines.append)
    check_same(gpu, network, module, noise_mode='random')
    plain = module.forward

    def forward(*args, **options):
        torch.randn(3)  # what is drawn before memory runs out must not count
        if shortage:
            raise torch.OutOfMemoryError(shortage.pop())
        return plain(*args, **options)
    with torch.no_grad():
        module.forward = forward
        ws = torch.randn([5, module.num_ws, module.w_dim])
        gpu.seed(1)
        expected = module(ws)
        shortage.append('full')
        gpu.seed(1)
        assert torch.equal(network(ws), expected) and len(lines) == 1
        shortage.append('full')
        with pytest.raises(torch.OutOfMemoryError):
            network(ws)


def test_gradients_go_past_graphs(gpu):
    backend, module = StandIn(gpu), small_generator().synthesis
    network = GraphedNetwork(module, backend, pytest.fail)
    for _ in range(4):
        ws = torch.randn([1, module.num_ws, module.w_dim], requires_grad=True)
        assert torch.autograd.grad(network(ws, noise_mode='const').sum(), ws)[0].any()
    assert backend.num_captures == 0


@pytest.mark.parametrize('noise_mode', ['const', 'random'])
def test_a_sampler_makes_the_same_images_by_graphs(noise_mode):
    G = small_generator()
    plain = Sampler(G, CPU, noise_mode)
    ws = SeedSource(plain, range(4)).ws(range(4))
    expected = np.concatenate([plain.images(ws[i:i + 1], [i]) for i in range(4)])
    # The sampler seeds all devices; the stand-in has to be told.
    with Device() as gpu:
        backend = StandIn(gpu)
        graphed = Sampler(G, CPU, noise_mode, synthesis=GraphedNetwork(G.synthesis, backend, pytest.fail))
        actual = []
        for i in range(4):
            torch.manual_seed(i)
            gpu.state = torch.get_rng_state()
            actual.append(graphed.images(ws[i:i + 1], [i]))
    assert np.array_equal(np.concatenate(actual), expected) and backend.num_replays == 3


class Unlabelled:
    label_dim = 0

    def __len__(self):
        return 9

    def get_label(self, index):
        return np.zeros([0], dtype=np.float32)


def test_metrics_see_the_same_images_by_graphs(gpu):
    G, backend = small_generator(), StandIn(gpu)
    plain, graphed = (MetricOptions(G, Unlabelled(), CPU) for _ in range(2))
    graphed.generate = GraphedNetwork(G, backend, pytest.fail)
    for start in range(0, 20, 4):
        images = []
        for options in (plain, graphed):
            gpu.seed(start)
            images.append(generated_block(options, range(start, start + 4)))
        assert torch.equal(*images)
    assert backend.num_replays == 4


def test_a_cpu_and_a_user_who_says_off_have_no_graphs():
    G = small_generator()
    assert by_graphs(G, CPU, 'auto') is G and by_graphs(G, torch.device('cuda'), 'off') is G
    assert MetricOptions(G, Unlabelled(), CPU).generate is G
