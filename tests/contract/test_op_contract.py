# SPDX-License-Identifier: Apache-2.0
"""What every operator promises: derivatives of every order, torch.library's rules, compile, export.

A new operator is covered by adding its samples to samples.py.
"""
import pytest
import torch
from contract.samples import SAMPLES

every_sample = pytest.mark.parametrize('sample', [pytest.param(s, id=s.name) for s in SAMPLES])


def float_inputs(args):
    """The differentiable arguments: all float tensors but float32 filters beside float64 inputs."""
    return [a for a in args if isinstance(a, torch.Tensor) and a.dtype == args[0].dtype]


def results(value):
    """All results of an operator that hold anything; what was not wanted is empty."""
    return [v for v in ((value,) if isinstance(value, torch.Tensor) else value) if v.numel()]


def filter_index(op):
    """Which argument is a filter: float32, and nobody differentiates it."""
    filtered = ('upfirdn2d', 'upfirdn2d_plus', 'filtered_epilogue', 'scaled_filtered_epilogue', 'warp',
                'warp_adjoint', 'activated_filter', 'filtered_input_grad', 'filtered_scale_grad')
    return 1 if op.name in filtered else None


def call_on(sample, args):
    """A function of the differentiable arguments only, as gradcheck wants it."""
    tensors = float_inputs(args)

    def function(*values):
        replaced = iter(values)
        result = sample.op(*[next(replaced) if any(a is t for t in tensors) else a for a in args])
        return result if isinstance(result, torch.Tensor) else tuple(results(result))
    return function, tensors


@every_sample
def test_first_derivatives_match_finite_differences(sample, device):
    function, tensors = call_on(sample, sample.make(torch.float64, device))
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


@every_sample
def test_second_derivatives_match_finite_differences(sample, device):
    function, tensors = call_on(sample, sample.make(torch.float64, device))
    assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize('name', ['bias_act-swish', 'bias_act-tanh', 'bias_act-softplus', 'upfirdn2d-up'])
def test_third_derivatives_match_finite_differences(name):
    sample = next(s for s in SAMPLES if s.name == name)
    function, tensors = call_on(sample, sample.make(torch.float64, torch.device('cpu')))
    x, *rest = tensors

    def gradient(x):
        (grad,) = torch.autograd.grad(function(x, *rest).square().sum(), x, create_graph=True)
        return grad
    assert torch.autograd.gradgradcheck(gradient, [x.requires_grad_()])


@every_sample
def test_the_registered_operator_obeys_torch_library(sample, device):
    args = sample.make(torch.float32, device)
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and i != filter_index(sample.op):
            a.requires_grad_()
    torch.library.opcheck(sample.op.overload, args)


@every_sample
def test_eager_and_registered_operator_agree(sample, device):
    args = sample.make(torch.float32, device)
    for eager, registered in zip(results(sample.op(*args)), results(sample.op.overload(*args)), strict=True):
        assert torch.equal(eager, registered)


# Other strides for the same values, as gradients and slices bring them.
LAYOUTS = {
    'as they are': lambda x: x,
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    'turned': lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    'spread': lambda x: x[:1, :1].expand(x.shape) if x.ndim > 1 else x,
    'cut out': lambda x: torch.nn.functional.pad(x, [0, 2])[..., :-2],
}


def without_memory(value):
    """A tensor as it is, gaps included, on the meta device."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='meta')


def strides(x):
    """Those that matter: of a single row none does."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize('layout', LAYOUTS)
@every_sample
def test_fake_tensors_have_the_shape_and_strides_of_real_ones(sample, layout, device):
    plain = sample.make(torch.float32, device)
    which = [i for i, a in enumerate(plain) if isinstance(a, torch.Tensor) and i != filter_index(sample.op)]
    for chosen in [which, *([i] for i in which if layout != 'as they are')]:
        args = [LAYOUTS[layout](a) if i in chosen else a for i, a in enumerate(plain)]
        reals = results(sample.op(*args))
        fakes = results(sample.op(*[without_memory(a) for a in args]))
        for real, fake in zip(reals, fakes, strict=True):
            assert fake.device.type == 'meta'
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert strides(fake) == strides(real), chosen


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@every_sample
def test_low_precision_agrees_with_float64(sample, dtype, tolerance, device):
    args = sample.make(dtype, device)
    exact = [a.double() if isinstance(a, torch.Tensor) and a.dtype == dtype else a for a in args]
    for expected, actual in zip(results(sample.op(*exact)), results(sample.op(*args)), strict=True):
        assert actual.dtype == dtype
        # A sum of a few dozen terms, each rounded: a few units in the last place of the largest.
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize('shape', [(0, 3, 5, 4), (2, 0, 5, 4)])
def test_empty_batches_and_channels_pass_through(shape):
    x = torch.zeros(shape, requires_grad=True)
    from torch_utils.ops import bias_act, upfirdn2d
    y = bias_act.bias_act(upfirdn2d.upsample2d(x, upfirdn2d.setup_filter([1, 3, 3, 1])), act='lrelu')
    assert y.shape == (*shape[:2], 10, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize(
    'name', ['upfirdn2d-up_and_down', 'bias_act-lrelu_clamped', 'modulated_epilogue-noise_per_sample'])
def test_compile_sees_one_graph_and_gives_the_same_numbers_and_gradients(name):
    sample = next(s for s in SAMPLES if s.name == name)
    args = sample.make(torch.float32, torch.device('cpu'))
    args[0].requires_grad_()
    compiled = torch.compile(lambda *a: sample.op(*a) * 2, fullgraph=True, backend='aot_eager')
    expected, actual = sample.op(*args) * 2, compiled(*args)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(y.sum(), args[0])[0] for y in (actual, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize('name', ['upfirdn2d-down', 'bias_act-lrelu', 'modulated_epilogue-no_noise'])
def test_export_keeps_the_operator_as_one_node(name):
    sample = next(s for s in SAMPLES if s.name == name)
    x, *rest = sample.make(torch.float32, torch.device('cpu'))

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            # Older releases export no tensor of which the module does not know.
            self.names = [f'argument{i}' for i in range(len(rest))]
            for name, value in zip(self.names, rest, strict=True):
                is_tensor = isinstance(value, torch.Tensor)
                self.register_buffer(name, value) if is_tensor else setattr(self, name, value)

        def forward(self, x):
            return sample.op(x, *[getattr(self, name) for name in self.names])
    program = torch.export.export(Module(), (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == 'call_function']
    assert f'stylegan2.{sample.op.name}.default' in targets
    assert torch.equal(program.module()(x), sample.op(x, *rest))
