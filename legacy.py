# SPDX-License-Identifier: Apache-2.0
"""Opens network files, official and own: rebuilt from arguments and tensors, none of their code is run."""
import inspect
import math
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

import dnnlib
from dnnlib.util import UserError
from torch_utils import safe_pickle
from torch_utils.safe_pickle import ModuleDescription
from training import augment, networks

NETWORKS = ('G', 'D', 'G_ema')
KEYS = (*NETWORKS, 'training_set_kwargs', 'augment_pipe')
CLASSES = {
    'Generator': networks.Generator, 'Discriminator': networks.Discriminator,
    'AugmentPipe': augment.AugmentPipe}
FP16_SETTINGS = {'num_fp16_res': 4, 'conv_clamp': 256}

# StyleGAN3's version of the same networks has other defaults, and G's synthesis arguments beside the others.
S3_MARK = 'fused_modconv_default'
S3_DEFAULTS = {'num_fp16_res': 4, 'conv_clamp': 256}
S3_MAPPING_DEFAULTS = {'w_avg_beta': 0.998}
GENERATOR_ARGUMENTS = ('z_dim', 'c_dim', 'w_dim', 'img_resolution', 'img_channels', 'mapping_kwargs',
                       'synthesis_kwargs')

# The largest arguments that are believed, so that no forged file can ask for more than memory and time allow.
MAX_ARGUMENT = 2 ** 20
MAX_LAYERS = 1000


def load_network(
    path_or_url: str, *, trust_pickle: bool = False, force_fp16: bool = False, only: Collection[str] = KEYS,
) -> dnnlib.EasyDict:
    """Contents of a network file or URL: G, D, G_ema, training_set_kwargs, augment_pipe; None where missing.

    Networks are on the CPU, in eval mode, without gradients. Nothing in the file is executed unless
    trust_pickle, which is for files of your own or of somebody you trust.
    force_fp16: G, D and G_ema get num_fp16_res=4 and conv_clamp=256.  only: build nothing but these.
    Raises UserError naming the file if it is missing, no network file, or asks for anything else than one.
    """
    with dnnlib.util.open_url(str(path_or_url)) as file:
        return _load(file, str(path_or_url), trust_pickle=trust_pickle, force_fp16=force_fp16, only=only)


def load_network_pkl(f: BinaryIO, force_fp16: bool = False) -> dnnlib.EasyDict:
    """As load_network, from an open binary file; nothing in it is executed."""
    name = str(getattr(f, 'name', 'network pickle'))
    return _load(f, name, trust_pickle=False, force_fp16=force_fp16, only=KEYS)


def _load(
    file: BinaryIO, name: str, *, trust_pickle: bool, force_fp16: bool, only: Collection[str],
) -> dnnlib.EasyDict:
    if trust_pickle:
        return _load_by_execution(file, name, force_fp16)
    # The description is inert: from here on only our own classes are constructed.
    held = safe_pickle.load(file, name)
    _check_contents(name, held, ModuleDescription)
    found = dnnlib.EasyDict(dict.fromkeys(KEYS))
    for key in (*NETWORKS, 'augment_pipe'):
        if held.get(key) is not None and key in only:
            found[key] = _Blueprint(f'{name}: {key}', held[key]).build(force_fp16 and key in NETWORKS)
    if isinstance(held.get('training_set_kwargs'), dict):
        found.training_set_kwargs = held['training_set_kwargs']
    return found


def _load_by_execution(file: BinaryIO, name: str, force_fp16: bool) -> dnnlib.EasyDict:
    """What pickle.load gives: the classes whose source text lies in the file."""
    if force_fp16:
        raise UserError('--trust-pickle cannot be combined with a change to fp16: the file has its classes')
    try:
        held = pickle.load(file)
    except (pickle.UnpicklingError, EOFError, ImportError, AttributeError, LookupError, TypeError, ValueError,
            RuntimeError) as error:
        raise UserError(f'{name}: cannot be unpickled ({error}); without --trust-pickle, official networks '
                        'open whatever code they were made with') from error
    _check_contents(name, held, torch.nn.Module)
    found = dnnlib.EasyDict({key: held.get(key) for key in KEYS})
    for key in NETWORKS:
        if isinstance(found[key], torch.nn.Module):
            found[key] = found[key].eval().requires_grad_(requires_grad=False)
    return found


def _check_contents(name: str, held: Any, kind: type) -> None:
    if not isinstance(held, dict) or not any(isinstance(held.get(key), kind) for key in NETWORKS):
        raise UserError(f'{name}: holds no networks; a network pickle has the keys G, D and G_ema')


