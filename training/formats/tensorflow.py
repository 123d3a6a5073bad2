# SPDX-License-Identifier: Apache-2.0
"""TensorFlow pickles of StyleGAN2 and StyleGAN2-ADA, converted to our networks."""
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnnlib.util import UserError
from torch_utils.pickles.arrays import StoredArray
from torch_utils.pickles.describe import TensorFlowNetwork, plain
from torch_utils.pickles.tensors import MAX_COPIES
from training.formats.rebuild import NETWORKS, Recipe, check_sizes, class_of, construct, shown

MIN_VERSION = 4  # 4: StyleGAN2, 5: StyleGAN2-ADA; those before are other architectures
ORDER = ('G', 'D', 'G_ema')  # of the three networks in a file
MAX_COMPONENTS = 100  # networks inside networks
MAX_VARIABLES = 10_000  # a network has a few hundred
MAX_NUMBERS_BYTES = 1 << 20  # of variables that are plain numbers

# Arguments: theirs -> (where ours goes, default).
Row = tuple[tuple[str, ...], Any]
GENERATOR: dict[str, Row] = {
    'latent_size': (('z_dim',), 512), 'label_size': (('c_dim',), 0), 'dlatent_size': (('w_dim',), 512),
    'resolution': (('img_resolution',), 1024), 'num_channels': (('img_channels',), 3),
    'mapping_layers': (('mapping_kwargs.num_layers',), 8),
    'label_fmaps': (('mapping_kwargs.embed_features',), None),
    'mapping_fmaps': (('mapping_kwargs.layer_features',), None),
    'mapping_nonlinearity': (('mapping_kwargs.activation',), 'lrelu'),
    'mapping_lrmul': (('mapping_kwargs.lr_multiplier',), 0.01),
    'w_avg_beta': (('mapping_kwargs.w_avg_beta',), 0.995),
    'fmap_base': (('synthesis_kwargs.channel_base',), 16384),
    'fmap_max': (('synthesis_kwargs.channel_max',), 512),
    'num_fp16_res': (('synthesis_kwargs.num_fp16_res',), 0),
    'conv_clamp': (('synthesis_kwargs.conv_clamp',), None),
    'architecture': (('synthesis_kwargs.architecture',), 'skip'),
    'resample_kernel': (('synthesis_kwargs.resample_filter',), [1, 3, 3, 1]),
    'use_noise': (('synthesis_kwargs.use_noise',), True),
    'nonlinearity': (('synthesis_kwargs.activation',), 'lrelu')}
DISCRIMINATOR: dict[str, Row] = {
    'label_size': (('c_dim',), 0), 'resolution': (('img_resolution',), 1024),
    'num_channels': (('img_channels',), 3), 'architecture': (('architecture',), 'resnet'),
    'fmap_base': (('channel_base',), 16384), 'fmap_max': (('channel_max',), 512),
    'num_fp16_res': (('num_fp16_res',), 0), 'conv_clamp': (('conv_clamp',), None),
    'mapping_fmaps': (
        ('cmap_dim', 'mapping_kwargs.embed_features', 'mapping_kwargs.layer_features'), None),
    'nonlinearity': (
        ('block_kwargs.activation', 'mapping_kwargs.activation', 'epilogue_kwargs.activation'), 'lrelu'),
    'resample_kernel': (('block_kwargs.resample_filter',), [1, 3, 3, 1]),
    'freeze_layers': (('block_kwargs.freeze_layers',), 0),
    'mapping_layers': (('mapping_kwargs.num_layers',), 0),
    'mapping_lrmul': (('mapping_kwargs.lr_multiplier',), 0.1),
    'mbstd_group_size': (('epilogue_kwargs.mbstd_group_size',), None),
    'mbstd_num_features': (('epilogue_kwargs.mbstd_num_channels',), 1)}
# Without influence on the output of the network itself.
IGNORED = {'Generator': {'truncation_psi', 'truncation_cutoff', 'style_mixing_prob', 'structure'},
           'Discriminator': {'structure'}}
ARGUMENTS = {'Generator': GENERATOR, 'Discriminator': DISCRIMINATOR}

