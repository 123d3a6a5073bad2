# SPDX-License-Identifier: Apache-2.0
"""The count of what an iteration moves: exact on small modules, and within budgets by default."""
import json
from dataclasses import dataclass

import pytest
import torch
from benchmark_programs import benchmark_module, run_benchmark

from torch_utils.ops import upfirdn2d
from torch_utils.ops._registry import Op
from torch_utils.ops.bias_act import bias_act
from training.config import DatasetInfo, resolve


@pytest.fixture(scope='module')
def traffic():
    with benchmark_module('traffic') as module:
        yield module


@pytest.fixture(scope='module')
def recorder():
    with benchmark_module('traffic_count') as module:
        yield module.Recorder


@dataclass(frozen=True)
class Budget:
    """Of an iteration: GB of everything but dense convolutions, and operations; and what they are to become.

    The augmentation is that of a run whose p is 0.5.
    """

    resolution: int
    aug: str
    gigabytes: float
    calls: int
    goal_gigabytes: float
    goal_calls: int | None


BUDGETS = [
    Budget(256, 'noaug', 27.5, 1560, goal_gigabytes=24, goal_calls=1600),
    Budget(1024, 'noaug', 54.8, 1900, goal_gigabytes=48, goal_calls=1900),
    Budget(256, 'ada', 28.7, 1620, goal_gigabytes=25.5, goal_calls=None),
    Budget(1024, 'ada', 59.7, 1960, goal_gigabytes=54, goal_calls=None),
]


@pytest.mark.parametrize('budget', BUDGETS, ids=lambda b: f'{b.resolution}-{b.aug}')
def test_an_iteration_stays_within_its_budget(traffic, budget):
    info = DatasetInfo('random', 10000, budget.resolution, budget.resolution, 3)
    config = resolve({'outdir': 'unused', 'data': 'random', 'aug': budget.aug}, info)
    assert config.batch_size == {256: 16, 1024: 4}[budget.resolution]
    calls = traffic.count(config)
    rows = traffic.rows_of(calls, traffic.machine_for(config, 1, 1, 1, 1, 1))
    gigabytes = sum(row['bytes'] for row in rows if not traffic.is_convolution(row)) / 1e9
    number = sum(row['calls'] for row in rows)
    # Far below, the budget has become a rule without force and is to be tightened.
    assert 0.9 * budget.gigabytes <= gigabytes <= budget.gigabytes
    assert 0.9 * budget.calls <= number <= budget.calls


