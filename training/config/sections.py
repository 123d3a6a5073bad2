# SPDX-License-Identifier: Apache-2.0
"""The sections of a training run as frozen dataclasses, and their published form: keyword arguments.

Fields with the metadata MAY_CHANGE may differ when a run is resumed, because they do not affect training.
"""
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dnnlib.util import UserError

Section = TypeVar('Section')

MAY_CHANGE = {'may_change': True}
CACHES = ('auto', 'ram', 'gpu', 'off')
AUGMENT_MODES = ('noaug', 'ada', 'fixed')


@dataclass(frozen=True)
class DataConfig:
    """The training images.

    max_size: number of images used.  random_seed: of the subset, None for all images.  xflip: add the mirror
    images.  resolution: side, or (height, width), in pixels.  num_workers: processes or threads that load
    data.  class_names: of the labels in use, in order.  cache: 'ram' and 'gpu' decode all images once and
    keep them there, 'off' decodes them at each use, 'auto' depends on their size.
    """

    path: str = field(metadata=MAY_CHANGE)
    use_labels: bool
    max_size: int
    xflip: bool
    resolution: int | tuple[int, int]
    random_seed: int | None = None
    num_workers: int = field(default=3, metadata=MAY_CHANGE)
    class_names: tuple[str, ...] | None = field(default=None, metadata=MAY_CHANGE)
    cache: str = field(default='auto', metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        check_minimum(self, 1, 'max_size')
        check_minimum(self, 0, 'num_workers')
        check_choice('cache', self.cache, CACHES)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of training.dataset.ImageFolderDataset."""
        # Square images: a number, as published.
        side = self.resolution if isinstance(self.resolution, int) else list(self.resolution)
        names = {} if self.class_names is None else {'class_names': list(self.class_names)}
        return {**{name: getattr(self, name) for name in ('path', 'use_labels', 'max_size', 'xflip')},
                'resolution': side, **changed(self, 'random_seed'), **names}

    def loader_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the data loader as published; only num_workers is a setting."""
        return {'pin_memory': True, 'num_workers': self.num_workers, 'prefetch_factor': 2}


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator.

    z_dim, w_dim: dimensionality of the latents.  map_layers: depth of the mapping network.  Layers of
    resolution r have min(channel_base // r, channel_max) feature maps.  num_fp16_res: number of the highest
    resolutions in half precision.  conv_clamp: clamp of activations, None for none.  channels_last: memory
    format of half-precision activations, None for the faster one on each device.  use_noise: whether
    synthesis layers add noise.
    """

    z_dim: int
    w_dim: int
    map_layers: int
    channel_base: int
    channel_max: int
    num_fp16_res: int
    conv_clamp: float | None
    channels_last: bool | None = None
    use_noise: bool = True

    def __post_init__(self) -> None:
        check_minimum(self, 1, 'z_dim', 'w_dim', 'map_layers', 'channel_base', 'channel_max')
        check_minimum(self, 0, 'num_fp16_res')

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of training.networks.Generator, except those that depend on the dataset."""
        synthesis = {name: getattr(self, name) for name in _CHANNEL_FIELDS}
        # Published files contain these keys only if they differ from the default.
        synthesis.update(changed(self, 'use_noise'))
        if self.channels_last is not None:
            synthesis['fp16_channels_last'] = self.channels_last
        return {'z_dim': self.z_dim, 'w_dim': self.w_dim, 'mapping_kwargs': {'num_layers': self.map_layers},
                'synthesis_kwargs': synthesis}

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> 'GeneratorConfig':
        """The inverse of `kwargs`. Raises UserError for anything missing or unknown."""
        flat = _flatten(kwargs, 'mapping_kwargs', 'synthesis_kwargs')
        return construct(cls, flat, num_layers='map_layers', fp16_channels_last='channels_last')


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator; fields shared with GeneratorConfig mean the same.

    mbstd_group_size: group size of the minibatch standard deviation.  freeze_layers: number of frozen layers,
    counted from the input (Freeze-D).  architecture: 'resnet' (also None), 'skip' or 'orig'.
    """

    channel_base: int
    channel_max: int
    num_fp16_res: int
    conv_clamp: float | None
    mbstd_group_size: int
    freeze_layers: int | None = None
    channels_last: bool | None = None
    architecture: str | None = None

    def __post_init__(self) -> None:
        check_minimum(self, 1, 'channel_base', 'channel_max', 'mbstd_group_size')
        check_minimum(self, 0, 'num_fp16_res')

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of training.networks.Discriminator, except those that depend on the dataset."""
        block = changed(self, 'freeze_layers')
        if self.channels_last is not None:
            block['fp16_channels_last'] = self.channels_last
        return {'block_kwargs': block, 'mapping_kwargs': {},
                'epilogue_kwargs': {'mbstd_group_size': self.mbstd_group_size},
                **{name: getattr(self, name) for name in _CHANNEL_FIELDS}, **changed(self, 'architecture')}

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> 'DiscriminatorConfig':
        """The inverse of `kwargs`. Raises UserError for anything missing or unknown."""
        flat = _flatten(kwargs, 'block_kwargs', 'mapping_kwargs', 'epilogue_kwargs')
        return construct(cls, flat, fp16_channels_last='channels_last')


_CHANNEL_FIELDS = ('channel_base', 'channel_max', 'num_fp16_res', 'conv_clamp')


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, before the correction for lazy regularisation.  betas: decay rates per step."""

    lr: float
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of torch.optim.Adam."""
        return {'lr': self.lr, 'betas': list(self.betas), 'eps': self.eps}


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms.

    r1_gamma: weight of R1.  pl_weight: weight of path length regularisation.  style_mixing_prob: probability
    of style mixing.  pl_batch_shrink: path length regularisation uses 1/n of a batch, at least one image.
    pl_decay: decay of the running mean of path lengths, per step.
    """

    r1_gamma: float
    pl_weight: float = 2
    style_mixing_prob: float = 0.9
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of training.loss.StyleGAN2Loss: r1_gamma, and those that differ from defaults."""
        names = ('pl_weight', 'style_mixing_prob', 'pl_batch_shrink', 'pl_decay')
        return {'r1_gamma': self.r1_gamma, **changed(self, *names)}

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> 'LossConfig':
        """The inverse of `kwargs`. Raises UserError for anything missing or unknown."""
        return construct(cls, kwargs)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation. mode: 'ada' adapts p, 'fixed' keeps it, 'noaug' disables augmentation.

    p: probability of each transform, the initial one for 'ada'.  target: of ADA, the mean sign of D on real
    images.  multipliers: {transform: factor of p}.
    """

    mode: str = 'ada'
    p: float = 0.0
    target: float = 0.6
    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice('mode', self.mode, AUGMENT_MODES)

    def options(self) -> dict[str, Any]:
        """The published keys that apply: ada_target, augment_p and augment_kwargs."""
        if self.mode == 'noaug':
            return {}
        target = {'ada_target': self.target} if self.mode == 'ada' else {}
        p = {'augment_p': self.p} if self.mode == 'fixed' or self.p else {}
        kwargs = {'class_name': 'training.augment.AugmentPipe', **self.multipliers}
        return {**target, **p, 'augment_kwargs': kwargs}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> 'AugmentConfig':
        """Pop the published keys from a dictionary."""
        target, p = options.pop('ada_target', None), options.pop('augment_p', None)
        multipliers = without_class_name(options.pop('augment_kwargs', None) or {})
        # Published files have no key for the mode: ada_target implies 'ada', augment_p alone 'fixed'.
        if target is not None:
            return cls('ada', p or 0.0, target, multipliers)
        return cls('fixed', p, multipliers=multipliers) if p is not None else cls('noaug')


def changed(section: Any, *names: str) -> dict[str, Any]:
    """The named fields that differ from their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(section)}
    return {name: getattr(section, name) for name in names if getattr(section, name) != defaults[name]}


def without_class_name(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the key class_name."""
    return {key: value for key, value in kwargs.items() if key != 'class_name'}


def _flatten(kwargs: Mapping[str, Any], *groups: str) -> dict[str, Any]:
    flat = {key: value for key, value in kwargs.items() if key not in groups}
    for group in groups:
        flat.update(kwargs.get(group) or {})
    return flat


def construct(cls: type[Section], values: Mapping[str, Any], **renamed: str) -> Section:
    """cls(**values) with keys renamed. Raises UserError for missing or unknown keys."""
    values = {renamed.get(key, key): value for key, value in values.items()}
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    required = {f.name for f in fields if (f.default, f.default_factory) == absent}
    missing, unknown = sorted(required - set(values)), sorted(set(values) - {f.name for f in fields})
    for problem, names in (('lack', missing), ('have the unknown key', unknown)):
        if names:
            raise UserError(f'training options {problem} {", ".join(names)} ({cls.__name__})')
    return cls(**values)


def check_minimum(section: Any, minimum: int, *names: str) -> None:
    """Raise UserError if one of the named fields is below the minimum."""
    for name in names:
        if getattr(section, name) < minimum:
            raise UserError(f'{name}={getattr(section, name)} must be at least {minimum}')


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError if the value is none of the choices."""
    if value not in choices:
        raise UserError(f'{name}={value} must be one of {", ".join(choices)}')
