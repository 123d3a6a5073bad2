# SPDX-License-Identifier: Apache-2.0
"""The profile of a step: nothing is missing, every kernel has its layer, gradients are what they were."""
import collections
import copy
import csv
import io
import json

import pytest
import torch
import torch.nn.functional as F
from small_run import CPU, SmallRun, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import PRESETS, DatasetInfo, resolve
from training.iteration import PhaseClock
from training.profiling import labels
from training.profiling.record import ProfiledRun, micro_config, record_step
from training.profiling.report import COLUMNS, ProfileReport, to_csv, to_json, to_text
from training.profiling.timeline import time_steps, timeline_header, timeline_line, timeline_summary

needs_dcgan = pytest.mark.skipif('dcgan' not in PRESETS, reason='this version has no DCGAN')


@pytest.fixture(scope='module')
def run():
    return ProfiledRun(small_config(16, gamma=0.2, aug='fixed', p=0.5), CPU)


@pytest.fixture(scope='module')
def report(run):
    """Of a small StyleGAN2 with both regularisations."""
    run.state.loss.pl_weight = 2.0
    return ProfileReport(record_step(run))


@pytest.fixture(scope='module')
def dcgan():
    """Of the smallest DCGAN whose arithmetic outweighs Python's share."""
    config = resolve({'cfg': 'dcgan', 'data': 'x', 'outdir': 'x', 'batch': 16, 'device': 'cpu'},
                     DatasetInfo('x', 100, 64, 64, 1))
    return ProfileReport(record_step(ProfiledRun(config, CPU, channels=1)))


def convolutions(report):
    return {row.pop('where'): row for row in report.layer_convolutions()}


def test_every_kernel_has_a_place(report):
    assert len(report.rows) > 500
    assert report.named >= 0.99
    assert all(row['where'] for row in report.rows)


def test_the_time_of_kernels_fits_into_the_step(report):
    assert 0 < report.kernel_us < report.record.step_us
    for key in ('group', 'direction', 'op', 'where', 'phase'):
        assert sum(total.us for total in report.totals(key)) == pytest.approx(report.kernel_us, abs=1)


def test_kernels_are_in_the_order_in_which_they_started(report):
    assert [row['index'] for row in report.rows] == list(range(len(report.rows)))
    starts = [row['start_us'] for row in report.rows]
    assert starts[0] >= 0 and starts == sorted(starts)


def test_every_convolution_is_found_and_none_is_added(run, report):
    """An independent count: what the dispatcher sees in a step without labels and split gradients."""
    with Convolutions() as seen:
        run.step(run.pixels(), PhaseClock(CPU), all_phases=True)
    profiled = collections.Counter()
    for kernel in report.record.kernels:
        c = kernel.convolution
        if c is not None:
            profiled.update((kind, (c.N, c.C, c.H, c.W), (c.R, c.S)) for kind in c.gradients or ['forward']
                            if kind != 'bias')
    assert profiled == seen.counts


