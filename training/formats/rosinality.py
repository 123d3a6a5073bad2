# SPDX-License-Identifier: Apache-2.0
"""Reads and writes checkpoints in the layout of rosinality's stylegan2-pytorch.

A torch.save'd dict with state dicts under g_ema, g and d, and the average w under latent_avg. Networks in it
are unconditional and square, G of architecture skip, D of architecture resnet.
"""
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dnnlib.util import UserError, replace_file
from torch_utils.pickles.describe import explained
from torch_utils.pickles.tensors import StoredTensor, make_tensors
from training import networks
from training.formats.rebuild import Recipe, arguments_of, shown

STATE_KEYS = {'G': 'g', 'D': 'd', 'G_ema': 'g_ema'}
UP_GAIN = 4  # their upsampling filters include the gain
AVERAGE_SAMPLES, AVERAGE_SEED = 4096, 0  # used if a file lacks the average w
MAX_KEY = 40  # characters of the name of a tensor; Python refuses to read numbers of thousands of digits
FIXED_D = {'mbstd_group_size': 4, 'mbstd_num_channels': 1}
# Arguments of their networks, which are constants in their scripts or have these usual values.
THEIR_STYLE_DIM, THEIR_N_MLP, THEIR_MIN_SIZE, THEIR_MULTIPLIERS = 512, 8, 8, (2, 1, 4)
Tensors = dict[str, torch.Tensor]

# Parts of a synthesis or torgb layer: ours -> (theirs, number of leading axes of size 1).
LAYER = {
    'weight': ('conv.weight', 1), 'affine.weight': ('conv.modulation.weight', 0),
    'affine.bias': ('conv.modulation.bias', 0), 'noise_strength': ('noise.weight', 1),
    'bias': ('activate.bias', 0)}
TORGB = {**{part: LAYER[part] for part in ('weight', 'affine.weight', 'affine.bias')}, 'bias': ('bias', 0)}


def read(held: Any, name: str) -> dict[str, Recipe]:
    """key -> recipe of that network. held: of torch_file.load. Raises UserError for another layout."""
    if not isinstance(held, dict):
        kind = 'single tensor' if isinstance(held, StoredTensor) else type(held).__name__
        raise UserError(f'{name}: holds a {kind}, not the state dicts of networks')
    recipes = {}
    for key, theirs in STATE_KEYS.items():
        state = held.get(theirs)
        if isinstance(state, dict) and state:
            tensors = _tensors(f'{name}: {theirs}', state)
            recipes[key] = (_discriminator(f'{name}: {key}', tensors) if key == 'D' else
                            _generator(f'{name}: {key}', tensors, held.get('latent_avg')))
    if not recipes:
        raise UserError(f'{name}: holds none of g_ema, g and d; files of torch.save can be read if they hold '
                        'whole networks, a training state of train.py, or the layout of rosinality (tensors '
                        'alone do not tell which network they belong to)')
    return recipes


def write(path: str | os.PathLike, contents: Mapping[str, Any]) -> list[str]:
    """Write G_ema, G and D of the result of load_network(); returns notes on what is lost.

    Raises UserError if there is no generator, one does not fit the layout, or the file cannot be written.
    """
    held, notes = {}, []
    for key, theirs in STATE_KEYS.items():
        net = contents.get(key)
        if net is None:
            continue
        problem = next(_obstacles(f'{path}: {key}', key, net), None)
        if problem is None:
            held[theirs] = _their_d_state(net) if key == 'D' else _their_g_state(net)
            notes += _losses(key, net)
        elif key == 'D':
            notes.append(f'D is dropped: {problem}')
        else:
            raise UserError(f'{path}: {key} does not fit the layout of rosinality: {problem}')
    best = contents.get('G_ema') or contents.get('G')
    if best is None:
        raise UserError(f'{path}: there is no generator to write')
    held['latent_avg'] = best.mapping.w_avg.detach().clone()
    with replace_file(path) as temporary:
        torch.save(held, temporary)
    return notes


