# SPDX-License-Identifier: Apache-2.0
"""The parts of a training run as frozen dataclasses, each with its published form: keyword arguments."""
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dnnlib.util import UserError

Section = TypeVar('Section')

CACHES = ('auto', 'ram', 'gpu', 'off')
AUGMENT_MODES = ('noaug', 'ada', 'fixed')


@dataclass(frozen=True)
class DataConfig:
    """The training pictures.

    max_size: pictures used.  random_seed: draws them where they are a subset.  xflip: add the mirror images.
    resolution: side, or (height, width), in pixels.  num_workers: processes or threads that read.
    cache: 'ram' and 'gpu' decode all pictures once and keep them there, 'off' at each use, 'auto' decides
    by size.
    """

    path: str
    use_labels: bool
    max_size: int
    xflip: bool
    resolution: int | tuple[int, int]
    random_seed: int | None = None
    num_workers: int = 3
    cache: str = 'auto'

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
        # A number for squares, as published; [height, width] otherwise.
        side = self.resolution if isinstance(self.resolution, int) else list(self.resolution)
        return {**{name: getattr(self, name) for name in ('path', 'use_labels', 'max_size', 'xflip')},
                'resolution': side, **changed(self, 'random_seed')}

    def loader_kwargs(self) -> dict[str, Any]:
        """What published files say of the loader; only num_workers can be chosen."""
        return {'pin_memory': True, 'num_workers': self.num_workers, 'prefetch_factor': 2}


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator.

    z_dim, w_dim: lengths of the latents.  map_layers: depth of the mapping network.  A level r has
    min(channel_base // r, channel_max) feature maps.  num_fp16_res: how many of the highest levels compute in
    half precision.  conv_clamp: bound of their activations, None for none.  channels_last: their memory
    format, None for the faster one on each device.  use_noise: whether the layers of synthesis add noise.
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
        """Keyword arguments of training.networks.Generator, without those that the dataset gives."""
        synthesis = {name: getattr(self, name) for name in _CHANNEL_FIELDS}
        # Published files have these keys only where they differ from the default.
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

    mbstd_group_size: pictures whose deviation is a feature.  freeze_layers: layers, from the picture on, that
    do not learn (Freeze-D).  architecture: 'resnet' (also None), 'skip' or 'orig'.
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
        """Keyword arguments of training.networks.Discriminator, without those that the dataset gives."""
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
    """Adam, before the correction for lazy regularisation.  lr: learning rate.  betas: decay a step.  eps:
    floor.
    """

    lr: float
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of torch.optim.Adam."""
        return {'lr': self.lr, 'betas': list(self.betas), 'eps': self.eps}


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms.

    r1_gamma: R1.  pl_weight: path length.  style_mixing_prob: chance that a batch mixes styles.
    pl_batch_shrink: path length uses 1/n of a batch, at least one picture.  pl_decay: speed of the running
    mean of lengths, a step.
    """

    r1_gamma: float
    pl_weight: float = 2
    style_mixing_prob: float = 0.9
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of training.loss.StyleGAN2Loss that differ from its defaults, and r1_gamma."""
        names = ('pl_weight', 'style_mixing_prob', 'pl_batch_shrink', 'pl_decay')
        return {'r1_gamma': self.r1_gamma, **changed(self, *names)}

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> 'LossConfig':
        """The inverse of `kwargs`. Raises UserError for anything missing or unknown."""
        return construct(cls, kwargs)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation. mode: 'ada' moves p towards `target`, 'fixed' keeps p, 'noaug' has none.

    p: probability of each transform, at the start for 'ada'.  target: wanted mean sign of D on real pictures.
    multipliers: transform or group member -> factor of p.
    """

    mode: str = 'ada'
    p: float = 0.0
    target: float = 0.6
    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice('mode', self.mode, AUGMENT_MODES)

    def options(self) -> dict[str, Any]:
        """The published keys: ada_target, augment_p and augment_kwargs, as far as they apply."""
        if self.mode == 'noaug':
            return {}
        target = {'ada_target': self.target} if self.mode == 'ada' else {}
        p = {'augment_p': self.p} if self.mode == 'fixed' or self.p else {}
        kwargs = {'class_name': 'training.augment.AugmentPipe', **self.multipliers}
        return {**target, **p, 'augment_kwargs': kwargs}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> 'AugmentConfig':
        """Take the published keys out of a dictionary."""
        target, p = options.pop('ada_target', None), options.pop('augment_p', None)
        multipliers = without_class_name(options.pop('augment_kwargs', None) or {})
        # The published files have no key for the mode: a target makes it ADA, a probability alone fixed.
        if target is not None:
            return cls('ada', p or 0.0, target, multipliers)
        return cls('fixed', p, multipliers=multipliers) if p is not None else cls('noaug')


def changed(section: Any, *names: str) -> dict[str, Any]:
    """Those of the named fields that differ from their defaults."""
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
    """cls(**values) with keys renamed; UserError for keys that are missing or unknown."""
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
