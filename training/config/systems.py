# SPDX-License-Identifier: Apache-2.0
"""The configuration of each system: class names, constructor arguments, and options without effect."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dnnlib.util import UserError
from training.config.sections import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    without_class_name,
)

Kwargs = dict[str, Any]
ALL_FLOAT32: Kwargs = {'num_fp16_res': 0, 'conv_clamp': None}
UNLIMITED = 2 ** 20  # channel_max of systems without a maximum
# Parsed values of unused options that are accepted, because they ask for the actual behaviour.
HARMLESS = (None, False, 'auto', 'fp32')
MIN_DCGAN_SIDE = 8


@dataclass(frozen=True)
class SystemForm:
    """How sections of a configuration become constructor arguments, and back.

    generator, discriminator, loss: dotted class names.  check: raises UserError for image sizes and
    channel_base that the system does not support.  unused: names of options without effect.
    """

    generator: str
    discriminator: str
    loss: str
    G_kwargs: Callable[[GeneratorConfig, DataConfig], Kwargs]
    read_G: Callable[[Kwargs, DataConfig], GeneratorConfig]
    D_kwargs: Callable[[DiscriminatorConfig, DataConfig], Kwargs]
    read_D: Callable[[Kwargs, DataConfig], DiscriminatorConfig]
    loss_kwargs: Callable[[LossConfig], Kwargs]
    read_loss: Callable[[Kwargs], LossConfig]
    check: Callable[[DataConfig, int], None] = lambda data, channel_base: None
    unused: tuple[str, ...] = ()


def _stylegan1_generator(G: GeneratorConfig, _: DataConfig) -> Kwargs:
    return {'z_dim': G.z_dim, 'w_dim': G.w_dim, 'mapping_kwargs': {'num_layers': G.map_layers},
            'synthesis_kwargs': {'channel_base': G.channel_base, 'channel_max': G.channel_max}}


def _read_stylegan1_generator(kwargs: Kwargs, _: DataConfig) -> GeneratorConfig:
    return GeneratorConfig.from_kwargs({**kwargs, **ALL_FLOAT32})


def _read_dcgan_generator(kwargs: Kwargs, data: DataConfig) -> GeneratorConfig:
    return GeneratorConfig(
        z_dim=kwargs['z_dim'], w_dim=kwargs['z_dim'], map_layers=1, channel_max=UNLIMITED,
        channel_base=kwargs['ngf'] * _last_hidden_level(data), **ALL_FLOAT32)


def _read_dcgan_discriminator(kwargs: Kwargs, data: DataConfig) -> DiscriminatorConfig:
    return DiscriminatorConfig(
        channel_base=kwargs['ndf'] * _last_hidden_level(data), channel_max=UNLIMITED, mbstd_group_size=1,
        **ALL_FLOAT32)


def _last_hidden_level(data: DataConfig) -> int:
    """Resolution of the last feature maps of G and the first ones of D: their numbers are ngf and ndf."""
    return data.size[0] // 2


def _check_dcgan(data: DataConfig, channel_base: int) -> None:
    height, width = data.size
    if height != width or height & (height - 1) or height < MIN_DCGAN_SIDE:
        raise UserError(f'--cfg=dcgan: no network fits images of {width}x{height}: the sides must be the '
                        f'same power of two, at least {MIN_DCGAN_SIDE}; resize with dataset_tool.py '
                        '--width=64 --height=64')
    level = _last_hidden_level(data)
    if channel_base % level:
        nearest = max(channel_base // level, 1) * level
        raise UserError(f'--cbase={channel_base}: with --cfg=dcgan it must be a multiple of {level}, half '
                        f'the side of the images; use --cbase={nearest}')


SYSTEM_FORMS = {
    'stylegan2': SystemForm(
        'training.networks.Generator', 'training.networks.Discriminator', 'training.loss.StyleGAN2Loss',
        G_kwargs=lambda G, data: G.kwargs(), read_G=lambda kwargs, data: GeneratorConfig.from_kwargs(kwargs),
        D_kwargs=lambda D, data: D.kwargs(),
        read_D=lambda kwargs, data: DiscriminatorConfig.from_kwargs(kwargs),
        loss_kwargs=LossConfig.kwargs, read_loss=LossConfig.from_kwargs),
    'stylegan1': SystemForm(
        'training.systems.stylegan1.StyleGAN1Generator', 'training.networks.Discriminator',
        'training.loss.StyleGAN2Loss',
        G_kwargs=_stylegan1_generator, read_G=_read_stylegan1_generator, D_kwargs=lambda D, data: D.kwargs(),
        read_D=lambda kwargs, data: DiscriminatorConfig.from_kwargs(kwargs),
        loss_kwargs=LossConfig.kwargs, read_loss=LossConfig.from_kwargs,
        unused=('precision', 'nhwc')),
    'dcgan': SystemForm(
        'training.systems.dcgan.DCGANGenerator', 'training.systems.dcgan.DCGANDiscriminator',
        'training.systems.dcgan_loss.DCGANLoss',
        G_kwargs=lambda G, data: {'z_dim': G.z_dim, 'ngf': G.channel_base // _last_hidden_level(data)},
        read_G=_read_dcgan_generator,
        D_kwargs=lambda D, data: {'ndf': D.channel_base // _last_hidden_level(data)},
        read_D=_read_dcgan_discriminator,
        loss_kwargs=lambda loss: {},
        read_loss=lambda kwargs: LossConfig(r1_gamma=0, pl_weight=0, style_mixing_prob=0),
        check=_check_dcgan,
        unused=('cond', 'gamma', 'cmax', 'map-depth', 'freezed', 'precision', 'nhwc')),
}


# Class names of generators in runs of version 0.1.
NAMES_BEFORE = {'training.networks_stylegan1.StyleGAN1Generator': 'stylegan1',
                'training.networks_dcgan.DCGANGenerator': 'dcgan'}


def system_of(kwargs: Mapping[str, Any]) -> str:
    """The system of G_kwargs by its class_name; 'stylegan2' if it has none. Raises UserError if unknown."""
    names = {form.generator: name for name, form in SYSTEM_FORMS.items()} | NAMES_BEFORE
    found = kwargs.get('class_name', SYSTEM_FORMS['stylegan2'].generator)
    if found not in names:
        known = ', '.join(form.generator for form in SYSTEM_FORMS.values())
        raise UserError(f'training options: unknown generator {found}; known are {known}')
    return names[found]


def check_unused(system: str, preset: str, flag: str, value: Any) -> None:
    """Raise UserError for an option that has no effect on the system.  value: parsed."""
    if flag in SYSTEM_FORMS[system].unused and value not in HARMLESS:
        raise UserError(f'--{flag}={value} has no effect with --cfg={preset}; omit one of the two')


def read_sections(options: dict[str, Any], system: str, data: DataConfig) -> dict[str, Any]:
    """Pop the arguments of G, D and the loss from the published dictionary; returns sections."""
    form = SYSTEM_FORMS[system]
    G, D, loss = [without_class_name(options.pop(key)) for key in ('G_kwargs', 'D_kwargs', 'loss_kwargs')]
    return {'G': form.read_G(G, data), 'D': form.read_D(D, data), 'loss': form.read_loss(loss)}