# Modules: ours -> theirs, {0} being the first group; whether the kernel is stored reversed.
MODULES = {
    'Generator': [
        (r'mapping\.embed', 'mapping/LabelEmbed', False), (r'mapping\.fc(\d+)', 'mapping/Dense{0}', False),
        (r'synthesis\.b4\.conv1', 'synthesis/4x4/Conv', False),
        (r'synthesis\.b(\d+)\.conv0', 'synthesis/{0}x{0}/Conv0_up', True),
        (r'synthesis\.b(\d+)\.conv1', 'synthesis/{0}x{0}/Conv1', False),
        (r'synthesis\.b(\d+)\.torgb', 'synthesis/{0}x{0}/ToRGB', False),
        (r'synthesis\.b(\d+)\.skip', 'synthesis/{0}x{0}/Skip', True)],
    'Discriminator': [
        (r'mapping\.embed', 'LabelEmbed', False), (r'mapping\.fc(\d+)', 'Mapping{0}', False),
        (r'b4\.conv', '4x4/Conv', False), (r'b4\.fc', '4x4/Dense0', False), (r'b4\.out', 'Output', False),
        (r'b(\d+)\.fromrgb', '{0}x{0}/FromRGB', False), (r'b(\d+)\.conv0', '{0}x{0}/Conv0', False),
        (r'b(\d+)\.conv1', '{0}x{0}/Conv1_down', False), (r'b(\d+)\.skip', '{0}x{0}/Skip', False)]}
# Tensors of such a module.
LEAVES = {'weight': 'weight', 'bias': 'bias', 'noise_strength': 'noise_strength',
          'affine.weight': 'mod_weight', 'affine.bias': 'mod_bias'}