class Tiny(torch.nn.Module):
    """A convolution 3 -> 5 of 3x3, bias and activation."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bias = torch.nn.Parameter(torch.zeros([5]))

    def forward(self, x):
        return bias_act(self.conv(x), self.bias, act='lrelu')


X, W, Y, B = 2 * 3 * 8 * 8 * 4, 5 * 3 * 9 * 4, 2 * 5 * 8 * 8 * 4, 5 * 4  # bytes
CONV_FLOP = 2 * (2 * 8 * 8) * (5 * 3 * 9)


def tiny():
    with torch.device('meta'):
        return Tiny(), torch.empty([2, 3, 8, 8], requires_grad=True)


def counted(rec):
    """{(way, layer, op): [(calls, bytes, flop)]}, in the order of counting."""
    found = {}
    for call, number in rec.calls.items():
        found.setdefault((call.way, call.layer, call.op), []).append((number, call.bytes, call.flop))
    return found


def test_a_forward_pass_is_counted_to_the_byte(recorder):
    net, x = tiny()
    with recorder({'net': net}) as rec, torch.no_grad():
        net(x)
    assert counted(rec) == {
        ('forward', 'net.conv', 'convolution forward'): [(1, X + W + Y, CONV_FLOP)],
        ('forward', 'net', 'bias_act'): [(1, Y + B + Y, 0)]}


def test_a_backward_pass_belongs_to_the_layers_of_the_forward_pass(recorder):
    net, x = tiny()
    with recorder({'net': net}) as rec:
        y = net(x)
        rec.calls.clear()
        torch.autograd.grad(y, [x, *net.parameters()], torch.empty_like(y))
    assert counted(rec) == {
        ('backward', 'net', 'bias_act_grad_both'): [(1, 3 * Y + B, 0)],
        ('backward', 'net.conv', 'convolution to input'): [(1, X + W + Y, CONV_FLOP)],
        ('backward', 'net.conv', 'convolution to weight'): [(1, X + W + Y, CONV_FLOP)]}


def test_a_second_derivative_is_counted_too(recorder):
    net, x = tiny()
    with recorder({'net': net}) as rec:
        (dx,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        rec.calls.clear()
        torch.autograd.grad(dx, net.conv.weight, torch.empty_like(dx))
    found = counted(rec)
    kinds = {layer for (way, layer, op) in found if op.startswith('convolution')}
    assert kinds == {'net.conv'} and all(way == 'backward' for way, _, _ in found)
    flops = [flop for rows in found.values() for (_, _, flop) in rows if flop]
    assert set(flops) == {CONV_FLOP}


def test_each_phase_counts_by_its_share(recorder):
    net, x = tiny()
    with recorder({'net': net}) as rec, torch.no_grad():
        with rec.within('often', 1):
            net(x)
        with rec.within('rarely', 0.25):
            net(x)
            net(x)
    shares = {(call.phase, call.op): number for call, number in rec.calls.items()}
    assert shares['often', 'bias_act'] == 1 and shares['rarely', 'bias_act'] == 0.5


def test_operators_of_ours_are_one_pass_over_arguments_and_results(recorder):
    x, f = torch.empty([2, 3, 8, 8], device='meta'), torch.empty([4, 4], device='meta')
    before = Op.run
    with recorder({}) as rec:
        upfirdn2d.upsample2d(x, f)
    assert counted(rec) == {('forward', 'step', 'upfirdn2d'): [(1, X + 4 * X + 4 * 16, 0)]}
    assert Op.run is before


def test_a_step_without_results_moves_what_it_changes(recorder):
    a, b = [[torch.empty([10], device='meta'), torch.empty([6], device='meta')] for _ in range(2)]
    with recorder({}) as rec:
        torch._foreach_lerp_(a, b, 0.5)
        a[0].copy_(b[0])
    assert counted(rec) == {('forward', 'step', '_foreach_lerp_'): [(1, 3 * 16 * 4, 0)],
                            ('forward', 'step', 'copy_'): [(1, 2 * 10 * 4, 0)]}


def test_views_are_free_and_expanded_tensors_as_large_as_their_memory(recorder):
    x, row = torch.empty([4, 6], device='meta'), torch.empty([6], device='meta')
    with recorder({}) as rec:
        x.view(24).reshape(2, 12)[0].detach()
        torch.empty_like(x)
        torch.zeros([3]).add(1)  # not on the device
        x + row.expand(4, 6)
        x @ torch.empty([6, 5], device='meta')
    assert counted(rec) == {('forward', 'step', 'add'): [(1, 4 * (24 + 6 + 24), 0)],
                            ('forward', 'step', 'mm'): [(1, 4 * (24 + 30 + 20), 2 * 4 * 6 * 5)]}


def test_transposed_and_depthwise_convolutions_have_the_work_of_their_geometry(recorder):
    x = torch.empty([2, 4, 8, 8], device='meta', dtype=torch.float16)
    weight, depthwise = (torch.empty(shape, device='meta', dtype=torch.float16)
                         for shape in ([4, 5, 3, 3], [4, 1, 3, 3]))
    with recorder({}) as rec:
        torch.conv_transpose2d(x, weight, stride=2)
        torch.conv2d(x, depthwise, groups=4, padding=1)
    flops = {call.kind: call.flop for call in rec.calls}
    assert flops == {'convolution fp16': 2 * 2 * 64 * 4 * 5 * 9, 'depthwise fp16': 2 * 2 * 64 * 4 * 9}


def test_convolutions_and_their_gradients_keep_the_channels_last(recorder):
    x = torch.empty([2, 4, 8, 8], device='meta').to(memory_format=torch.channels_last).requires_grad_()
    with recorder({}):
        y = torch.conv2d(x, torch.empty([5, 4, 3, 3], device='meta'))
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))


def test_the_slowest_of_memory_arithmetic_and_launch_is_the_time(traffic):
    machine = traffic.Machine(bandwidth=10.0, convolution={'fp16': 100.0}, plain=1.0, launch=2.0)
    with benchmark_module('traffic_count') as module:
        calls = [module.Call('Gmain', 'forward', 'G', kind, 'op', 'fp16', *work)
                 for kind, *work in (('convolution fp16', 50, 900), ('add', 50, 0), ('add', 5, 0))]
    assert [machine.seconds(call) for call in calls] == [9.0, 5.0, 2.0]


def test_counts_are_written_and_compared(tmp_path):
    small = ('--resolution=16', '--cbase=64', '--cmax=8', '--batch=4', '--top=3')
    for name, more in (('old', ('--aug=noaug',)), ('new', ('--aug=ada', '--nhwc=1', '--augpipe=bgcfnc'))):
        done = run_benchmark('traffic', *small, *more, f'--json={tmp_path / name}')
        assert done.returncode == 0, done.stderr
        assert 's/kimg' in done.stdout and 'Assumed' in done.stdout
    rows = json.loads((tmp_path / 'new').read_text())['rows']
    assert {row['phase'] for row in rows} == {'Gmain', 'Greg', 'Dmain', 'Dreg', 'optimizer, EMA'}
    done = run_benchmark('traffic', '--compare', str(tmp_path / 'old'), str(tmp_path / 'new'))
    lines = {line.split('  ')[0]: line.split() for line in done.stdout.splitlines()}
    assert lines['warp'][1] == '0' and float(lines['warp'][2]) > 0 and 'all' in lines


def test_a_misspelt_option_is_one_line():
    done = run_benchmark('traffic', '--resolutoin=16')
    assert done.returncode == 2 and '--resolutoin=16' in done.stderr and 'Traceback' not in done.stderr
