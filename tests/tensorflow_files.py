# SPDX-License-Identifier: Apache-2.0
"""TensorFlow network pickles, made from networks of ours: the conversion backwards, written independently."""
import pickle
import re
import sys
import types

import numpy as np
from small_networks import small_discriminator, small_generator

STATIC = {'num_channels': 3, 'resolution': 16, 'label_size': 0, 'fmap_base': 32, 'fmap_max': 8}
G_STATIC = {**STATIC, 'latent_size': 8, 'dlatent_size': 8, 'mapping_layers': 2}
D_STATIC = {**STATIC, 'mbstd_group_size': 4}


class Network:
    """What the pickles name dnnlib.tflib.network.Network."""

    def __init__(self, **state):
        self.__dict__.update(state)


Network.__module__ = 'dnnlib.tflib.network'


def network(static, variables, components=None, version=5):
    """A network as it is pickled; its source text is a trap."""
    return Network(version=version, name='G', static_kwargs=static, components=components or {},
                   build_module_src='raise RuntimeError("it ran")', build_func_name='f', variables=variables)


def generator_network(G, static=None, version=5):
    """A TensorFlow generator with the numbers of G (architecture skip)."""
    parts = {'mapping': [], 'synthesis': [('lod', np.float32(0))]}
    average = []
    for name, tensor in G.state_dict().items():
        value = tensor.numpy()
        if name == 'mapping.w_avg':
            average = [('dlatent_avg', value)]
        elif name == 'synthesis.b4.const':
            parts['synthesis'].append(('4x4/Const/const', value[None]))
        elif not name.endswith('resample_filter'):
            part, rest = name.split('.', 1)
            parts[part].append(theirs(rest, value))
    components = {part: network({}, variables, version=version) for part, variables in parts.items()}
    return network(G_STATIC if static is None else static, average, components, version)


def theirs(name, value):
    """(variable, numbers) inside its component."""
    layer = re.fullmatch(r'fc(\d+)\.(weight|bias)', name)
    if layer:
        return f'Dense{layer[1]}/{layer[2]}', value.T
    level, module, leaf = re.fullmatch(r'b(\d+)\.(\w+)\.(.+)', name).groups()
    size = f'{level}x{level}'
    if leaf == 'noise_const':
        index = 0 if level == '4' else 2 * int(np.log2(int(level))) - 5 + (module == 'conv1')
        return f'noise{index}', value[None, None]
    there = {'conv0': 'Conv0_up', 'conv1': 'Conv' if level == '4' else 'Conv1', 'torgb': 'ToRGB'}[module]
    if leaf == 'affine.weight':
        return f'{size}/{there}/mod_weight', value.T
    if leaf == 'affine.bias':
        return f'{size}/{there}/mod_bias', value - 1
    if leaf == 'weight':
        value = value.transpose(2, 3, 1, 0)
        value = value[::-1, ::-1] if module == 'conv0' else value
    return f'{size}/{there}/{leaf}', np.float32(value) if value.ndim == 0 else value


def discriminator_network(D, static=None, by_lod=False):
    """A TensorFlow discriminator with the numbers of D. by_lod: FromRGB named by level of detail."""
    variables = []
    names = {'conv0': 'Conv0', 'conv1': 'Conv1_down', 'skip': 'Skip', 'fromrgb': 'FromRGB', 'conv': 'Conv',
             'fc': 'Dense0'}
    for name, tensor in D.state_dict().items():
        level, module, leaf = re.fullmatch(r'b(\d+)\.(?:(\w+)\.)?(\w+)', name).groups()
        if leaf == 'resample_filter':
            continue
        value = tensor.numpy()
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        prefix = f'{level}x{level}/{names.get(module)}'
        if module == 'fromrgb' and by_lod:
            prefix = f'FromRGB_lod{int(np.log2(D.img_resolution // int(level)))}'
        variables.append((f'{"Output" if module == "out" else prefix}/{leaf}', value))
    return network(D_STATIC if static is None else static, variables)


def tensorflow_pickle(G=None, D=None, Gs=None, protocol=4):
    """Bytes of a file with these networks; small ones where none are given."""
    stub = types.ModuleType('dnnlib.tflib.network')
    stub.Network = Network
    held = (generator_network(small_generator()) if G is None else G,
            discriminator_network(small_discriminator()) if D is None else D,
            generator_network(small_generator()) if Gs is None else Gs)
    sys.modules[stub.__name__] = stub
    try:
        return pickle.dumps(held, protocol=protocol)
    finally:
        del sys.modules[stub.__name__]
