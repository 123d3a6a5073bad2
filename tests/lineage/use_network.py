# SPDX-License-Identifier: Apache-2.0
"""What other programs do with a network: use_network.py NETWORK RESULTS, run in a Python of its own."""
import copy
import io
import os
import pickle
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


class Hide:
    """No module of ours that they do not have, installed or not."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Raise ImportError for those."""
        if name.partition('.')[0] in ('training', 'legacy', 'metrics'):
            raise ImportError(name + ' is hidden')


sys.meta_path.insert(0, Hide)
sys.path.insert(0, HERE)

import torch  # noqa: E402

from torch_utils import misc, persistence  # noqa: E402


def main(path, out):
    assert persistence.__file__.startswith(HERE)
    with open(path, 'rb') as file:
        data = pickle.load(file)
    assert set(data) == {'G', 'D', 'G_ema', 'training_set_kwargs', 'augment_pipe'}
    G = data['G_ema'].eval().requires_grad_(False)
    torch.manual_seed(0)
    z = torch.randn(2, G.z_dim)
    c = torch.eye(G.c_dim)[:2] if G.c_dim else None
    options = {'noise_mode': 'const', 'force_fp32': True}
    results = {'z': z, 'images': G(z, c, **options)}
    if data['D'] is not None:
        results['logits'] = data['D'].eval()(results['images'], c)
    if data['augment_pipe'] is not None:
        results['augmented'] = data['augment_pipe'].eval()(results['images'], debug_percentile=0.7)
    if G.mapping.num_layers:
        psi = {'truncation_psi': 0.5, 'truncation_cutoff': 2}
        ws = G.mapping(z, c, **psi)
        results['truncated'] = G.synthesis(ws, **options)
        assert torch.equal(results['truncated'], G(z, c, **psi, **options)) and G.mapping.w_avg is not None
    assert ws_shape(G, z, c) == [2, G.num_ws, G.w_dim]

    same = [copy.deepcopy(G), pickle.loads(pickle.dumps(G)), rebuilt(G, G.init_kwargs)]
    assert all(torch.equal(twin(z, c, **options), results['images']) for twin in same)
    kwargs = G.init_kwargs
    if 'synthesis_kwargs' in kwargs and 'num_fp16_res' in kwargs.synthesis_kwargs:
        kwargs.synthesis_kwargs.num_fp16_res, kwargs.synthesis_kwargs.conv_clamp = 4, 256
        results['half'] = rebuilt(G, kwargs)(z, c, noise_mode='const')
        results['noise'] = [name for name, _ in G.synthesis.named_buffers() if 'noise_const' in name]
        shapes = []
        G.synthesis.b8.conv0.register_forward_hook(lambda module, args, x: shapes.append(list(x.shape)))
        G(z, c, **options)
        results['features'] = shapes
    if data['G'] is not None:
        misc.copy_params_and_buffers(data['G_ema'], data['G'].requires_grad_(False), require_all=True)
        assert torch.equal(data['G'].eval()(z, c, **options), results['images'])
    assert not {name for name in sys.modules if name.startswith(('training', 'torch_utils.ops.layers'))}
    stream = io.BytesIO()
    torch.save(results, stream)
    with open(out, 'wb') as file:
        file.write(stream.getvalue())


def ws_shape(G, z, c):
    return list(G.mapping(z, c).shape)


def rebuilt(G, kwargs):
    twin = type(G)(*G.init_args, **kwargs).eval().requires_grad_(False)
    misc.copy_params_and_buffers(G, twin, require_all=True)
    return twin


if __name__ == '__main__':
    main(*sys.argv[1:])
