# SPDX-License-Identifier: Apache-2.0
"""Networks against the recorded ones, and what is ours: any shape, number of channels, layouts, errors."""
import itertools

import numpy as np
import pytest
import torch
from golden_cases import arrays, assert_close, cases, index, resolve
from small_networks import small_generator
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib import resolution as resolution_module
from torch_utils import misc
from training import networks

SMALL_G = {'z_dim': 8, 'w_dim': 8, 'synthesis_kwargs': {'channel_base': 64, 'channel_max': 8}}
SMALL_D = {'channel_base': 64, 'channel_max': 8}


def with_state(module, npz, prefix):
    module.load_state_dict(
        {k[len(prefix):]: torch.from_numpy(v.copy()) for k, v in arrays(npz).items() if k.startswith(prefix)})
    return module


def build(case):
    return getattr(networks, case['class'])(**case['init_kwargs'])


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def tolerance(case, full):
    """`full` for float32; float16 inside gives float32 results with the errors of float16 (README: 1e-2)."""
    kwargs = case['init_kwargs']
    sizes = [kwargs, kwargs.get('synthesis_kwargs') or {}]
    return 1e-2 if any(k.get('use_fp16') or k.get('num_fp16_res') for k in sizes) else full


@pytest.mark.parametrize('case', cases('layers'))
def test_recorded_layer(case, device):
    npz = index('layers')['npz']
    module = with_state(build(case), npz, case['state_prefix']).train(case['training']).to(device)
    kwargs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in resolve(case['kwargs'], npz).items()}
    for name in case.get('grad', {}):
        kwargs[name].requires_grad_()
    outputs = as_tuple(module(**kwargs))
    for actual, expected in zip(outputs, resolve(case['outputs'], npz), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert actual.dtype == expected.dtype
            tol = 1e-2 if actual.dtype == torch.float16 else tolerance(case, 1e-5)
            assert_close(actual.detach().cpu(), expected, tol)
    for name, expected in resolve(case.get('state_after', {}), npz).items():
        assert_close(module.state_dict()[name].cpu(), expected, 1e-5, what=name)
    if 'dy' in case:
        check_layer_gradients(case, npz, module, kwargs, [y for y in outputs if y is not None])


def check_layer_gradients(case, npz, module, kwargs, outputs):
    parameters = dict(module.named_parameters())
    of_inputs, of_parameters = case.get('grad', {}), case['param_grad']
    assert set(parameters) == set(of_parameters)
    expected = resolve({**of_inputs, **of_parameters}, npz)
    inputs = [kwargs[k] for k in of_inputs] + [parameters[k] for k in of_parameters]
    total = sum((y * dy.to(y.device)).sum() for y, dy in zip(outputs, resolve(case['dy'], npz), strict=True))
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    for (name, value), grad in zip(expected.items(), grads, strict=True):
        grad = torch.zeros_like(value) if grad is None else grad.cpu()
        assert_close(grad, value, tolerance(case, 1e-4), what=name)


def recorded_network(case, device='cpu'):
    return with_state(build(case), case['npz'], case['state_prefix']).to(device)


@pytest.mark.parametrize('case', cases('nets'))
def test_recorded_network_calls(case, device):
    for call in case['calls']:
        network = recorded_network(case, device).train(call['training'])
        kwargs = resolve(call['kwargs'], case['npz'])
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        output = network.get_submodule(call['module'])(**kwargs)
        tol = 1e-4 if kwargs.get('force_fp32') else tolerance(case, 1e-4)
        assert_close(output.detach().cpu(), resolve(call['output'], case['npz']), tol, 1e-3, call['id'])
        for name, expected in resolve(call.get('state_after', {}), case['npz']).items():
            assert_close(network.state_dict()[name].cpu(), expected, 1e-4, 1e-3, name)


@pytest.mark.parametrize('case', cases('nets'))
def test_recorded_network_has_the_same_parameters_buffers_and_attributes(case):
    network = recorded_network(case)
    assert [k for k, _ in network.named_parameters()] == case['parameters']
    assert all(name in dict(network.named_buffers()) for name in case.get('frozen', []))
    for name, expected in case['attributes'].items():
        assert getattr(network, name) == expected


def check_parameter_gradients(case, part, network, value, tol):
    """Full gradients of some parameters, norms of all; errors relative to the largest norm (README)."""
    tol = max(tol, tolerance(case, 0))
    parameters = dict(network.named_parameters())
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    grads = {
        k: torch.zeros_like(p) if g is None else g
        for (k, p), g in zip(parameters.items(), grads, strict=True)}
    floor = 1e-4 * max(part['param_grad_norm'].values())
    for name, expected in resolve(part['param_grad'], case['npz']).items():
        assert_close(grads[name].cpu(), expected, tol, floor, name)
    for name, expected in part['param_grad_norm'].items():
        assert_close(grads[name].norm().cpu(), expected, tol, floor, f'norm of {name}')


def image_of(case, network, device):
    z, c = (
        resolve({'$tensor': f'in/{k}'}, case['npz']) if f'in/{k}' in arrays(case['npz']) else None
        for k in 'zc')
    z, c = (None if x is None else x.to(device) for x in (z, c))
    ws = network.mapping(z, c)
    return ws, network.synthesis(ws, noise_mode='const')


def of(case, key, device):
    data = arrays(case['npz'])
    return torch.from_numpy(data[key].copy()).to(device) if key in data else None


@pytest.mark.parametrize(
    'case', cases('nets', where=lambda case: case['class'] == 'Generator' and 'loss' in case))
def test_recorded_generator_gradients_and_path_length(case, device):
    network, y = recorded_network(case, device).eval(), of(case, 'in/y', device)
    _, img = image_of(case, network, device)
    value = (img * y).sum()
    assert_close(value.detach().cpu(), case['loss']['value'], tolerance(case, 1e-4), 1e-3)
    check_parameter_gradients(case, case['loss'], network, value, 5e-4)
    if 'pathlen' not in case:
        return
    ws, img = image_of(case, network, device)
    (g,) = torch.autograd.grad((img * y).sum(), ws, create_graph=True)
    assert_close(g.detach().cpu(), resolve(case['pathlen']['g'], case['npz']), tolerance(case, 1e-4))
    assert_close(g.square().sum().detach().cpu(), case['pathlen']['value'], tolerance(case, 1e-4))
    check_parameter_gradients(case, case['pathlen'], network, g.square().sum(), 2e-3)


@pytest.mark.parametrize('case', cases('nets', where=lambda case: 'input_grad' in case))
def test_recorded_gradients_of_ws_and_noise_maps(case, device):
    network, y = recorded_network(case, device).eval(), of(case, 'in/y', device)
    expected = resolve(case['input_grad'], case['npz'])
    z, c = of(case, 'in/z', device), of(case, 'in/c', device)
    ws = of(case, 'in/ws', device)
    ws = (network.mapping(z, c).detach() if ws is None else ws).requires_grad_()
    noise = [network.get_buffer(name).requires_grad_() for name in expected['noise']]
    grads = torch.autograd.grad((network.synthesis(ws, noise_mode='const') * y).sum(), [ws, *noise])
    largest = max(g.norm().item() for g in grads)
    for actual, value in zip(grads, [expected['ws'], *expected['noise'].values()], strict=True):
        assert_close(actual.cpu(), value, tolerance(case, 5e-4), 1e-4 * largest)


@pytest.mark.parametrize(
    'case', cases('nets', where=lambda case: case['class'] == 'Discriminator' and 'loss' in case))
def test_recorded_discriminator_gradients_and_r1(case, device):
    network = recorded_network(case, device).eval()
    img, c, u = (of(case, f'in/{k}', device) for k in ('img', 'c', 'u'))
    value = (network(img, c) * u).sum()
    assert_close(value.detach().cpu(), case['loss']['value'], tolerance(case, 1e-4), 1e-3)
    check_parameter_gradients(case, case['loss'], network, value, 5e-4)
    if 'r1' not in case:
        return
    (g,) = torch.autograd.grad(network(img.requires_grad_(), c).sum(), img, create_graph=True)
    assert_close(g.detach().cpu(), resolve(case['r1']['g'], case['npz']), tolerance(case, 1e-4))
    assert_close(g.square().sum().detach().cpu(), case['r1']['value'], tolerance(case, 1e-4))
    check_parameter_gradients(case, case['r1'], network, g.square().sum(), 2e-3)


@pytest.mark.parametrize('case', cases('state_shapes'))
def test_recorded_names_and_shapes(case):
    with torch.device('meta'):
        network = build(case)
    trainable = {k for k, _ in network.named_parameters()}
    entries = [
        [k, list(v.shape), 'param' if k in trainable else 'buffer'] for k, v in network.state_dict().items()]
    assert entries == case['entries']
    assert sum(p.numel() for p in network.parameters()) == case['num_params']
    assert sum(b.numel() for b in network.buffers()) == case['num_buffers']


@pytest.mark.parametrize('case', cases('init_rules'))
def test_fresh_tensors_follow_the_recorded_distribution(case):
    for name, tensor in build(case).state_dict().items():
        rule, values = case['entries'][name], tensor.flatten().double()
        if rule['kind'] == 'normal':
            # Five standard errors of the mean and of the standard deviation.
            assert abs(values.mean() - rule['mean']) <= 5 * rule['std'] / len(values) ** 0.5, name
            deviation = abs(values.std() / rule['std'] - 1)
            assert len(values) < 20 or deviation <= 5 / (2 * len(values)) ** 0.5, name
        else:
            expected = rule.get('values', rule.get('value'))
            np.testing.assert_allclose(
                values.numpy(), np.broadcast_to(expected, values.shape), rtol=1e-7, err_msg=name)


@pytest.mark.parametrize('case', cases('summary_tables'))
def test_recorded_summary_table(case, capsys):
    kwargs, n = case['init_kwargs'], case['batch']
    with torch.device('meta'):
        network = build(case).train(case['training'])
        c = torch.empty([n, kwargs['c_dim']])
        size = resolution_module.height_width(kwargs['img_resolution'])
        first = torch.empty([n, kwargs['z_dim']]) if case['class'] == 'Generator' \
            else torch.empty([n, kwargs['img_channels'], *size])
    misc.print_module_summary(network, [first, c], **case.get('summary_kwargs', {}))
    assert capsys.readouterr().out.split('\n') == case['stdout_lines']


SHAPES = [16, 24, (16, 32), (24, 40), (48, 32), (56, 24)]


@pytest.mark.parametrize('resolution, channels, architecture', [
    pytest.param(r, ch, arch, id=f'{r}-{ch}-{arch}')
    for (r, ch), arch in itertools.product(
        [*zip(SHAPES, [1, 2, 3, 4, 5, 3], strict=True)], ['orig', 'skip', 'resnet'])])
def test_images_of_any_shape_and_number_of_channels_pass_through_both_networks(
    resolution, channels, architecture,
):
    common = {'c_dim': 2, 'img_resolution': resolution, 'img_channels': channels}
    kwargs = {**SMALL_G, 'synthesis_kwargs': {**SMALL_G['synthesis_kwargs'], 'architecture': architecture}}
    G = networks.Generator(**kwargs, **common)
    D = networks.Discriminator(**SMALL_D, architecture=architecture, **common)
    img = G(torch.randn(2, 8), torch.eye(2))
    assert img.shape == (2, channels, *resolution_module.height_width(resolution))
    assert img.dtype == torch.float32 and img.is_contiguous()
    logits = D(img, torch.eye(2))
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert all(p.grad is not None for p in G.synthesis.parameters())


def test_a_non_square_network_names_its_blocks_by_level():
    with torch.device('meta'):
        G = networks.Generator(z_dim=8, c_dim=0, w_dim=8, img_resolution=(24, 40), img_channels=3)
    shapes = {k: list(v.shape) for k, v in G.state_dict().items()}
    assert G.synthesis.block_resolutions == [4, 8, 16, 32]
    assert shapes['synthesis.b4.const'][1:] == [3, 5]
    assert shapes['synthesis.b32.conv1.noise_const'] == [24, 40]


@pytest.mark.parametrize('size, expected', [
    (32, (4, 4, 3)), (1024, (4, 4, 8)), (8, (4, 4, 1)), (24, (3, 3, 3)), ((48, 64), (3, 4, 4)),
    ((288, 512), (9, 16, 5)),
])
def test_resolution_splits_into_a_start_and_doublings(size, expected):
    assert resolution_module.split_resolution(size) == expected


@pytest.mark.parametrize('size', [1, 7, 33, 100, (30, 40), (8, 512), (1000, 1000)])
def test_a_resolution_that_no_network_fits_is_refused(size):
    with pytest.raises(ValueError, match='no network fits'):
        networks.Generator(z_dim=8, c_dim=0, w_dim=8, img_resolution=size, img_channels=3)


@pytest.mark.parametrize('call, text', [
    (lambda G, D: G(torch.zeros(1, 7), None), r'z must be \[N, 8\], not \[1, 7\]'),
    (lambda G, D: G(None, None), r'z must be'),
    (lambda G, D: G.synthesis(torch.zeros(1, 5, 8)), r'ws must be \[N, 6, 8\]'),
    (lambda G, D: G(torch.zeros(1, 8), None, noise_mode='loud'), "noise_mode='loud'"),
    (lambda G, D: D(torch.zeros(1, 3, 8, 8), None), r'img must be \[N, 3, 16, 16\]'),
    (lambda G, D: D(torch.zeros(6, 3, 16, 16), None), 'minibatch std: a batch of 6'),
    (lambda G, D: networks.Discriminator(c_dim=0, img_resolution=16, img_channels=3, architecture='dense'),
     "'dense'"),
])
def test_wrong_arguments_are_named(call, text):
    common = {'c_dim': 0, 'img_resolution': 16, 'img_channels': 3}
    G, D = networks.Generator(**SMALL_G, **common), networks.Discriminator(**SMALL_D, **common)
    with pytest.raises(ValueError, match=text):
        call(G, D)


def test_bfloat16_blocks_stay_near_float32():
    kwargs = {**SMALL_G, 'synthesis_kwargs': {
        **SMALL_G['synthesis_kwargs'], 'num_fp16_res': 4, 'half_dtype': 'bfloat16', 'conv_clamp': 256}}
    G = networks.Generator(**kwargs, c_dim=0, img_resolution=16, img_channels=3)
    z = torch.randn(4, 8)
    half, full = (G(z, None, noise_mode='const', force_fp32=f) for f in (False, True))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).norm() <= 0.05 * full.norm()  # bfloat16 has 8 bits