@dataclass(frozen=True)
class TensorFlowRecipe:
    """A TensorFlow network to be converted. name: of file and network, for error messages."""

    name: str
    class_name: str
    network: TensorFlowNetwork

    def build(self, force_fp16: bool = False) -> torch.nn.Module:
        """Our network with its values. Raises UserError if arguments or variables do not match."""
        variables = _variables(self.name, self.network)
        kwargs = self._arguments(variables)
        check_sizes(self.name, kwargs)
        # Built on the meta device to list its tensors; allocates nothing.
        twin = construct(self.name, class_of(self.name, self.class_name), kwargs)
        wanted = {name: like for name, like in twin.state_dict().items()
                  if not name.endswith('resample_filter')}
        # Many variables can be one array: what the network takes is compared before it is allocated.
        arrays = [value for value in variables.values() if isinstance(value, np.ndarray)]
        held = sum({array.ctypes.data: array.nbytes for array in arrays}.values())
        needed = sum(like.numel() * like.element_size() for like in wanted.values())
        if needed > MAX_COPIES * held + MAX_NUMBERS_BYTES:
            raise UserError(f'{self.name}: its arguments describe a network of {needed} bytes, of which the '
                            f'file holds {held}; it is damaged or forged')
        tensors = {name: self._tensor(name, like, variables) for name, like in wanted.items()}
        return Recipe(self.name, self.class_name, kwargs, tensors, has_filters=False).build(force_fp16)

    def _arguments(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments of our class."""
        given = plain(_member(self.name, self.network, 'static_kwargs', dict), self.name)
        rows = ARGUMENTS[self.class_name]
        unknown = [key for key in given if key not in rows and key not in IGNORED[self.class_name]]
        if unknown:
            raise UserError(f'{self.name}: the TensorFlow argument {shown(unknown[0])} has no counterpart; '
                            'only standard StyleGAN2 and StyleGAN2-ADA networks can be converted')
        kwargs: dict[str, Any] = {'mapping_kwargs': {}}
        for key, (places, default) in rows.items():
            value = given.get(key, default)
            # There fmap_base is divided by half the resolution.
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            value = int(value * 2) if key == 'fmap_base' and is_number else value
            value = 1 if key == 'w_avg_beta' and value is None else value
            for place in places:
                group, _, leaf = place.rpartition('.')
                (kwargs.setdefault(group, {}) if group else kwargs)[leaf] = value
        if self.class_name == 'Discriminator' and _has_levels_of_detail(variables):
            kwargs['architecture'] = 'orig'
        return kwargs

    def _tensor(self, name: str, like: torch.Tensor, variables: dict[str, Any]) -> torch.Tensor:
        """One of our tensors, shaped `like` this one, converted from its variable."""
        source, convert = _source_of(self.class_name, name, like.ndim)
        if source not in variables:
            raise UserError(f'{self.name}: there is no TensorFlow variable {shown(source)}, for {name}; the '
                            'network is of another architecture than its arguments say')
        try:
            if np.size(variables[source]) != like.numel():
                raise ValueError(f'{np.size(variables[source])} numbers instead of {like.numel()}')
            value = np.asarray(variables[source], dtype=np.float32)
            return torch.from_numpy(np.array(convert(value), dtype=np.float32, order='C'))
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise UserError(f'{self.name}: the TensorFlow variable {shown(source)} has the wrong shape for '
                            f'{name} ({shown(error)})') from error


def recipes(name: str, held: Any) -> dict[str, TensorFlowRecipe]:
    """The networks in a pickled tuple (G, D, Gs). Raises UserError if it is none, or of an older program."""
    if not isinstance(held, tuple) or len(held) != 3 or not all(is_tensorflow(net) for net in held):
        raise UserError(f'{name}: not the three TensorFlow networks (G, D, Gs) of StyleGAN2')
    for net in held:
        version = _member(name, net, 'version', int)
        if version < MIN_VERSION:
            raise UserError(f'{name}: TensorFlow networks of format {version}; only those of StyleGAN2 and '
                            f'StyleGAN2-ADA, format {MIN_VERSION} and up, can be converted')
    classes = {'G': 'Generator', 'D': 'Discriminator', 'G_ema': 'Generator'}
    assert set(ORDER) == set(NETWORKS)
    return {key: TensorFlowRecipe(f'{name}: {key}', classes[key], net)
            for key, net in zip(ORDER, held, strict=True)}


def is_tensorflow(value: Any) -> bool:
    """Whether this part of a pickle is a TensorFlow network, or a tuple with one."""
    if isinstance(value, tuple):
        return any(isinstance(item, TensorFlowNetwork) for item in value)
    return isinstance(value, TensorFlowNetwork)


def _member(name: str, net: TensorFlowNetwork, key: str, kind: type) -> Any:
    value = net.state.get(key)
    if not isinstance(value, kind):
        raise UserError(f'{name}: {key} of a TensorFlow network is a {type(value).__name__}, not a '
                        f'{kind.__name__}; the file is damaged')
    return value


def _variables(name: str, network: TensorFlowNetwork) -> dict[str, Any]:
    """Numbers and arrays of a network and its components, by their full names with slashes."""
    found: dict[str, Any] = {}
    pending = [('', network)]
    for _ in range(MAX_COMPONENTS):
        prefix, net = pending.pop()
        for item in _member(name, net, 'variables', list):
            if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], str):
                raise UserError(f'{name}: a TensorFlow variable without name or value; the file is damaged')
            if isinstance(item[1], (StoredArray, int, float)):
                found[prefix + item[0]] = item[1]
        for key, component in _member(name, net, 'components', dict).items():
            if not isinstance(component, TensorFlowNetwork):
                raise UserError(f'{name}: the component {shown(key)} is not a TensorFlow network')
            pending.append((f'{prefix}{key}/', component))
        if len(found) > MAX_VARIABLES:
            break
        if not pending:
            return _renamed({key: v.array() if isinstance(v, StoredArray) else v for key, v in found.items()})
    raise UserError(f'{name}: too many nested TensorFlow networks or variables')


def _renamed(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables, with FromRGB layers named by resolution instead of by level of detail (StyleGAN1)."""
    found = dict(variables)
    resolutions = [int(key.split('x')[0]) for key in variables
                   if re.fullmatch(r'\d{1,7}x\d+/Conv0/weight', key)]
    for key, value in variables.items():
        match = re.fullmatch(r'FromRGB_lod(\d{1,2})/(weight|bias)', key)
        if match and resolutions:
            resolution = max(resolutions) >> int(match[1])
            found[f'{resolution}x{resolution}/FromRGB/{match[2]}'] = value
    return found


def _has_levels_of_detail(variables: Mapping[str, Any]) -> bool:
    return any(key.startswith('FromRGB_lod') for key in variables)


Convert = Callable[[np.ndarray], np.ndarray]


def _source_of(class_name: str, name: str, ndim: int) -> tuple[str, Convert]:
    """(TensorFlow variable, conversion) for one of our tensors of `ndim` axes."""
    noise = re.fullmatch(r'synthesis\.b(\d+)\.conv([01])\.noise_const', name)
    if name == 'mapping.w_avg':
        return 'dlatent_avg', _same
    if name == 'synthesis.b4.const':
        return 'synthesis/4x4/Const/const', lambda value: value.squeeze(0)
    if noise:
        level, layer = int(math.log2(int(noise[1]))), int(noise[2])
        return f'synthesis/noise{2 * level - 5 + layer}', lambda value: value[0, 0]
    for pattern, theirs, is_reversed in MODULES[class_name]:
        match = re.fullmatch(pattern + r'\.(weight|bias|noise_strength|affine\.weight|affine\.bias)', name)
        if match:
            *groups, leaf = match.groups()
            return f'{theirs.format(*groups)}/{LEAVES[leaf]}', _conversion(leaf, ndim, is_reversed)
    return name, _same


def _conversion(leaf: str, ndim: int, is_reversed: bool) -> Convert:
    if leaf == 'affine.bias':
        return lambda value: value + 1
    if ndim == 2:
        return np.transpose
    if ndim == 4:
        rows = slice(None, None, -1 if is_reversed else 1)
        return lambda value: value[rows, rows].transpose(3, 2, 0, 1)
    return _same


def _same(value: np.ndarray) -> np.ndarray:
    return value
