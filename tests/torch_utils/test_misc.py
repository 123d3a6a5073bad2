# SPDX-License-Identifier: Apache-2.0
"""torch_utils.misc: constants, shape checks, copying by name, summary tables."""
import itertools
import re
import types
import warnings

import numpy as np
import pytest
import torch
from golden_cases import cases, index

from dnnlib.util import UserError
from torch_utils import misc
from training import networks


def test_constants_are_shared_per_value_shape_type_and_device():
    a = misc.constant([1, 2, 3])
    assert a is misc.constant([1, 2, 3]) and a.dtype == torch.float32
    assert a is not misc.constant([1, 2, 3], dtype=torch.float64)
    assert misc.constant(np.float32(2), shape=[2, 3]).tolist() == [[2, 2, 2]] * 2
    assert misc.constant(1, dtype=torch.int64) is not misc.constant(1.0, dtype=torch.int64)
    assert misc.constant([1, 2], shape=(2, 2), device='cpu').is_contiguous()
    assert misc.constant([2, 1]).tolist() == [2, 1]


def test_constants_take_a_memory_format():
    x = misc.constant(1, shape=[1, 2, 3, 3], memory_format=torch.channels_last)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_constant_made_in_inference_mode_takes_part_in_training():
    with torch.inference_mode():
        value = misc.constant([123.0, 4.0])
    x = torch.ones(2, requires_grad=True)
    (x * value).sum().backward()
    assert x.grad.tolist() == [123, 4]


def test_the_cache_of_constants_is_bounded(monkeypatch):
    monkeypatch.setattr(misc, '_constants', {})
    monkeypatch.setattr(misc, 'MAX_CONSTANTS', 2)
    assert [misc.constant(i).item() for i in range(4)] == [0, 1, 2, 3]
    assert len(misc._constants) == 2


def test_fake_tensors_of_tracers_are_not_kept():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode():
        misc.constant([77.0])
    assert type(misc.constant([77.0])) is torch.Tensor


@pytest.mark.parametrize(('allow_tf32', 'convolutions', 'products'), [
    (None, True, False), (True, True, True), (False, False, False)])
def test_tf32_is_for_convolutions_unless_asked_otherwise(monkeypatch, allow_tf32, convolutions, products):
    # The switch of products cannot be deleted, as monkeypatch would.
    monkeypatch.setattr(torch.backends.cuda, 'matmul', types.SimpleNamespace(allow_tf32=None))
    for name in ('benchmark', 'allow_tf32'):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    misc.set_gpu_arithmetic(cudnn_benchmark=True, allow_tf32=allow_tf32)
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 is convolutions
    assert torch.backends.cuda.matmul.allow_tf32 is products


def test_shapes_are_checked_dimension_by_dimension():
    misc.assert_shape(torch.zeros(2, 3), [None, 3])
    with pytest.raises(AssertionError, match='dimension 1: expected 4, got 3'):
        misc.assert_shape(torch.zeros(2, 3), [None, 4])
    with pytest.raises(AssertionError, match='number of dimensions'):
        misc.assert_shape(torch.zeros(2, 3), [2])