def test_fused_and_unfused_generators_agree():
    G = networks.Generator(**SMALL_G, c_dim=0, img_resolution=16, img_channels=3)
    z = torch.randn(3, 8)
    images = [G(z, None, noise_mode='const', fused_modconv=f) for f in (True, False)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)


def test_synthesis_compiles_in_one_graph_and_exports():
    G = networks.Generator(**SMALL_G, c_dim=0, img_resolution=8, img_channels=3).eval().requires_grad_(False)
    ws = G.mapping(torch.randn(2, 8), None)
    expected = G.synthesis(ws, noise_mode='const')
    compiled = torch.compile(G.synthesis, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(ws, noise_mode='const'), expected)
    program = torch.export.export(G.synthesis, (ws,), {'noise_mode': 'const'})
    torch.testing.assert_close(program.module()(ws, noise_mode='const'), expected)


def test_mapping_without_broadcast_keeps_no_average_and_trains():
    mapping = networks.MappingNetwork(z_dim=4, c_dim=0, w_dim=4, num_ws=None, num_layers=1).train()
    assert mapping(torch.randn(2, 4), None).shape == (2, 4) and not list(mapping.buffers())
    with pytest.raises(ValueError, match='has no w_avg'):
        mapping(torch.randn(2, 4), None, truncation_psi=0.5)


