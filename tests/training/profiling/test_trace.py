# SPDX-License-Identifier: Apache-2.0
"""Reading a profiler's record: made-up events such as those of a GPU, where no GPU is needed."""
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from training.profiling import labels
from training.profiling.ops import Convolution, describe_shapes, group_of, kernels_of
from training.profiling.trace import NODE, Place, ProfiledKernel, Trace, dotted_name, is_named, textbook_name

MAIN, ENGINE = 1, 2  # threads


@dataclass(eq=False)
class Event:
    """A FunctionEvent as far as it is read."""

    name: str
    start: float
    end: float
    children: list = field(default_factory=list)
    kernels: list = field(default_factory=list)
    thread: int = MAIN
    sequence_nr: int = -1
    input_shapes: list = field(default_factory=list)
    concrete_inputs: list = field(default_factory=list)
    device_type: DeviceType = DeviceType.CPU
    input_dtypes: tuple = ('float',)
    cpu_parent: object = None
    scope: int = 0
    fwd_thread: int = MAIN

    def __post_init__(self):
        self.kernels = [SimpleNamespace(name=name, duration=us) for name, us in self.kernels]
        for child in self.children:
            child.cpu_parent = self

    @property
    def cpu_children(self):
        return self.children

    @property
    def time_range(self):
        return SimpleNamespace(start=self.start, end=self.end, elapsed_us=lambda: self.end - self.start)

    @property
    def cpu_time_total(self):
        return self.end - self.start


def flat(*events):
    return [e for event in events for e in (event, *flat(*event.children))]


def label(kind, *names):
    return '|'.join([labels.MARK, kind, *names])


FORWARD = {'input_shapes': [[8, 3, 16, 12], [5, 3, 3, 3], [5]],
           'concrete_inputs': [None, None, None, [2, 1], [1, 1], [1, 1], False, [0, 0], 1]}
