# SPDX-License-Identifier: Apache-2.0
"""Every recorded call of an operator: value, gradients and gradients of gradients."""
import pytest
import torch
from golden_cases import assert_close, cases, index, resolve

from torch_utils.ops import bias_act, conv2d_resample, fma, grid_sample_gradfix, modulated_conv2d, upfirdn2d
from training import networks

FUNCTIONS = {
    'setup_filter': upfirdn2d.setup_filter, 'upfirdn2d': upfirdn2d.upfirdn2d, 'filter2d': upfirdn2d.filter2d,
    'upsample2d': upfirdn2d.upsample2d, 'downsample2d': upfirdn2d.downsample2d, 'bias_act': bias_act.bias_act,
    'conv2d_resample': conv2d_resample.conv2d_resample, 'modulated_conv2d': modulated_conv2d.modulated_conv2d,
    'fma': fma.fma, 'normalize_2nd_moment': networks.normalize_2nd_moment,
    'grid_sample': grid_sample_gradfix.grid_sample,
}
GROUPS = ['ops_upfirdn2d', 'ops_bias_act', 'ops_conv2d_resample', 'ops_modulated_conv2d', 'ops_misc']
ALL = [pytest.param(group, *p.values, id=p.id) for group in GROUPS for p in cases(group)]


def tolerance(output, order):
    """Of the README: outputs 1e-5, gradients 1e-4, second order 1e-3; float16 1e-2."""
    return 1e-2 if output.dtype == torch.float16 else [1e-5, 1e-4, 1e-3][order]


def tensor_arguments(case, npz, device):
    kwargs = resolve(case['kwargs'], npz)
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            layout = torch.channels_last if name in case.get('memory_format', {}) else torch.preserve_format
            value = value.to(device).to(memory_format=layout) if value.ndim == 4 else value.to(device)
            kwargs[name] = value.requires_grad_() if name in case.get('grad', {}) else value
    return kwargs


@pytest.mark.parametrize('group, case', ALL)
def test_recorded_call(group, case, device):
    npz = index(group).get('npz')
    kwargs = tensor_arguments(case, npz, device)
    output, expected = FUNCTIONS[case['function']](**kwargs), resolve(case['output'], npz)
    assert output.dtype == expected.dtype
    assert_close(output.detach().cpu(), expected, tolerance(expected, 0))
    if 'grad' not in case:
        return
    dy = resolve(case['dy'], npz).to(device).requires_grad_()
    names = list(case['grad'])
    grads = torch.autograd.grad((output * dy).sum(), [kwargs[k] for k in names], create_graph=True)
    for name, grad in zip(names, grads, strict=True):
        recorded = resolve(case['grad'][name], npz)
        assert_close(grad.detach().cpu(), recorded, tolerance(expected, 1), what=f'grad {name}')
    if 'grad2' not in case:
        return
    v = {k: t.to(device) for k, t in resolve(case['v'], npz).items()}
    total = sum((g * v[k]).sum() for k, g in zip(names, grads, strict=True))
    inputs = [dy if k == 'dy' else kwargs[k] for k in case['grad2']]
    seconds = torch.autograd.grad(total, inputs, allow_unused=True)
    for (name, value), x, second in zip(case['grad2'].items(), inputs, seconds, strict=True):
        second = torch.zeros_like(x) if second is None else second
        assert_close(second.cpu(), resolve(value, npz), tolerance(expected, 2), 1e-4, what=f'grad2 {name}')


@pytest.mark.parametrize('group, case', ALL)
def test_recorded_call_through_the_emulated_kernels(group, case, emulated):
    test_recorded_call(group, case, torch.device('cpu'))


def test_activation_table_has_the_recorded_defaults():
    table = index('ops_bias_act').get('activation_defaults')
    if not table:
        pytest.skip('no recorded defaults in this folder')
    for name, row in table.items():
        spec = bias_act.activation_funcs[name]
        assert (spec.def_alpha, pytest.approx(spec.def_gain)) == (row['def_alpha'], row['def_gain'])