def test_second_derivatives_of_minibatch_deviation_are_exact_for_samples_that_are_nearly_alike():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 4) + 1e-4 * torch.randn(4, 3, 4, 4)

    def of_squared_gradient(x):
        y = networks.MinibatchStdLayer(4)(x.requires_grad_())[:, -1]
        weights = torch.arange(4, dtype=x.dtype)[:, None, None]
        (g,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]
    exact = of_squared_gradient(x.double())
    # By var() the error is 3e-4; by the differences themselves, what float32 has.
    assert (of_squared_gradient(x) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize(('asked', 'expected'), [
    (None, torch.channels_last), (True, torch.channels_last), (False, torch.contiguous_format)])
def test_activations_are_channels_last_on_a_gpu_unless_asked_otherwise(asked, expected, monkeypatch):
    block = networks.DiscriminatorBlock(
        8, 8, 8, resolution=16, img_channels=3, first_layer_idx=0, use_fp16=True, fp16_channels_last=asked)
    gpu = torch.device('cuda')
    assert networks._compute_format(block, gpu, False) == (torch.float16, expected)
    for allow_tf32, layout in ((True, expected), (False, torch.contiguous_format)):
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allow_tf32)
        assert networks._compute_format(block, gpu, True) == (torch.float32, layout)