BACKWARD = {'input_shapes': [[8, 5, 8, 12], [8, 3, 16, 12], [5, 3, 3, 3]],
            'concrete_inputs': [None, None, None, [5], [2, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                [False, True, True]]}


def gpu_events():
    """A step on a GPU: backward in a thread of its own, kernels beside the operations that launched them."""
    layer = Event(label('layer', 'D', 'b4.conv'), 20, 40, [
        Event('_Convolution', 21, 39, [Event('aten::convolution', 22, 38, [
            Event('aten::cudnn_convolution', 23, 37, [], [('nchwToNhwc', 2.0), ('implicit_gemm', 30.0)],
                  input_shapes=FORWARD['input_shapes'])], **FORWARD)], sequence_nr=5)])
    step = Event(label('step'), 0, 100, [
        Event(label('data'), 1, 5, [Event('aten::copy_', 2, 4, [], [('Memcpy HtoD', 7.0)])]),
        Event(label('phase', 'Dmain'), 10, 90, [
            Event(label('pass', '0'), 15, 80, [layer]),
            Event('Optimizer.step#Adam.step', 82, 88, [
                Event('aten::_fused_adam_', 83, 87, [], [('adam_kernel', 4.0)])])]),
        Event('aten::lerp_', 92, 94, [], [('lerp_kernel', 1.0)])], [(label('step'), 95.0)])
    backward = [
        Event(f'{NODE}ConvolutionBackward0', 50, 60, [
            Event('aten::convolution_backward', 51, 59, [], [('wgrad', 20.0)], ENGINE, **BACKWARD)],
            thread=ENGINE, sequence_nr=5),
        Event(f'{NODE}torch::autograd::AccumulateGrad', 61, 65, [
            Event('aten::add_', 62, 64, [], [('add_kernel', 3.0)], ENGINE)], thread=ENGINE)]
    on_device = [Event('all kernels', 0, 72, device_type=DeviceType.CUDA),
                 Event(label('step'), 0, 95, device_type=DeviceType.CUDA)]
    return flat(step, *backward), on_device


def names(kernels):
    return [(k.kernel, k.direction, dotted_name(k, {'Dmain': 'D'})) for k in kernels]


def test_kernels_of_a_gpu_belong_to_the_layers_that_launched_them():
    events, on_device = gpu_events()
    trace = Trace([*events, *on_device])
    assert trace.on_gpu and trace.step_us == 100
    assert names(trace.kernels()[:-1]) == [
        ('Memcpy HtoD', 'input', 'input'),
        ('nchwToNhwc', 'fprop', 'Dmain:b4.conv'), ('implicit_gemm', 'fprop', 'Dmain:b4.conv'),
        ('wgrad', 'bprop', 'Dmain:b4.conv'), ('add_kernel', 'bprop', 'Dmain:b4.conv'),
        ('adam_kernel', 'optimiser', 'Dmain:optimiser'), ('lerp_kernel', 'optimiser', 'update')]


def test_the_arithmetic_of_a_convolution_counts_for_its_longest_kernel_only():
    events, on_device = gpu_events()
    kernels = {k.kernel: k for k in Trace([*events, *on_device]).kernels()}
    assert kernels['nchwToNhwc'].convolution is None
    assert kernels['implicit_gemm'].convolution.gradients == ()
    assert kernels['wgrad'].convolution.gradients == ('weight', 'bias')
    assert kernels['nchwToNhwc'].op == 'aten::convolution'


def test_kernels_that_nothing_launched_are_not_hidden():
    events, on_device = gpu_events()
    kernels = Trace([*events, *on_device]).kernels()
    # 72 microseconds on the device, of which 67 are linked to operations.
    assert kernels[-1].microseconds == pytest.approx(5) and not is_named(kernels[-1])
    assert all(map(is_named, kernels[:-1]))


def test_a_node_that_nobody_made_has_no_place():
    node = Event(f'{NODE}MulBackward0', 20, 30, [Event('aten::mul', 21, 29)], sequence_nr=99, fwd_thread=7)
    (kernel,) = Trace(flat(Event(label('step'), 0, 50, [node]))).kernels()
    assert kernel.direction == 'bprop' and not is_named(kernel)


def test_the_last_operation_of_a_number_made_the_node():
    layers = [Event(label('layer', 'D', 'first'), 10, 20, [Event('aten::to', 11, 12, sequence_nr=3)]),
              Event(label('layer', 'D', 'second'), 20, 30, [Event('aten::mul', 21, 22, sequence_nr=3)])]
    node = Event(f'{NODE}MulBackward0', 40, 50, [Event('aten::neg', 41, 42)], sequence_nr=3)
    kernels = Trace(flat(Event(label('step'), 0, 60, [*layers, node]))).kernels()
    assert [k.place.path for k in kernels if k.op == 'aten::neg'] == ['second']


def test_a_convolution_is_read_with_all_its_arguments():
    c = Convolution.of_event(Event('aten::convolution', 0, 1, **FORWARD))
    assert str(c) == 'N=8 C=3 H=16 W=12 K=5 P=8 Q=12 R=3 S=3 padding=1x1 stride=2x1'
    assert c.flop == 2 * 8 * 3 * 5 * 9 * 8 * 12
    both = Convolution.of_event(Event('aten::convolution_backward', 0, 1, **BACKWARD))
    assert (both.P, both.Q, both.flop) == (8, 12, c.flop)


def test_a_transposed_grouped_convolution_is_larger_than_its_input():
    spec = [[2], [1], [1], True, [1], 3]
    c = Convolution.of_event(Event(
        'aten::convolution', 0, 1, input_shapes=[[2, 6, 4, 5], [6, 2, 3, 3]],
        concrete_inputs=[None, None, None, *spec]))
    assert (c.K, c.P, c.Q) == (6, 8, 10) and c.flop == 2 * 2 * 6 * 2 * 9 * 4 * 5
    assert str(c).endswith('padding=1x1 stride=2x2 groups=3 transposed')


def test_time_of_wrappers_goes_to_the_longest_kernel_within():
    work = Event('aten::mkldnn_convolution', 20, 80, [Event('aten::empty', 21, 22)])
    event = Event('aten::conv2d', 0, 100, [Event('aten::convolution', 5, 95, [
        Event('aten::contiguous', 6, 16, [Event('aten::copy_', 8, 14)]), work])])
    found = {e.name: us for e, us in kernels_of(event)}
    assert list(found) == ['aten::copy_', 'aten::mkldnn_convolution']
    assert sum(found.values()) == pytest.approx(100) and found['aten::mkldnn_convolution'] > 80


def test_looking_at_memory_in_another_way_is_no_kernel():
    assert kernels_of(Event('aten::reshape', 0, 9, [Event('aten::view', 1, 2)])) == []
    assert [e.name for e, _ in kernels_of(Event('aten::mul', 0, 9))] == ['aten::mul']


@pytest.mark.parametrize('op, kernel, own_op, group', [
    ('aten::convolution', 'implicit_gemm', '', 'convolution'),
    ('aten::convolution', 'aten::mkldnn_convolution', 'upfirdn2d', 'resampling filter'),
    ('_EagerOp', 'upfirdn2d_small', '', 'resampling filter'),
    ('aten::copy_', 'Memcpy DtoD', '', 'memory copy'), ('aten::addmm', 'sgemm', '', 'matrix product'),
    ('aten::sum', 'reduce_kernel', '', 'reduction'), ('aten::mul', 'vectorized', '', 'elementwise'),
    ('aten::native_batch_norm', 'bn_fw', '', 'normalisation'),
    ('aten::randn', 'philox', '', 'random numbers'),
])
def test_kernels_are_sorted_by_kind(op, kernel, own_op, group):
    assert group_of(op, kernel, own_op) == group


def test_shapes_of_many_tensors_are_summed_up():
    assert describe_shapes(Event('aten::mul', 0, 1, input_shapes=[[4, 3], [], [3], []])) == '4x3, -, 3'
    assert describe_shapes(Event('aten::_foreach', 0, 1, input_shapes=[[[2, 3], [4]]])) == (
        '2 tensors of 10 numbers')


def kernel_at(phase, pass_index, network, path, after='', op=''):
    place = Place(network, path, after, op)
    return ProfiledKernel('fprop', phase, pass_index, place, op, '', '', None, '', op, 0, 1)


@pytest.mark.parametrize('place, name', [
    (('Dmain', 0, 'D', 'conv2'), 'Part1:Real:D:Conv2'), (('Dmain', 1, 'D', 'bn3'), 'Part1:Fake:D:BN3'),
    (('Gmain', 0, 'G', 'synthesis.conv1'), 'Part2:Fake:G:Conv1'), (('Dmain', -1, '', 'optimiser'),
     'Part1:optimiser'), (('', -1, '', 'update'), 'update'),
    (('Dmain', 1, 'G', 'synthesis', 'synthesis.bn4', 'aten::relu'), 'Part1:Fake:G:ReLU4'),
    (('Dmain', 0, 'D', '', '', 'aten::contiguous'), 'Part1:Real:D:Layout'),
])
def test_places_of_dcgan_have_the_names_of_textbooks(place, name):
    assert textbook_name(kernel_at(*place)) == name


@pytest.mark.parametrize('place, name', [
    (('Gmain', 0, 'G', 'synthesis.b32.conv1'), 'Gmain:synthesis.b32.conv1'),
    (('Gmain', 0, 'D', 'b32.conv1'), 'Gmain:D.b32.conv1'), (('Gmain', 0, 'D', ''), 'Gmain:D'),
    (('Gmain', 0, 'G', ''), 'Gmain:G'), (('Gmain', 0, '', 'loss'), 'Gmain:loss'),
    (('', -1, '', 'latents'), 'latents'),
])
def test_places_of_stylegan_are_modules_of_the_network_that_the_phase_trains(place, name):
    assert dotted_name(kernel_at(*place), {'Gmain': 'G'}) == name
