# SPDX-License-Identifier: Apache-2.0
"""Networks built from class name, constructor arguments and tensors; nothing else is taken from a file."""
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib import naming
from dnnlib.resolution import height_width
from dnnlib.util import UserError
from training import networks

NETWORKS = ('G', 'D', 'G_ema')
MODULES = (*NETWORKS, 'augment_pipe')
KEYS = (*NETWORKS, 'training_set_kwargs', 'augment_pipe')
# Class -> its module, which is imported once a file asks for it.
CLASSES = {
    'Generator': 'training.networks', 'Discriminator': 'training.networks', 'AugmentPipe': 'training.augment',
    'StyleGAN1Generator': 'training.systems.stylegan1',
    'DCGANGenerator': 'training.systems.dcgan', 'DCGANDiscriminator': 'training.systems.dcgan'}
FP16_SETTINGS = {'num_fp16_res': 4, 'conv_clamp': 256}

# Limits of arguments, so that a forged file cannot exhaust memory or time.
MAX_ARGUMENT = 2 ** 20
MAX_LAYERS = 1000
# Bytes of the largest feature maps of one image, on their own and for each byte of the network: a few numbers
# can describe a network that needs more memory for one image than there is.
MAX_MAP_BYTES, MAP_BYTES_PER_BYTE = 256 << 20, 64


@dataclass(frozen=True)
class Recipe:
    """A network that is not built yet. name: of file and network, for error messages.

    tensors: by the names of the state dict.  has_filters: whether these include the resample
    filters; otherwise the constructor's are kept.
    """

    name: str
    class_name: str
    kwargs: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    has_filters: bool = True

    def build(self, force_fp16: bool = False) -> torch.nn.Module:
        """The network in eval mode, without gradients. Raises UserError if its parts do not match."""
        cls = class_of(self.name, self.class_name)
        check_sizes(self.name, self.kwargs)
        net = construct(self.name, cls, with_fp16(cls, self.kwargs) if force_fp16 else self.kwargs)
        ours, tensors = net.state_dict(), dict(self.tensors)
        if not self.has_filters:
            tensors.update({name: t for name, t in ours.items() if name.endswith('resample_filter')})
        laid_out = {key: _laid_out(t, ours[key]) if key in ours else t for key, t in tensors.items()}
        return fill(self.name, net, laid_out)


def class_of(name: str, class_name: Any) -> type[torch.nn.Module]:
    """Our class of this name. Raises UserError if there is none."""
    if not isinstance(class_name, str) or class_name not in CLASSES:
        raise UserError(f'{name} is of class {shown(class_name)}; only {", ".join(CLASSES)} can be rebuilt '
                        'without running the code in the file')
    return getattr(importlib.import_module(naming.PREFIX + CLASSES[class_name]), class_name)


def construct(name: str, cls: type[torch.nn.Module], kwargs: Mapping[str, Any]) -> torch.nn.Module:
    """The network without its tensors. Raises UserError if the arguments are not those of the class."""
    # On the meta device nothing is allocated or initialized: the tensors come from the file. The
    # augmentation computes its filters with NumPy and is small.
    device = 'cpu' if cls.__name__ == 'AugmentPipe' else 'meta'
    try:
        with torch.device(device):
            return cls(**kwargs)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError,
            RuntimeError) as error:
        raise UserError(f'{name}: not a StyleGAN2 network as published: {cls.__name__} cannot be constructed '
                        f'from its arguments ({shown(error)})') from error


def fill(name: str, net: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Replace the tensors of a network; keeps its dtypes and their memory layout.

    Returns it in eval mode, without gradients. Raises UserError unless names and shapes match exactly.
    """
    check_tensors(name, net, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    ours = net.state_dict()
    # Assigned, not copied: keeps the memory layout of the file.
    net.load_state_dict({key: tensor.to(ours[key].dtype) for key, tensor in tensors.items()}, assign=True)
    return net.eval().requires_grad_(requires_grad=False)


def check_tensors(name: str, net: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless these are the names and shapes of the network's tensors."""
    ours = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    wrong = [key for key in {**ours, **shapes} if ours.get(key) != shapes.get(key)]
    if wrong:
        raise UserError(f'{name}: {len(wrong)} tensors are missing, unexpected or of another shape than its '
                        f'arguments say, first {shown(wrong[0])}')
    _check_feature_maps(name, net)


def _check_feature_maps(name: str, net: torch.nn.Module) -> None:
    """Raise UserError if the network is far too small for the size of its images."""
    size = getattr(net, 'img_resolution', None)
    if size is None:
        return
    height, width = height_width(size)
    tensors = list(net.state_dict().values())
    # The layers of the highest level have the fewest channels, so the convolution with the fewest counts.
    channels = min((t.shape[1] for t in tensors if t.ndim == 4), default=0)
    needed = 4 * height * width * (net.img_channels + channels)
    held = sum(t.numel() * t.element_size() for t in tensors)
    if needed > MAX_MAP_BYTES + MAP_BYTES_PER_BYTE * held:
        raise UserError(f'{name}: its arguments say {width}x{height} pixels, for which its {held} bytes of '
                        'weights are far too few; the file is damaged or forged')


def with_fp16(cls: type[torch.nn.Module], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with float16 at the four highest resolutions. Raises UserError if the class has none."""
    if cls is networks.Generator:
        return {**kwargs, 'synthesis_kwargs': {**(kwargs.get('synthesis_kwargs') or {}), **FP16_SETTINGS}}
    if cls is networks.Discriminator:
        return {**kwargs, **FP16_SETTINGS}
    raise UserError(f'--force-fp16: a {cls.__name__} is float32 only; drop the option')


def check_sizes(name: str, value: Any, key: str = '') -> None:
    """Raise UserError for arguments that only a forged file contains."""
    if key.endswith('_kwargs') and not isinstance(value, Mapping | None):
        raise UserError(f'{name}: the argument {shown(key)} is a {type(value).__name__}, not a dict')
    if isinstance(value, Mapping):
        for inner, item in value.items():
            check_sizes(name, item, inner if isinstance(inner, str) else '')
    elif isinstance(value, (list, tuple)):
        for item in value[:MAX_LAYERS]:
            check_sizes(name, item, key)
    limit = MAX_LAYERS if key == 'num_layers' or isinstance(value, (list, tuple)) else MAX_ARGUMENT
    size = len(value) if isinstance(value, (list, tuple)) else value
    if isinstance(size, int) and abs(size) > limit:
        raise UserError(f'{name}: the argument {shown(key)} is beyond the limit of {limit}')


def arguments_of(name: str, net: torch.nn.Module) -> dict[str, Any]:
    """All constructor arguments of a network by name. Raises UserError if it is not of one of our classes."""
    cls = class_of(name, type(net).__name__)
    names = list(inspect.signature(cls).parameters)
    return {**dict(zip(names, net.init_args, strict=False)), **net.init_kwargs}


def shown(value: Any) -> str:
    """Text from a file for a message: short, one line, without control characters."""
    return ''.join(c if c.isascii() and c.isprintable() else '?' for c in str(value))[:100]


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor in the memory layout of another one, if the shapes agree."""
    if tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(tensor.shape, like.stride(), dtype=tensor.dtype).copy_(tensor)
