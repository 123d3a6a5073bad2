# SPDX-License-Identifier: Apache-2.0
"""Network pickles (official, StyleGAN3's and own), rebuilt from the description of the safe loader."""
import copy
import inspect
import io
import math
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dnnlib
from dnnlib import naming
from dnnlib.util import UserError, replace_file
from torch_utils.pickles import describe, torch_file
from torch_utils.pickles.describe import TRUST, ModuleDescription, explained
from torch_utils.pickles.tensors import make_tensors
from training import networks
from training.datasets.labels import CLASS_NAMES
from training.formats import rebuild, tensorflow
from training.formats.rebuild import KEYS, MODULES, NETWORKS, check_sizes, construct, shown

# StyleGAN3's version of these networks has other defaults, and passes synthesis arguments directly to G.
S3_MARK = 'fused_modconv_default'
S3_DEFAULTS = {'num_fp16_res': 4, 'conv_clamp': 256}
S3_MAPPING_DEFAULTS = {'w_avg_beta': 0.998}
GENERATOR_ARGUMENTS = ('z_dim', 'c_dim', 'w_dim', 'img_resolution', 'img_channels', 'mapping_kwargs',
                       'synthesis_kwargs')
# Exceptions of code that was written for other versions.
CODE_ERRORS = (pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError, EOFError, ImportError,
               LookupError, NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError)


@dataclass(frozen=True)
class Blueprint:
    """A described module, to be rebuilt with our classes. name: of file and network, for error messages."""

    name: str
    described: ModuleDescription

    def build(self, force_fp16: bool = False) -> torch.nn.Module:
        """The module with the file's tensors, in eval mode, without gradients. UserError if it differs."""
        cls = self._find_class()
        kwargs, net = self._reproduce(cls)
        if force_fp16:
            net = construct(self.name, cls, rebuild.with_fp16(cls, kwargs))
        stored = self.described.state()
        # Checked before any tensor is allocated.
        rebuild.check_tensors(self.name, net, {name: tensor.shape for name, tensor in stored.items()})
        with explained(self.name):
            tensors = make_tensors(stored)
        return rebuild.fill(self.name, net, tensors)

    def _find_class(self) -> type[torch.nn.Module]:
        if not isinstance(self.described, ModuleDescription):
            raise UserError(f'{self.name} is a {type(self.described).__name__}, not a network')
        # A StyleGAN3 generator has the same class name; its synthesis network starts with a child `input`.
        synthesis = self.described.children.get('synthesis')
        if synthesis is not None and 'input' in synthesis.children:
            raise UserError(f'{self.name} is a StyleGAN3 generator; only StyleGAN2 networks can be rebuilt '
                            '(those of the StyleGAN3 program too, if trained with --cfg=stylegan2)')
        return rebuild.class_of(self.name, self.described.class_name)

    def _reproduce(self, cls: type[torch.nn.Module]) -> tuple[dict[str, Any], torch.nn.Module]:
        """Our arguments and the network built from them, by the first reading of the file that fits."""
        problem = ''
        for kwargs in self._readings(cls):
            net = construct(self.name, cls, kwargs)
            difference = _difference(net, self.described)
            if difference is None:
                return kwargs, net
            problem = problem or difference
        raise UserError(f'{self.name}: {problem}; it was modified after its construction, or comes from '
                        f'another program. {TRUST}')

    def _readings(self, cls: type[torch.nn.Module]) -> list[dict[str, Any]]:
        """Keyword arguments for our class, with the defaults of each program that may have written them."""
        names = list(inspect.signature(cls).parameters)
        kwargs = {**dict(zip(names, self.described.init_args, strict=False)), **self.described.init_kwargs}
        check_sizes(self.name, kwargs)
        if cls is networks.Generator:
            is_s3 = any(S3_MARK in module.attributes for _, module in self.described.modules())
            return [_s3_generator_arguments(kwargs) if is_s3 else kwargs]
        # A discriminator has no such mark; the attributes of its layers show which defaults apply.
        if cls is networks.Discriminator:
            return [kwargs, {**S3_DEFAULTS, **kwargs}]
        return [kwargs]


def load_by_execution(data: bytes, name: str) -> dnnlib.EasyDict:
    """The result of pickle.load or torch.load, with the classes from the source text in the file. Trusted
    files only.
    """
    try:
        file = io.BytesIO(data)
        is_torch = torch_file.is_torch_file(data)
        with naming.owned():
            held = torch.load(file, 'cpu', weights_only=False) if is_torch else pickle.load(file)
    except CODE_ERRORS as error:
        raise UserError(f'{name}: cannot be unpickled ({type(error).__name__}: {shown(error)}); without '
                        '--trust-pickle, official networks open whatever their code') from error
    modules = named_modules(name, held, torch.nn.Module, lambda module: type(module).__name__)
    for net in modules.values():
        net.eval().requires_grad_(requires_grad=False)
    return dnnlib.EasyDict({
        **dict.fromkeys(KEYS), **modules, 'training_set_kwargs': _training_set_kwargs(held)})