def program_note(contents: Mapping[str, Any]) -> str:
    """For which arguments the program of rosinality constructs what write() wrote, or that it cannot."""
    G, D = contents.get('G_ema') or contents.get('G'), contents.get('D')
    size = G.img_resolution
    widths = {level: getattr(G.synthesis, f'b{level}').conv1.weight.shape[0]
              for level in G.synthesis.block_resolutions}
    multiplier = next((m for m in THEIR_MULTIPLIERS if widths == _their_widths(size, m)), None)
    if multiplier is None:
        plain = ', '.join(f'{level}: {width}' for level, width in widths.items())
        return ('The program of rosinality cannot construct this generator: its feature maps per resolution '
                f'({plain}) follow from no channel_multiplier; others that read the layout may')
    note = (f'The program of rosinality reads it with size={size}, style_dim={G.w_dim}, '
            f'n_mlp={G.mapping.num_layers}, channel_multiplier={multiplier}')
    if D is not None and next(_obstacles('', 'D', D), None) is None and {
            level: _width_of(D, level) for level in widths} != widths:
        note += '; d does not fit, as D has other feature maps than G'
    if G.w_dim != THEIR_STYLE_DIM or G.mapping.num_layers != THEIR_N_MLP:
        note += f' (its scripts fix style_dim={THEIR_STYLE_DIM} and n_mlp={THEIR_N_MLP}: change them there)'
    return note