def test_tracer_warnings_are_hidden_and_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with misc.suppress_tracer_warnings():
            warnings.warn('traced', torch.jit.TracerWarning, stacklevel=1)
            warnings.warn('other', UserWarning, stacklevel=1)
        warnings.warn('later', torch.jit.TracerWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ['other', 'later']


def test_profiled_functions_keep_name_and_result_and_appear_in_profiles():
    @misc.profiled_function
    def add_one(x, by=1):
        """Doc."""
        return x + by
    assert add_one.__name__ == 'add_one' and add_one.__doc__ == 'Doc.'
    with torch.profiler.profile() as profile:
        assert add_one(torch.tensor(2), by=3) == 5
    assert 'add_one' in {event.key for event in profile.key_averages()}


def numbers(values):
    return torch.tensor([float(v) for v in values])


@pytest.mark.parametrize('case', [v for k, v in index('ema_ada').items() if k == 'gradient_cleanup'])
def test_golden_gradients_are_cleaned_up(case):
    x = numbers(case['input'])
    assert misc.nan_to_num(x, nan=0, posinf=1e5, neginf=-1e5, out=x) is x
    assert torch.equal(x, numbers(case['output']))


@pytest.mark.parametrize('case', cases('loop_misc', 'sampler'))
def test_golden_orders_of_the_published_sampler(case):
    settings = {k: case[k] for k in ('rank', 'num_replicas', 'shuffle', 'seed', 'window_size') if k in case}
    sampler = misc.InfiniteSampler(range(case['dataset_size']), **settings)
    assert list(itertools.islice(sampler, len(case['first']))) == case['first']


def test_sampler_processes_share_one_order_and_start_anew_each_time():
    def head(num, *args):
        return list(itertools.islice(misc.InfiniteSampler(range(7), *args), num))
    assert head(12) == head(12)
    together = head(12, 0, 1, True, 3)
    assert [head(6, rank, 2, True, 3) for rank in (0, 1)] == [together[::2], together[1::2]]
    assert head(9, 0, 1, False) == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert sorted(head(14, 0, 1, True, 0, 0)[7:]) == list(range(7))


@pytest.mark.parametrize('size, settings', [
    (0, {}), (3, {'rank': 2, 'num_replicas': 2}), (3, {'window_size': 2})])
def test_samplers_without_an_order_are_refused(size, settings):
    with pytest.raises(UserError, match=f'^{size} images.*a sampler needs'):
        misc.InfiniteSampler(range(size), **settings)


class Net(torch.nn.Module):
    """A linear layer and a buffer; `frozen` turns the weight into a buffer."""

    def __init__(self, features=2, frozen=False):
        super().__init__()
        self.fc = torch.nn.Linear(2, features)
        self.register_buffer('avg', torch.zeros(1))
        if frozen:
            weight = self.fc.weight.detach()
            del self.fc.weight
            self.fc.register_buffer('weight', weight)

    def forward(self, x):
        return self.fc(x)


def test_parameters_come_before_buffers():
    net = Net()
    assert [name for name, _ in misc.named_params_and_buffers(net)] == ['fc.weight', 'fc.bias', 'avg']
    assert list(map(id, misc.params_and_buffers(net))) == list(map(id, [net.fc.weight, net.fc.bias, net.avg]))


def test_copying_keeps_requires_grad_and_crosses_from_buffers_to_parameters():
    src, dst = Net(frozen=True), Net()
    src.avg.fill_(5)
    dst.fc.bias.requires_grad_(False)
    misc.copy_params_and_buffers(src, dst, require_all=True)
    assert torch.equal(dst.fc.weight, src.fc.weight) and dst.avg == 5
    assert dst.fc.weight.requires_grad and not dst.fc.bias.requires_grad


def test_missing_names_are_left_alone_or_refused():
    src, dst = torch.nn.Module(), Net()
    before = dst.fc.weight.clone()
    misc.copy_params_and_buffers(src, dst)
    assert torch.equal(dst.fc.weight, before)
    with pytest.raises(AssertionError, match=r'fc\.weight'):
        misc.copy_params_and_buffers(src, dst, require_all=True)


def test_another_shape_is_refused_by_name_before_anything_is_copied():
    src, dst = Net(features=1), Net(features=2)
    before = [t.clone() for t in misc.params_and_buffers(dst)]
    with pytest.raises(UserError, match=r'fc\.weight: cannot copy \[1, 2\] to \[2, 2\]'):
        misc.copy_params_and_buffers(src, dst)
    assert all(map(torch.equal, before, misc.params_and_buffers(dst)))


def summary_inputs(case):
    kwargs, batch = case['init_kwargs'], case['batch']
    c = torch.zeros([batch, kwargs['c_dim']], device='meta')
    if case['class'] == 'Generator':
        return [torch.zeros([batch, kwargs['z_dim']], device='meta'), c]
    side = kwargs['img_resolution']
    return [torch.zeros([batch, kwargs['img_channels'], side, side], device='meta'), c]


@pytest.mark.parametrize('case', cases('summary_tables'))
def test_golden_summary_tables_character_by_character(case, capsys):
    with torch.device('meta'):
        net = getattr(networks, case['class'])(**case['init_kwargs'])
    net.train(case['training'])
    misc.print_module_summary(net, summary_inputs(case), **case.get('summary_kwargs', {}))
    assert capsys.readouterr().out == '\n'.join(case['stdout_lines'])


class Nested(torch.nn.Module):
    """Two calls of one child, several outputs, one of them no tensor."""

    def __init__(self):
        super().__init__()
        self.child = Net()

    def forward(self, x):
        return self.child(self.child(x)), x.double(), None


def summary(capsys, **kwargs):
    net = Nested()
    outputs = misc.print_module_summary(net, [torch.zeros(3, 2)], **kwargs)
    assert outputs[1].dtype == torch.float64 and outputs[2] is None
    assert not net.child._forward_hooks and not net.child._forward_pre_hooks
    return [re.split(' {2,}', line.strip()) for line in capsys.readouterr().out.splitlines() if line]


def test_tensors_belong_to_the_first_call_that_has_them(capsys):
    assert summary(capsys) == [
        ['Nested', 'Parameters', 'Buffers', 'Output shape', 'Datatype'], ['---'] * 5,
        ['child.fc', '6', '-', '[3, 2]', 'float32'], ['child', '-', '1', '[3, 2]', 'float32'],
        ['child.fc', '-', '-', '[3, 2]', 'float32'],
        ['<top-level>:0', '-', '-', '[3, 2]', 'float32'], ['<top-level>:1', '-', '-', '[3, 2]', 'float64'],
        ['---'] * 5, ['Total', '6', '1', '-', '-']]


def test_nesting_limits_rows_but_not_counts(capsys):
    names = [row[0] for row in summary(capsys, max_nesting=0, skip_redundant=False)]
    assert names == ['Nested', '---', '<top-level>:0', '<top-level>:1', '---', 'Total']
    assert len(summary(capsys, max_nesting=None, skip_redundant=False)) == 10


def test_hooks_are_removed_when_a_module_fails():
    net = Net()
    with pytest.raises(RuntimeError):
        misc.print_module_summary(net, [torch.zeros(3, 5)])
    assert not net.fc._forward_hooks and not net._forward_pre_hooks


def test_a_module_without_tensors_has_zero_totals(capsys):
    class Nothing(torch.nn.Module):
        def forward(self):
            return 'text'
    assert misc.print_module_summary(Nothing(), [], skip_redundant=False) == 'text'
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert rows[2] == ['<top-level>', '-', '-', '-', '-'] and rows[-1] == ['Total', '0', '0', '-', '-']