class PassesOverImages(TorchDispatchMode):
    """Names of the operations on anything that has the shape of these images."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names = torch.Size(shape), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(arg, torch.Tensor) and arg.shape == self.shape for arg in args):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('down', [1, 2])
def test_the_gain_of_a_layer_without_bias_and_activation_takes_no_pass_over_its_result(down):
    layer = networks.Conv2dLayer(3, 4, 1, bias=False, down=down)
    x = torch.randn(2, 3, 8, 8)
    with PassesOverImages([2, 4, 8 // down, 8 // down]) as passes:
        y = layer(x, gain=0.3)
    assert 'mul' not in passes.names
    torch.testing.assert_close(y, layer(x) * 0.3)
    (grad,) = torch.autograd.grad(y.square().sum(), layer.weight)
    (expected,) = torch.autograd.grad((layer(x) * 0.3).square().sum(), layer.weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize('kwargs', [{'bias': False}, {'bias': True}, {'bias': False, 'activation': 'lrelu'}])
def test_gain_multiplies_result_and_clamp_of_any_layer(kwargs):
    layer = networks.Conv2dLayer(3, 4, 1, conv_clamp=0.8, **kwargs)
    x = torch.randn(2, 3, 8, 8) * 2
    y = layer(x, gain=0.3)
    torch.testing.assert_close(y, layer(x) * 0.3)
    assert y.abs().max() == torch.tensor(0.8 * 0.3)


def test_hooks_of_a_trained_network_see_features_and_not_what_is_fused():
    G, seen = small_generator(), []
    ws = torch.randn(2, G.num_ws, G.w_dim)
    with torch.no_grad():
        plain = G.synthesis(ws, noise_mode='const')
        G.synthesis.b8.conv0.register_forward_hook(
            lambda module, args, kwargs, y: seen.append(set(kwargs)), with_kwargs=True)
        watched = G.synthesis(ws, noise_mode='const')
    assert seen and 'next_scale' not in seen[0]
    torch.testing.assert_close(watched, plain)