def _their_widths(size: int, multiplier: int) -> dict[int, int]:
    levels = [2 ** i for i in range(2, size.bit_length())]
    return {level: 512 if level < 64 else 512 * 32 // level * multiplier for level in levels}


def _width_of(D: torch.nn.Module, level: int) -> int:
    """Feature maps at the entrance of a level."""
    block = getattr(D, f'b{level}')
    return (block.conv if level == 4 else block.conv0).weight.shape[0 if level == 4 else 1]


def _tensors(name: str, state: dict) -> Tensors:
    wrong = [key for key, t in state.items() if not isinstance(key, str) or not isinstance(t, StoredTensor)]
    if wrong:
        raise UserError(f'{name}: {shown(wrong[0])} is not a tensor')
    with explained(name):
        return make_tensors(state)


def _generator(name: str, theirs: Tensors, average: Any) -> Recipe:
    try:
        w_dim, z_dim = theirs['style.1.weight'].shape
        channels = [theirs['conv1.conv.weight'].shape[1]]
        channels += [t.shape[1] for k, t in _sorted(theirs, r'convs\.\d*[02468]\.conv\.weight')]
        rgb = theirs['to_rgb1.conv.weight'].shape[1]
    except (LookupError, ValueError) as error:
        raise UserError(f'{name}: not the layout of rosinality ({shown(error)})') from error
    num_layers = len(_sorted(theirs, r'style\.\d+\.weight'))
    kwargs = {
        'z_dim': z_dim, 'c_dim': 0, 'w_dim': w_dim, 'img_resolution': 4 * 2 ** (len(channels) - 1),
        'img_channels': rgb, 'mapping_kwargs': {'num_layers': num_layers},
        'synthesis_kwargs': _channel_arguments(channels)}
    tensors = {}
    for ours, key, axes in _generator_names(len(channels), num_layers):
        if key not in theirs:
            raise UserError(f'{name}: there is no {key}; not the layout of rosinality')
        is_rgb_bias = ours.endswith('torgb.bias')
        tensors[ours] = (
            theirs[key].flatten() if is_rgb_bias else _trimmed(f'{name}: {key}', theirs[key], axes))
    recipe = Recipe(name, 'Generator', kwargs, tensors, has_filters=False)
    if isinstance(average, StoredTensor):
        return _with_average(recipe, average.tensor().flatten())
    return _with_average(recipe, _estimated_average(_with_average(recipe, torch.zeros([w_dim]))))


def _trimmed(name: str, value: torch.Tensor, axes: int) -> torch.Tensor:
    """The tensor without its leading `axes`, which must be of size 1."""
    if tuple(value.shape[:axes]) != (1,) * axes:
        raise UserError(f'{name} has the shape {list(value.shape)}; not the layout of rosinality')
    return value.reshape(value.shape[axes:])


def _with_average(recipe: Recipe, average: torch.Tensor) -> Recipe:
    tensors = {**recipe.tensors, 'mapping.w_avg': average}
    return Recipe(recipe.name, recipe.class_name, recipe.kwargs, tensors, recipe.has_filters)


@torch.no_grad()
def _estimated_average(recipe: Recipe) -> torch.Tensor:
    """The mean of w over latents from a fixed seed, as that program estimates it."""
    G = recipe.build()
    z = torch.randn([AVERAGE_SAMPLES, G.z_dim], generator=torch.Generator().manual_seed(AVERAGE_SEED))
    return G.mapping(z, None)[:, 0].mean(dim=0)


def _discriminator(name: str, theirs: Tensors) -> Recipe:
    try:
        channels = [theirs['convs.0.0.weight'].shape[0]]
        channels += [t.shape[0] for _, t in _sorted(theirs, r'convs\.\d+\.conv2\.1\.weight')]
        kwargs = {
            'c_dim': 0, 'img_resolution': 4 * 2 ** (len(channels) - 1),
            'img_channels': theirs['convs.0.0.weight'].shape[1], 'epilogue_kwargs': FIXED_D,
            **_channel_arguments(channels[::-1])}
        tensors = {ours: theirs[key] for ours, key in _discriminator_names(len(channels))}
    except LookupError as error:
        raise UserError(f'{name}: there is no {shown(error)}; not the layout of rosinality') from error
    return Recipe(name, 'Discriminator', kwargs, tensors, has_filters=False)


def _channel_arguments(channels: list[int]) -> dict[str, int]:
    """channel_base and channel_max that give these channels at resolutions 4, 8, ...; not checked here."""
    top = 4 * 2 ** (len(channels) - 1)
    return {'channel_base': channels[-1] * top, 'channel_max': max(channels)}


def _sorted(theirs: Tensors, pattern: str) -> list[tuple[str, torch.Tensor]]:
    """The matching tensors, ordered by the first number in their names."""
    found = [(key, tensor) for key, tensor in theirs.items()
             if len(key) <= MAX_KEY and re.fullmatch(pattern, key)]
    return sorted(found, key=lambda item: int(re.search(r'\d+', item[0].partition('.')[2])[0]))


def _generator_names(num_levels: int, num_layers: int) -> Iterator[tuple[str, str, int]]:
    """(ours, theirs, number of leading axes of size 1 of theirs) of all tensors but filters and average."""
    for i in range(num_layers):
        for leaf in ('weight', 'bias'):
            yield f'mapping.fc{i}.{leaf}', f'style.{i + 1}.{leaf}', 0
    yield 'synthesis.b4.const', 'input.input', 1
    layers = [('b4.conv1', 'conv1')]
    for k in range(num_levels - 1):
        layers += [(f'b{8 << k}.conv0', f'convs.{2 * k}'), (f'b{8 << k}.conv1', f'convs.{2 * k + 1}')]
    for j, (ours, theirs) in enumerate(layers):
        yield f'synthesis.{ours}.noise_const', f'noises.noise_{j}', 2
        for part, (their_part, axes) in LAYER.items():
            yield f'synthesis.{ours}.{part}', f'{theirs}.{their_part}', axes
    colours = [('b4', 'to_rgb1'), *[(f'b{8 << k}', f'to_rgbs.{k}') for k in range(num_levels - 1)]]
    for ours, theirs in colours:
        for part, (their_part, axes) in TORGB.items():
            yield f'synthesis.{ours}.torgb.{part}', f'{theirs}.{their_part}', axes


def _discriminator_names(num_levels: int) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of all tensors but the filters."""
    top = 4 << (num_levels - 1)
    yield f'b{top}.fromrgb.weight', 'convs.0.0.weight'
    yield f'b{top}.fromrgb.bias', 'convs.0.1.bias'
    for m in range(1, num_levels):
        ours, theirs = f'b{top >> (m - 1)}', f'convs.{m}'
        # In their lists of layers, conv2 and skip begin with a filter.
        for i in (0, 1):
            yield f'{ours}.conv{i}.weight', f'{theirs}.conv{i + 1}.{i}.weight'
            yield f'{ours}.conv{i}.bias', f'{theirs}.conv{i + 1}.{i + 1}.bias'
        yield f'{ours}.skip.weight', f'{theirs}.skip.1.weight'
    yield from [('b4.conv.weight', 'final_conv.0.weight'), ('b4.conv.bias', 'final_conv.1.bias')]
    for ours, theirs in (('b4.fc', 'final_linear.0'), ('b4.out', 'final_linear.1')):
        yield from [(f'{ours}.weight', f'{theirs}.weight'), (f'{ours}.bias', f'{theirs}.bias')]


def _their_g_state(net: torch.nn.Module) -> Tensors:
    ours, num_levels = net.state_dict(), len(net.synthesis.block_resolutions)
    state = {}
    for name, key, axes in _generator_names(num_levels, net.mapping.num_layers):
        value = ours[name][None, :, None, None] if name.endswith('torgb.bias') else ours[name]
        state[key] = value.reshape([1] * axes + list(value.shape)).contiguous()
    for k in range(num_levels - 1):
        kernel = ours[f'synthesis.b{8 << k}.resample_filter'] * UP_GAIN
        state[f'convs.{2 * k}.conv.blur.kernel'] = kernel
        state[f'to_rgbs.{k}.upsample.kernel'] = kernel.clone()
    return state


def _their_d_state(net: torch.nn.Module) -> Tensors:
    ours, num_levels = net.state_dict(), len(net.block_resolutions) + 1
    state = {key: ours[name].contiguous() for name, key in _discriminator_names(num_levels)}
    for m in range(1, num_levels):
        kernel = ours[f'b{net.img_resolution >> (m - 1)}.resample_filter']
        state[f'convs.{m}.conv2.0.kernel'], state[f'convs.{m}.skip.0.kernel'] = kernel.clone(), kernel.clone()
    return state


def _obstacles(name: str, key: str, net: torch.nn.Module) -> Iterator[str]:
    """Reasons why the layout cannot represent a network."""
    if not isinstance(net, networks.Generator | networks.Discriminator):
        yield f'it is a {type(net).__name__}, not a StyleGAN2 network'
        return
    kwargs = arguments_of(name, net)
    size = kwargs['img_resolution']
    if not isinstance(size, int) or not math.log2(size).is_integer() or kwargs['c_dim']:
        yield 'it is conditional, or its images are not square with a power-of-two side'
        return
    if size < THEIR_MIN_SIZE:
        yield f'its images are smaller than {THEIR_MIN_SIZE}x{THEIR_MIN_SIZE}'
        return
    if kwargs['img_channels'] != 3:
        yield f'its images have {kwargs["img_channels"]} channels instead of 3'
    expected = _expected_d(net) if key == 'D' else _expected_g(net)
    yield from (f'{what} is {shown(value)} instead of {wanted}' for what, value, wanted in expected
                if value != wanted)


def _expected_g(net: torch.nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(what, its value, the only value that the layout supports)."""
    mapping, last = net.mapping, net.synthesis.b4.conv1
    yield 'the architecture', net.synthesis.b4.architecture, 'skip'
    yield 'use_noise', last.use_noise, True
    yield 'the activation', {last.activation, mapping.fc0.activation}, {'lrelu'}
    yield 'the filter', list(net.synthesis.b8.resample_filter.shape), [4, 4]
    yield 'lr_multiplier of the mapping', mapping.fc0.bias_gain, 0.01
    yield 'z_dim', mapping.z_dim, mapping.w_dim
    yield 'w_avg_beta', mapping.w_avg_beta is None, False
    yield 'a layer width of the mapping', {layer.shape[0] for layer in mapping.parameters()}, {mapping.w_dim}


def _expected_d(net: torch.nn.Module) -> Iterator[tuple[str, Any, Any]]:
    std = net.b4.mbstd
    yield 'the architecture', net.b4.architecture, 'resnet'
    yield 'the activation', {net.b8.conv0.activation, net.b4.conv.activation}, {'lrelu'}
    yield 'the filter', list(net.b8.resample_filter.shape), [4, 4]
    yield 'the number of minibatch-std features', std and std.num_channels, FIXED_D['mbstd_num_channels']


def _losses(key: str, net: torch.nn.Module) -> list[str]:
    """Notes on what may change images or logits."""
    clamps = any(getattr(module, 'conv_clamp', None) is not None for module in net.modules())
    notes = [f'{key}: conv_clamp and float16 are lost'] if clamps else []
    if key == 'D' and net.b4.mbstd.group_size != FIXED_D['mbstd_group_size']:
        notes.append(f'D: minibatch-std groups of {net.b4.mbstd.group_size} become groups of 4')
    return notes
