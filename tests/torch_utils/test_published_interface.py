# SPDX-License-Identifier: Apache-2.0
"""What source texts in official pickles import, called as they call it, from a pickle that is executed."""
import pickle

import pytest
import torch
import torch.nn.functional as F

import legacy
from dnnlib.util import EasyDict, UserError
from torch_utils import persistence

SOURCE = '''
import numpy as np
import torch
import dnnlib
from torch_utils import misc
from torch_utils import persistence
from torch_utils.ops import bias_act
from torch_utils.ops import conv2d_gradfix
from torch_utils.ops import conv2d_resample
from torch_utils.ops import fma
from torch_utils.ops import grid_sample_gradfix
from torch_utils.ops import upfirdn2d


@misc.profiled_function
def total(x):
    return x.sum()


@persistence.persistent_class
class Generator(torch.nn.Module):
    def forward(self, x):
        with misc.suppress_tracer_warnings():
            misc.assert_shape(x, [None, 3, 8, 8])
        f = upfirdn2d.setup_filter([1, 3, 3, 1])
        weight = self.weight
        per_sample = weight.repeat(len(x), 1, 1, 1)
        ramp = misc.constant(np.arange(8), dtype=torch.float32, device=x.device)
        return {
            'total': total(x), 'name': total.__name__,
            'constant': ramp + misc.constant(1, shape=[8], device=x.device),
            'up': upfirdn2d.upsample2d(x, f), 'down': upfirdn2d.downsample2d(x, f),
            'up keywords': upfirdn2d.upsample2d(x=x, f=f, up=2),
            'down keywords': upfirdn2d.downsample2d(x=x, f=f, down=2, padding=-1, flip_filter=True),
            'bias': bias_act.bias_act(x, self.bias, act='linear', gain=2, clamp=1),
            'no bias': bias_act.bias_act(x, None, act='lrelu'),
            'clamped': bias_act.bias_act(x, self.bias, clamp=1),
            'gain': bias_act.activation_funcs['lrelu'].def_gain,
            'fma': fma.fma(x, x, x), 'conv': conv2d_gradfix.conv2d(input=x, weight=weight, groups=1),
            'resampled': conv2d_resample.conv2d_resample(
                x=x, w=weight, f=f, up=2, down=1, padding=1, flip_weight=False),
            'per sample': conv2d_resample.conv2d_resample(
                x=x.reshape(1, -1, 8, 8), w=per_sample, f=f, up=1, down=1, padding=1, groups=len(x),
                flip_weight=True),
            'sampled': grid_sample_gradfix.grid_sample(x, self.grid)}
'''


class Stored:
    """Pickles as a persistent object of a source text, which nobody has imported."""

    def __init__(self, source, **tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        state = {**module.__dict__, '_init_args': (), '_init_kwargs': EasyDict()}
        self.meta = {'type': 'class', 'version': 6, 'module_src': source, 'class_name': 'Generator',
                     'state': state}

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def save(tmp_path):
    """Function: the path of a pickle with a generator of this source text and these tensors."""
    def save(source, **tensors):
        (tmp_path / 'net.pkl').write_bytes(pickle.dumps({'G_ema': Stored(source, **tensors)}))
        return tmp_path / 'net.pkl'
    return save


def test_a_text_that_uses_the_whole_published_interface_runs(save):
    x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3), torch.randn(3)
    grid = torch.rand(2, 5, 5, 2) * 2 - 1
    network = legacy.load_network(save(SOURCE, weight=weight, bias=bias, grid=grid), trust_pickle=True).G_ema
    assert type(network).__module__.startswith('_imported_module_') and persistence.is_persistent(network)
    out = network(x)
    assert out['total'] == x.sum() and out['name'] == 'total'
    assert out['constant'].tolist() == list(range(1, 9))
    biased = x + bias[:, None, None]
    for name, expected in {
            'bias': (2 * biased).clamp(-1, 1), 'clamped': biased.clamp(-1, 1), 'fma': x * x + x,
            'no bias': F.leaky_relu(x, 0.2) * 2 ** 0.5, 'conv': F.conv2d(x, weight),
            'per sample': F.conv2d(x, weight, padding=1).reshape(1, 6, 8, 8),
            'sampled': F.grid_sample(x, grid, padding_mode='zeros', align_corners=False)}.items():
        torch.testing.assert_close(out[name], expected, msg=lambda text, name=name: f'{name}: {text}')
    assert out['gain'] == pytest.approx(2 ** 0.5)
    assert out['up'].shape == out['up keywords'].shape == out['resampled'].shape == (2, 3, 16, 16)
    assert out['down'].shape == (2, 3, 4, 4) and out['down keywords'].shape == (2, 3, 3, 3)
    with pytest.raises(AssertionError):
        network(torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize(
    'source', ['this is no program', 'assert False', 'import nothing_of_this_name', '1 / 0', ''])
def test_a_text_that_fails_is_one_line_for_the_user(save, source):
    path = save(source)
    with pytest.raises(UserError, match='cannot be unpickled') as caught:
        legacy.load_network(path, trust_pickle=True)
    assert '\n' not in str(caught.value)