def read(data: bytes, name: str) -> tuple[Mapping[str, Any], Any]:
    """(key -> what builds that network, training_set_kwargs) of a pickle, PyTorch's or TensorFlow's."""
    held = describe.load(io.BytesIO(data), name)
    if tensorflow.is_tensorflow(held):
        return tensorflow.recipes(name, held), None
    return contents(name, held)


def contents(name: str, held: Any) -> tuple[dict[str, Blueprint], Any]:
    """(key -> blueprint, training_set_kwargs) in what describe.load() or torch_file.load() returned.

    Raises UserError if there are no networks.
    """
    modules = named_modules(name, held, ModuleDescription, lambda module: module.class_name)
    return ({key: Blueprint(f'{name}: {key}', module) for key, module in modules.items()},
            describe.plain(_training_set_kwargs(held), name))


def _training_set_kwargs(held: Any) -> Any:
    """The options of the dataset, with the names of its classes, which have a key of their own in files."""
    kwargs = held.get('training_set_kwargs') if isinstance(held, dict) else None
    if isinstance(kwargs, dict) and CLASS_NAMES in held:
        return {**kwargs, CLASS_NAMES: held[CLASS_NAMES]}
    return kwargs


def has_modules(held: Any) -> bool:
    """Whether this result of describe.load() or torch_file.load() is or holds a network module."""
    items = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]
    return any(isinstance(item, ModuleDescription) for item in items)


def named_modules(
    name: str, held: Any, kind: type, class_of: Callable[[Any], str],
) -> dict[str, Any]:
    """The network modules, objects of `kind`, by the keys of MODULES.

    held: a dict with these keys in any case, else one module, or a dict, list or tuple of some: then they are
    told apart by class; of several generators the first is G, the last G_ema, as in the published order.
    Raises UserError if there is no network.
    """
    items = held if isinstance(held, dict) else dict(enumerate(
        held if isinstance(held, (list, tuple)) else [held]))
    wanted = {key.lower(): key for key in MODULES}
    found = {wanted[key.lower()]: item for key, item in items.items()
             if isinstance(key, str) and key.lower() in wanted and item is not None}
    if not any(isinstance(found.get(key), kind) for key in NETWORKS):
        found = _by_class([item for item in items.values() if isinstance(item, kind)], class_of)
    if not found:
        raise UserError(f'{name}: holds no networks; a network pickle is a dict with the keys G, D and '
                        'G_ema, or a generator')
    return {key: found[key] for key in MODULES if key in found}


def _by_class(modules: list[Any], class_of: Callable[[Any], str]) -> dict[str, Any]:
    generators = [module for module in modules if class_of(module).endswith('Generator')]
    found = {'G': generators[0]} if len(generators) > 1 else {}
    found.update({'G_ema': generators[-1]} if generators else {})
    for module in modules:
        for key, ending in (('D', 'Discriminator'), ('augment_pipe', 'AugmentPipe')):
            if class_of(module).endswith(ending):
                found.setdefault(key, module)
    return found if any(key in found for key in NETWORKS) else {}


def _s3_generator_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """StyleGAN3's arguments as ours: synthesis arguments grouped, its defaults made explicit."""
    flat = {name: value for name, value in kwargs.items() if name not in (*GENERATOR_ARGUMENTS, S3_MARK)}
    synthesis = {**S3_DEFAULTS, **flat, **(kwargs.get('synthesis_kwargs') or {})}
    mapping = {**S3_MAPPING_DEFAULTS, **(kwargs.get('mapping_kwargs') or {})}
    common = {name: value for name, value in kwargs.items() if name in GENERATOR_ARGUMENTS}
    return {**common, 'mapping_kwargs': mapping, 'synthesis_kwargs': synthesis}


def _difference(net: torch.nn.Module, described: ModuleDescription) -> str | None:
    """The first difference between our modules and the described ones, in classes or plain attributes."""
    # Attributes such as clamps and gains affect the output and are not in the state dict.
    ours, theirs = dict(net.named_modules()), dict(described.modules())
    if set(ours) != set(theirs):
        return f'the submodule {shown(min(set(ours) ^ set(theirs)))} is missing or superfluous'
    for prefix, module in theirs.items():
        twin = ours[prefix]
        if type(twin).__name__ != module.class_name:
            return f'{prefix} is of class {shown(module.class_name)}, not {type(twin).__name__}'
        for name, value in module.attributes.items():
            if name != 'training' and hasattr(twin, name) and not _same(getattr(twin, name), value):
                return f'{shown(f"{prefix}.{name}".lstrip("."))} is {shown(value)}, not as its arguments say'
    return None


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, (int, float, np.number)) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return type(ours) is type(theirs) and ours == theirs