@dataclass(frozen=True)
class _Blueprint:
    """A described module to be rebuilt with our classes. name: of file and network, for error messages."""

    name: str
    described: ModuleDescription

    def build(self, force_fp16: bool) -> torch.nn.Module:
        """The module with the file's tensors, in eval mode, without gradients. UserError if it differs."""
        cls = self._find_class()
        kwargs, net = self._reproduce(cls)
        if force_fp16:
            net = self._construct(cls, _with_fp16(cls, kwargs))
        self._fill(net)
        return net.eval().requires_grad_(requires_grad=False)

    def _find_class(self) -> type[torch.nn.Module]:
        if not isinstance(self.described, ModuleDescription):
            raise UserError(f'{self.name} is a {type(self.described).__name__}, not a network')
        # A StyleGAN3 generator has the same class name; its synthesis network starts with a child `input`.
        synthesis = self.described.children.get('synthesis')
        if synthesis is not None and 'input' in synthesis.children:
            raise UserError(f'{self.name} is a StyleGAN3 generator; only StyleGAN2 networks can be rebuilt '
                            '(those of the StyleGAN3 program too, if trained with --cfg=stylegan2)')
        if self.described.class_name not in CLASSES:
            raise UserError(f'{self.name} is of class {_shown(self.described.class_name)}; only '
                            f'{", ".join(CLASSES)} can be rebuilt without running the code in the file')
        return CLASSES[self.described.class_name]

    def _reproduce(self, cls: type[torch.nn.Module]) -> tuple[dict[str, Any], torch.nn.Module]:
        """Our arguments and the network made of them: the first reading of the file's arguments that fits."""
        problem = ''
        for kwargs in self._readings(cls):
            net = self._construct(cls, kwargs)
            difference = _difference(net, self.described)
            if difference is None:
                return kwargs, net
            problem = problem or difference
        raise UserError(f'{self.name}: {problem}; it was changed after its construction, or is of another '
                        'program. --trust-pickle would run its own code; only if you trust its origin')

    def _readings(self, cls: type[torch.nn.Module]) -> list[dict[str, Any]]:
        """Keyword arguments for our class, with the defaults of each program that may have written them."""
        names = list(inspect.signature(cls).parameters)
        kwargs = {**dict(zip(names, self.described.init_args, strict=False)), **self.described.init_kwargs}
        _check_sizes(self.name, kwargs)
        if cls is networks.Generator:
            is_s3 = any(S3_MARK in module.attributes for _, module in self.described.modules())
            return [_s3_generator_arguments(kwargs) if is_s3 else kwargs]
        # A discriminator bears no mark; which defaults were meant shows in the attributes of its layers.
        if cls is networks.Discriminator:
            return [kwargs, {**S3_DEFAULTS, **kwargs}]
        return [kwargs]

    def _construct(self, cls: type[torch.nn.Module], kwargs: dict[str, Any]) -> torch.nn.Module:
        # On the meta device nothing is allocated or drawn: the tensors come from the file. The augmentation
        # computes its filters with NumPy and is small.
        device = 'cpu' if cls is augment.AugmentPipe else 'meta'
        try:
            with torch.device(device):
                return cls(**kwargs)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError,
                RuntimeError) as error:
            raise UserError(f'{self.name}: {cls.__name__} cannot be constructed from its arguments '
                            f'({_shown(error)})') from error

    def _fill(self, net: torch.nn.Module) -> None:
        """Put the tensors of the file in the place of those of the network."""
        ours, theirs = net.state_dict(), self.described.state()
        wrong = [name for name in {**ours, **theirs}
                 if name not in ours or name not in theirs or tuple(ours[name].shape) != theirs[name].shape]
        if wrong:
            raise UserError(f'{self.name}: {len(wrong)} tensors are missing, superfluous or of another shape '
                            f'than its arguments say, first {_shown(wrong[0])}')
        tensors = {name: stored.tensor().to(ours[name].dtype) for name, stored in theirs.items()}
        # Assigned, not copied: keeps the memory layout of the file.
        net.load_state_dict(tensors, assign=True)


def _s3_generator_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """StyleGAN3's arguments as ours: those of the synthesis network gathered, its defaults written out."""
    flat = {name: value for name, value in kwargs.items() if name not in (*GENERATOR_ARGUMENTS, S3_MARK)}
    synthesis = {**S3_DEFAULTS, **flat, **kwargs.get('synthesis_kwargs', {})}
    mapping = {**S3_MAPPING_DEFAULTS, **kwargs.get('mapping_kwargs', {})}
    common = {name: value for name, value in kwargs.items() if name in GENERATOR_ARGUMENTS}
    return {**common, 'mapping_kwargs': mapping, 'synthesis_kwargs': synthesis}


def _with_fp16(cls: type[torch.nn.Module], kwargs: dict[str, Any]) -> dict[str, Any]:
    if cls is networks.Generator:
        return {**kwargs, 'synthesis_kwargs': {**(kwargs.get('synthesis_kwargs') or {}), **FP16_SETTINGS}}
    return {**kwargs, **FP16_SETTINGS}


def _check_sizes(name: str, value: Any, key: str = '') -> None:
    """Raise UserError for arguments that only a forged file can have."""
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_sizes(name, item, str(inner))
    elif isinstance(value, (list, tuple)):
        for item in value[:MAX_LAYERS]:
            _check_sizes(name, item, key)
    limit = MAX_LAYERS if key == 'num_layers' or isinstance(value, (list, tuple)) else MAX_ARGUMENT
    size = len(value) if isinstance(value, (list, tuple)) else value
    if isinstance(size, int) and size > limit:
        raise UserError(f'{name}: the argument {_shown(key)} is beyond the limit of {limit}')


def _difference(net: torch.nn.Module, described: ModuleDescription) -> str | None:
    """The first difference between our modules and the described ones, in classes or plain attributes."""
    # Attributes such as clamps and gains decide the numbers, and are not in the state dict.
    ours, theirs = dict(net.named_modules()), dict(described.modules())
    if set(ours) != set(theirs):
        return f'the submodule {_shown(min(set(ours) ^ set(theirs)))} is missing or superfluous'
    for prefix, module in theirs.items():
        twin = ours[prefix]
        if type(twin).__name__ != module.class_name:
            return f'{prefix} is of class {_shown(module.class_name)}, not {type(twin).__name__}'
        for name, value in module.attributes.items():
            if name != 'training' and hasattr(twin, name) and not _same(getattr(twin, name), value):
                return f'{f"{prefix}.{name}".lstrip(".")} is {_shown(value)}, not as its arguments say'
    return None


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, (int, float, np.number)) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return type(ours) is type(theirs) and ours == theirs


def _shown(value: Any) -> str:
    """Text from a file for a message: short, one line, nothing that a terminal would obey."""
    return ''.join(c if c.isascii() and c.isprintable() else '?' for c in str(value))[:100]