class Convolutions(TorchDispatchMode):
    """Counts (forward, data or weight; shape of the input; taps)."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.counts['forward', tuple(args[0].shape), tuple(args[1].shape[2:])] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            for kind, is_wanted in zip(('data', 'weight'), args[10], strict=False):
                self.counts[kind, tuple(args[1].shape), tuple(args[2].shape[2:])] += is_wanted
        return func(*args, **(kwargs or {}))


def test_layers_of_the_own_network_have_no_prefix_and_others_do(report):
    places = {row['where'] for row in report.rows}
    assert {'Gmain:synthesis.b16.conv1', 'Gmain:D.b16.conv0', 'Gmain:mapping.fc0', 'Dmain:b16.conv0',
            'Dmain:G.synthesis.b16.conv1', 'Dreg:b16.conv1', 'Greg:synthesis.b8.conv0'} <= places
    assert {'Gmain:optimiser', 'Dmain:gradients', 'Dmain:augment_pipe', 'update', 'latents'} <= places


def test_each_layer_has_its_forward_and_both_gradients(report):
    found = convolutions(report)
    for level in (4, 8, 16):
        assert found[f'Gmain:synthesis.b{level}.conv1'] == {'forward': 1, 'data': 1, 'weight': 1}
        # Generated without a graph, for D to look at.
        assert found[f'Dmain:G.synthesis.b{level}.conv1'] == {'forward': 1, 'data': 0, 'weight': 0}
    for layer in ('conv0', 'conv1'):
        assert found[f'Gmain:D.b16.{layer}'] == {'forward': 1, 'data': 1, 'weight': 0}
        assert found[f'Dmain:b16.{layer}'] == {'forward': 1, 'data': 1, 'weight': 1}


def test_a_pointwise_layer_has_its_products_of_matrices(report):
    for where, gradients in (('Gmain:D.b16.skip', 1), ('Dmain:b16.skip', 2)):
        products = [row['direction'] for row in report.rows
                    if row['where'] == where and row['group'] == 'matrix product']
        assert sorted(products) == ['bprop'] * gradients + ['fprop']


def test_gradients_of_gradients_find_their_layer(report):
    for phase, layer in (('Dreg', 'b16.conv0'), ('Greg', 'synthesis.b16.conv1')):
        rows = [row for row in report.rows if row['where'] == f'{phase}:{layer}']
        # More than the one data gradient and weight gradient of a single backward pass.
        assert sum('N' in row and row['direction'] == 'bprop' for row in rows) > 2


def test_parameters_of_a_convolution_are_those_of_its_layer(run, report):
    conv = run.state.D.b16.conv0
    row = next(row for row in report.rows if row['where'] == 'Dmain:b16.conv0' and 'N' in row)
    expected = {'N': 8, 'C': conv.weight.shape[1], 'H': 16, 'W': 16, 'K': conv.weight.shape[0], 'P': 16,
                'Q': 16, 'R': 3, 'S': 3, 'padding': '1x1', 'stride': '1x1'}
    assert {name: row[name] for name in expected} == expected
    assert row['flop'] == 2 * 8 * row['C'] * row['K'] * 9 * 16 * 16
    assert 0 < row['share_of_peak'] and row['direction'] == 'fprop'


def test_kinds_of_work_are_told_apart(report):
    groups = {total.name for total in report.totals('group')}
    assert {'convolution', 'elementwise', 'memory copy', 'optimiser', 'resampling filter',
            'matrix product'} <= groups
    filters = [row for row in report.rows if row['group'] == 'resampling filter']
    assert all('upfirdn2d' in row['own_op'] or 'filtered' in row['own_op'] for row in filters)
    assert {row['direction'] for row in report.rows} == {'input', 'fprop', 'bprop', 'optimiser'}


def test_phases_are_weighed_by_how_often_they_run(report):
    rows = {row['name']: row for row in report.phase_totals()}
    assert rows['Gmain']['every'] == 1 and rows['Dreg']['every'] == 16
    assert rows['Dreg']['us_per_iteration'] == pytest.approx(rows['Dreg']['us'] / 16)


def test_the_text_shows_all_kernels_or_the_slowest(report):
    text = to_text(report, 'Heading')
    assert text.startswith('Heading\n') and f'Kernels: {len(report.rows)}\n' in text
    assert text.count('aten::') > len(report.rows)
    short = to_text(report, 'Heading', 3)
    assert 'the 3 slowest shown' in short and len(short.splitlines()) < len(text.splitlines()) - 400
    slowest = max(report.rows, key=lambda row: row['us'])
    assert f'{slowest["us"]:.1f}' in short
    assert 'By phase' in to_text(report, 'Heading', 0)


def test_csv_and_json_hold_every_kernel(report):
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(lines) == len(report.rows) and tuple(lines[0]) == COLUMNS
    data = json.loads(to_json(report, {'device': 'test'}))
    assert len(data['kernels']) == len(lines) and data['environment'] == {'device': 'test'}
    assert [k['where'] for k in data['kernels']] == [line['where'] for line in lines]
    assert set(data['totals']) == {'phase', 'group', 'direction', 'op', 'where'}


def test_profiling_leaves_networks_phases_and_operators_as_they_were():
    run = ProfiledRun(small_config(8), CPU)
    losses = [phase.losses for phase in run.phases]
    record_step(run)
    assert [phase.losses for phase in run.phases] == losses
    modules = [*run.state.G.modules(), *run.state.D.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any('run' in vars(op) for op in labels.OPS.values())


def test_a_labelled_step_computes_what_an_ordinary_step_computes():
    runs = []
    for is_labelled in (False, True):
        run = SmallRun(small_config(16, gamma=0.2))
        run.state.loss.pl_weight = 2.0
        modules = {'G': run.state.G, 'D': run.state.D}
        with labels.labelled(modules if is_labelled else {}, run.phases if is_labelled else []):
            run.step(2)
        runs.append(run.state)
    plain, labelled = [dict(state.G.named_parameters()) | dict(state.D.named_parameters()) for state in runs]
    for name, value in plain.items():
        # Sums of gradients may be formed in another order.
        torch.testing.assert_close(labelled[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize('convolve, weight_shape, options', [
    (F.conv2d, [4, 3, 3, 3], {'padding': 1, 'stride': 2}),
    (F.conv2d, [6, 1, 3, 2], {'groups': 3, 'dilation': (1, 2)}),
    (F.conv_transpose2d, [3, 4, 3, 3], {'stride': 2, 'output_padding': 1}),
    (F.conv_transpose2d, [3, 2, 3, 3], {'groups': 3, 'padding': (1, 0)}),
])
def test_split_convolutions_have_the_same_gradients_of_any_order(convolve, weight_shape, options):
    torch.manual_seed(0)
    x, weight = torch.randn([2, 3, 7, 6]).double(), torch.randn(weight_shape).double()
    channels = convolve(x, weight, **options).shape[1]
    bias = torch.randn([channels]).double()

    def gradients():
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = convolve(*inputs, **options)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return y, *first, *second
    expected = gradients()
    with labels.SplitConvolutions():
        for a, b in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_split_convolutions_compute_only_the_gradient_that_is_asked_for():
    x, weight = torch.randn([1, 2, 5, 5], requires_grad=True), torch.randn([2, 2, 3, 3], requires_grad=True)
    with labels.SplitConvolutions(), Convolutions() as seen:
        torch.autograd.grad(F.conv2d(x, weight).sum(), x)
    assert {kind for (kind, *_), count in seen.counts.items() if count} == {'forward', 'data'}


def test_split_convolutions_leave_named_paddings_alone():
    x, weight = torch.randn([1, 2, 5, 5]), torch.randn([2, 2, 3, 3], requires_grad=True)
    with labels.SplitConvolutions():
        assert F.conv2d(x, weight, padding='same').shape == x.shape


def test_the_micro_network_is_profiled_like_any_other():
    run = ProfiledRun(micro_config({'batch': 2, 'cbase': 64, 'cmax': 4, 'device': 'cpu'}), CPU, is_micro=True)
    report = ProfileReport(record_step(run))
    assert report.named >= 0.99
    found = convolutions(report)
    for layer in ('conv0', 'conv1', 'conv2', 'torgb'):
        forward_only = {'forward': 1, 'data': 0, 'weight': 0}
        assert found[f'Dmain:G.synthesis.{layer}'] == forward_only
        assert found[f'Gmain:synthesis.{layer}'] == {'forward': 1, 'data': 1, 'weight': 1}


@needs_dcgan
def test_the_profile_of_dcgan_accounts_for_the_step_and_names_its_layers(dcgan):
    # With the preset's batch it is more, but that step takes seconds (docs/profiling.md).
    assert dcgan.accounted >= 0.85, f'{dcgan.accounted:.1%}'
    assert dcgan.named >= 0.95
    assert {'Part1:Real:D:Conv2', 'Part1:Fake:G:Conv1', 'Part1:Fake:D:BN3', 'Part2:Fake:G:ReLU1',
            'Part2:Fake:G:Tanh5', 'Part1:optimiser'} <= {row['where'] for row in dcgan.rows}


@needs_dcgan
def test_each_convolution_of_dcgan_has_its_three_kernels_where_they_are_needed(dcgan):
    found = convolutions(dcgan)
    assert len(found) == 5 * 5
    for i in range(1, 6):
        # Neither images nor latents need gradients; G makes the fakes of Part1 without a graph.
        inner = int(i > 1)
        for part in ('Real', 'Fake'):
            assert found[f'Part1:{part}:D:Conv{i}'] == {'forward': 1, 'data': inner, 'weight': 1}
        assert found[f'Part1:Fake:G:Conv{i}'] == {'forward': 1, 'data': 0, 'weight': 0}
        assert found[f'Part2:Fake:G:Conv{i}'] == {'forward': 1, 'data': inner, 'weight': 1}
        assert found[f'Part2:Fake:D:Conv{i}'] == {'forward': 1, 'data': 1, 'weight': 0}


def test_the_timeline_adds_up_and_moves_the_run_forward():
    run = ProfiledRun(small_config(8), CPU)
    before = copy.deepcopy(run.state.G.state_dict())
    steps = list(time_steps(run, 3))
    assert run.state.batch_idx == 3 and run.state.cur_nimg == 12
    assert any(not torch.equal(v, before[k]) for k, v in run.state.G.state_dict().items())
    for step in steps:
        assert min(step.h2d, step.kern, step.d2h) > 0
        assert step.total == pytest.approx(step.h2d + step.kern + step.d2h, rel=1e-3)
        assert step.kern > step.h2d
    assert not run.state.G.synthesis._forward_hooks


def test_the_lines_of_the_timeline_have_the_known_form():
    run = ProfiledRun(small_config(8, glr=0.25), CPU)
    (step,) = time_steps(run, 1)
    assert ' '.join(timeline_line(0, step).split()) == (
        f'Iter 0 | H2D {step.h2d:.3f} ms | Kern {step.kern:.3f} ms | D2H {step.d2h:.3f} ms | '
        f'Tot {step.total:.3f} ms')
    header = timeline_header(run, 'demo', 7, 'some device')
    for part in ('resolution 8x8', 'batch 4', 'steps 7', 'learning rates G 0.25, D 0.006', 'some device'):
        assert part in header
    assert timeline_summary([step]).startswith('Median |')