EXPORTED = ('G', 'D', 'G_ema', 'augment_pipe')  # networks of a snapshot, in the published order


class HostCopies:
    """Copies of tensors in host memory, one per tensor even if it is requested several times.

    The copy of a GPU tensor is complete only after wait(), which another thread may call. Call begin() before
    the next snapshot: host memory is reused, which is several times faster than allocating it again.
    """

    def __init__(self) -> None:
        # Keeps the originals alive, so that no new tensor reuses the id of one.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._current: set[int] = set()
        self._event: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Start a new snapshot. Earlier copies must no longer be in use."""
        self._copies = {key: pair for key, pair in self._copies.items() if key in self._current}
        self._current.clear()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor, with the same memory layout."""
        key = id(tensor)
        if key not in self._copies:
            place = torch.empty_like(tensor.detach(), device='cpu', pin_memory=tensor.is_cuda)
            self._copies[key] = tensor, place
        copied = self._copies[key][1]
        if key not in self._current:
            self._current.add(key)
            # Ordered by the stream of the GPU, so that the loop does not wait.
            copied.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                self._event = self._event or torch.cuda.Event()
                self._event.record()
        return copied

    def tree(self, value: Any) -> Any:
        """The same nested dictionaries, lists and tuples, with tensors replaced by their copies."""
        if isinstance(value, torch.Tensor):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self.tree(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.tree(item) for item in value)
        return value

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module with copies of its tensors, in eval mode, without gradients and hooks."""
        tensors: dict[int, Any] = {
            id(t): torch.nn.Parameter(self(t), requires_grad=False) for t in module.parameters()}
        tensors.update({id(t): self(t) for t in module.buffers()})
        # deepcopy uses the entry of its memo instead of copying an object.
        twin = copy.deepcopy(module, tensors)
        for part in twin.modules():
            for name, value in vars(part).items():
                if name.endswith('_hooks') and isinstance(value, dict):
                    value.clear()
        return twin.eval().requires_grad_(requires_grad=False)

    def wait(self) -> None:
        """Return once all copies are complete."""
        if self._event is not None:
            self._event.synchronize()


def copy_networks(
    copies: HostCopies, networks: Mapping[str, torch.nn.Module | None],
    training_set_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of a network pickle: training_set_kwargs, then copies of G, D, G_ema and augment_pipe.

    networks: by these names; missing ones become None.
    """
    kwargs = None if training_set_kwargs is None else dict(training_set_kwargs)
    modules = {name: networks.get(name) for name in EXPORTED}
    return {'training_set_kwargs': kwargs,
            **{name: None if module is None else copies.module(module) for name, module in modules.items()}}


def write_networks(path: str | os.PathLike, snapshot: Mapping[str, Any]) -> Path:
    """Pickle the result of copy_networks(); returns the path. Raises UserError if that fails."""
    held = dict(snapshot)
    kwargs = held.get('training_set_kwargs')
    if isinstance(kwargs, Mapping) and CLASS_NAMES in kwargs:
        # Other programs create their dataset with all of training_set_kwargs.
        held['training_set_kwargs'] = {key: value for key, value in kwargs.items() if key != CLASS_NAMES}
        held[CLASS_NAMES] = kwargs[CLASS_NAMES]
    with replace_file(path, durable=True) as temporary, open(temporary, 'xb') as file, naming.owned():
        pickle.dump(held, file, protocol=4)  # that of Python 3.7
    return Path(path)


def save_network_snapshot(
    path: str | os.PathLike, *, G: torch.nn.Module | None, D: torch.nn.Module | None, G_ema: torch.nn.Module,
    augment_pipe: torch.nn.Module | None = None, training_set_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write network-snapshot-*.pkl, a pickled dict of CPU copies in eval mode without gradients.

    The given modules stay as they are. The keys, in the published order: training_set_kwargs, G, D, G_ema,
    augment_pipe. Returns the path. Raises UserError if the file cannot be written.
    """
    copies = HostCopies()
    networks = {'G': G, 'D': D, 'G_ema': G_ema, 'augment_pipe': augment_pipe}
    snapshot = copy_networks(copies, networks, training_set_kwargs)
    copies.wait()
    return write_networks(path, snapshot)
