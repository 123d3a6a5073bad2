# SPDX-License-Identifier: Apache-2.0
"""Captures by torch.cuda.CUDAGraph: what is warmed up where, and what is left of a capture that fails."""
import types

import pytest
import torch
from graph_stand_in import Device, StandIn

from torch_utils import host_draws
from torch_utils.cuda_graphs import Captures, CudaBackend, GraphedFunction

CUDA = torch.device('cuda', 0)


class Cuda:
    """What torch.cuda does with streams, the generator and the allocator around captures, as on a GPU: an end
    that fails leaves all three as they were within.
    """

    def __init__(self):
        self.stream, self.allocates_to, self.released = 'default', None, []
        self.is_capturing = self.generator_waits = self.end_fails = False
        self.offset, self.waits = 7, []

    def graph(self, graph, pool='own', stream='of graph', capture_error_mode='global'):
        assert capture_error_mode == 'thread_local'
        return _Graph(self, pool, stream.name if isinstance(stream, Stream) else stream)

    def rand(self, *size, device):
        if self.generator_waits and not self.is_capturing:
            raise RuntimeError('Offset increment outside graph capture encountered unexpectedly.')
        self.offset += 4
        return torch.zeros(1)

    def end_allocate(self, index, pool):
        if self.allocates_to != pool:
            raise RuntimeError('not currently recording to mempool_id')
        self.allocates_to = None

    def set_stream(self, stream):
        self.stream = stream.name


class _Graph:
    def __init__(self, cuda, pool, stream):
        self.cuda, self.pool, self.stream = cuda, pool, stream

    def __enter__(self):
        self.before, self.cuda.stream = self.cuda.stream, self.stream
        self.cuda.is_capturing = self.cuda.generator_waits = True
        self.cuda.allocates_to = self.pool

    def __exit__(self, *_):
        self.cuda.is_capturing = False
        if self.cuda.end_fails:
            self.cuda.end_fails = False
            raise RuntimeError('capture was invalidated')
        self.cuda.allocates_to, self.cuda.generator_waits, self.cuda.stream = None, False, self.before


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.waits.append((self.name, other.name))

    def __enter__(self):
        self.before, self.cuda.stream = self.cuda.stream, self.name

    def __exit__(self, *_):
        self.cuda.stream = self.before


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    for name, value in {
            'graph': cuda.graph, 'CUDAGraph': lambda: types.SimpleNamespace(replay=None),
            'graph_pool_handle': lambda: 'pool', 'Stream': lambda device: Stream(cuda, 'side'),
            'stream': lambda stream: stream, 'current_stream': lambda device: Stream(cuda, cuda.stream),
            'set_stream': cuda.set_stream, 'get_rng_state': lambda device: cuda.offset,
            'set_rng_state': lambda state, device: setattr(cuda, 'offset', state)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, '_cuda_endAllocateToPool', cuda.end_allocate, raising=False)
    monkeypatch.setattr(
        torch._C, '_cuda_releasePool', lambda index, pool: cuda.released.append(pool), raising=False)
    monkeypatch.setattr(torch, 'rand', cuda.rand)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device=None: torch.empty(size))
    return cuda


def check_as_before(cuda):
    assert (cuda.stream, cuda.allocates_to, cuda.offset, cuda.is_capturing) == ('default', None, 7, False)
    torch.rand(1, device='cuda')  # would raise if the generator still waited


def test_a_capture_that_succeeds_leaves_the_stream(cuda):
    backend = CudaBackend(CUDA)
    assert backend.capture(lambda: cuda.stream)[1] == 'side'
    check_as_before(cuda)
    assert not cuda.released


def test_a_capture_whose_end_fails_leaves_stream_generator_and_allocator_as_they_were(cuda):
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match='invalidated'):
        CudaBackend(CUDA).capture(lambda: torch.rand(1, device='cuda'))
    check_as_before(cuda)
    assert cuda.released == ['pool']


def test_a_function_that_fails_in_a_capture_leaves_everything_as_it_was(cuda):
    def fail():
        torch.rand(1, device='cuda')
        raise RuntimeError('no')
    with pytest.raises(RuntimeError, match='no'):
        CudaBackend(CUDA).capture(fail)
    check_as_before(cuda)
    assert not cuda.released


def test_calls_before_a_capture_run_on_its_stream_and_wait_for_each_other(cuda):
    assert CudaBackend(CUDA).warm_up(lambda: cuda.stream) == 'side'
    assert cuda.stream == 'default' and cuda.waits == [('side', 'default'), ('default', 'side')]


def graphed(function, gpu, lines, **options):
    backend = StandIn(gpu, **options)
    return GraphedFunction(function, Captures(backend, lines.append)), backend


def test_everything_before_a_capture_is_a_warm_up_and_nothing_after_it():
    with Device().running() as gpu:
        run, backend = graphed(lambda x: 2 * x, gpu, [])
        for _ in range(5):
            run(torch.ones(2))
    assert (backend.num_warm_ups, backend.num_captures, backend.num_replays) == (1, 1, 4)


def lines_of(function, num_calls=4, **options):
    """The warnings of a function that is called with the tensor [1, 1]."""
    lines = []
    with Device().running() as gpu:
        run, _ = graphed(function, gpu, lines, **options)
        for _ in range(num_calls):
            run(torch.ones(1, 1, 2, 2))
    return lines


@pytest.mark.parametrize(('function', 'why'), [
    (lambda x: x + torch.tensor([1.0]), 'not permitted'),
    (lambda x: x.sum().item(), 'not permitted'),
    (lambda x: x + host_draws.to_device(torch.empty(1), x.device), 'copy from the host')],
    ids=['literal', 'waiting', 'upload'])
def test_the_stand_in_refuses_what_a_capture_refuses(function, why):
    (line,) = lines_of(function)
    assert why in line


def test_the_stand_in_refuses_a_convolution_that_has_not_run_before():
    calls = []

    def function(x):
        calls.append(x)
        return torch.conv2d(x, x.new_ones(1, 1, 1, min(len(calls), 2)))
    (line,) = lines_of(function)
    assert 'cuDNN would try algorithms' in line


def test_the_stand_in_refuses_what_autograd_keeps_of_an_earlier_stream():
    weight, kept = torch.nn.Parameter(torch.ones(1)), []

    def function(x):
        loss = (weight * x).sum()
        kept.append(loss)
        loss.backward(retain_graph=True)
        return loss.detach()
    (line,) = lines_of(function, parameters=[weight])
    assert 'AccumulateGrad' in line
    kept.clear()


@pytest.mark.gpu
def test_after_a_failed_capture_a_gpu_goes_on_and_captures_again():
    backend, x = CudaBackend(CUDA), torch.ones(3, device=CUDA)

    def work():
        return x + torch.rand(3, device=CUDA)
    state, stream = backend.get_state(), torch.cuda.current_stream(CUDA)
    with pytest.raises(RuntimeError):
        backend.capture(lambda: work().sum().item())
    assert torch.cuda.current_stream(CUDA) == stream and torch.equal(backend.get_state(), state)
    replay, result = backend.capture(work)
    backend.set_state(state)
    replay()
    by_graph = result.clone()
    backend.set_state(state)
    assert torch.equal(by_graph, work())
