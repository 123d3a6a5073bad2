# SPDX-License-Identifier: Apache-2.0
"""From options to a training run: `resolve` builds a TrainConfig from flags and the dataset.

Standard library only and no side effects, so that --help and checks are instant and every rule can be tested
without files.
"""
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from dnnlib.util import UserError
from training.config.options import (
    COLOR_CHANNELS,
    OPTIONS,
    PIPELINES,
    Request,
    Settings,
    pipeline_multipliers,
)
from training.config.presets import FMAPS_BASE, PRESETS, Preset
from training.config.schema import TrainConfig
from training.config.systems import check_unused
from training.config.values import DatasetInfo, split_resolution

SECTIONS: dict[str, Any] = {
    f.name: f.type for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(f.type)}
FEW_IMAGES = 100  # fewer: a note


def check_flags(flags: Mapping[str, Any], before: str | None = None) -> None:
    """Raise UserError for the first flag whose value is wrong on its own.

    flags: by name with underscores; None: not given.  before: check only the options listed before this one.
    """
    known = {option.key for option in OPTIONS}
    # A misspelt name must not be ignored.
    unknown = sorted(set(flags) - known)
    if unknown:
        raise UserError(f'unknown setting {unknown[0]!r}; known are {", ".join(sorted(known))}')
    for option in OPTIONS:
        if option.name == before:
            return
        if flags.get(option.key) is not None:
            option.read(flags[option.key])


def resolve(flags: Mapping[str, Any], dataset: DatasetInfo) -> TrainConfig:
    """The configuration of a run, with run_dir '.' as a placeholder.

    flags: values of OPTIONS by name with underscores (`batch_gpu`); absent or None: not given.
    Raises UserError that names the flag, for the first error in the order of OPTIONS.
    """
    check_flags(flags, before='data')
    request = Request(flags, dataset)
    split_resolution(dataset.height, dataset.width)
    # The preset defines all settings; the given flags override theirs, in the order of the table.
    preset = _preset(request)
    settings = _preset_settings(preset, request)
    for option in OPTIONS:
        value = flags.get(option.key)
        if value is not None:
            parsed = option.read(value)
            check_unused(preset.system, str(request.flags.get('cfg')), option.name, parsed)
            option.apply(settings, parsed, request)
    # Last, since several flags decide batch_gpu.
    settings['D.mbstd_group_size'] = fitting_group(settings['D.mbstd_group_size'], settings['batch_gpu'])
    return _build(settings)


def run_description(flags: Mapping[str, Any], dataset: DatasetInfo) -> str:
    """A run's name, without its number: dataset, preset, and the flags that affect training."""
    request = Request(flags, dataset)
    # abspath drops a trailing slash, which would leave no name.
    parts = [os.path.splitext(os.path.basename(os.path.abspath(dataset.path)))[0]]
    for option in OPTIONS:
        value = flags.get(option.key)
        # The preset is always part of the name, the number of GPUs only if the preset depends on it.
        if option.name == 'cfg':
            parts.append(f'auto{request.gpus}' if value in (None, 'auto') else value)
        elif value is not None:
            parts.append(option.run_name_part(value))
    return '-'.join(part for part in parts if part)


def notes(flags: Mapping[str, Any], dataset: DatasetInfo, config: TrainConfig) -> list[str]:
    """Notes on a resolved run that the user may not expect."""
    request = Request(flags, dataset)
    preset = _preset(request)
    found = []
    if config.data.max_size < FEW_IMAGES:
        found.append(f'{config.data.max_size} images are few: a few hundred or more give better results; '
                     '--resume from a trained network and --mirror=1 help (docs/configs.md).')
    if config.D.mbstd_group_size != preset.mbstd:
        found.append(f'Minibatch standard deviation uses groups of {config.D.mbstd_group_size} images, not '
                     f'{preset.mbstd}, so that they divide --batch-gpu={config.batch_gpu}.')
    colourless = dataset.channels not in COLOR_CHANNELS
    if colourless and config.augment.mode != 'noaug' and not request.given('augpipe'):
        found.append(f'Augmentation leaves out colours: images of {dataset.channels} channels have none.')
    if config.resume_pkl is not None:
        found.append(f'Fine-tuning: a new run, from kimg 0, with the weights of {config.resume_pkl}.')
    return found


def _preset(request: Request) -> Preset:
    name = request.flags.get('cfg') or 'auto'
    if name not in PRESETS:
        raise UserError(f'--cfg={name} must be one of {", ".join(PRESETS)}')
    return PRESETS[name].settle(
        request.dataset.height, request.dataset.width, request.gpus, request.epoch_nimg / 1000)


def _preset_settings(preset: Preset, request: Request) -> Settings:
    """The settings of the preset, before any other flag than --cfg and --gpus."""
    channels = {'channel_base': int(preset.fmaps * FMAPS_BASE), 'channel_max': preset.channel_max,
                'num_fp16_res': preset.num_fp16_res, 'conv_clamp': preset.conv_clamp}
    # Presets assume ref_gpus GPUs; fewer GPUs accumulate gradients to the same batch size.
    batch_gpu = preset.batch // max(preset.ref_gpus or request.gpus, request.gpus)
    return {
        'run_dir': '.', 'num_gpus': request.gpus, 'random_seed': 0, 'metrics': preset.metrics,
        'image_snapshot_ticks': preset.image_snap or preset.snap, 'network_snapshot_ticks': preset.snap,
        **{f'data.{name}': value for name, value in _data_settings(request.dataset).items()},
        # G and D have the same number of feature maps at each resolution.
        **{f'{network}.{name}': value for network in 'GD' for name, value in channels.items()},
        'G.z_dim': preset.z_dim, 'G.w_dim': preset.w_dim, 'G.map_layers': preset.map_depth,
        'G.use_noise': preset.use_noise,
        # map_depth is that of G: the mapping network of D, used with labels, keeps its default depth.
        'D.mbstd_group_size': preset.mbstd, 'D.architecture': preset.architecture,
        'G_opt.lr': preset.lrate, 'D_opt.lr': preset.lrate, 'G_opt.betas': preset.betas,
        'D_opt.betas': preset.betas, 'system': preset.system, **_intervals(preset),
        'augment.mode': request.aug, 'loss.r1_gamma': preset.gamma,
        'loss.pl_weight': preset.pl_weight, 'loss.style_mixing_prob': preset.style_mixing_prob,
        'augment.multipliers': _default_multipliers(preset, request), 'total_kimg': preset.kimg,
        'batch_size': preset.batch, 'batch_gpu': max(batch_gpu, 1),
        'ema_kimg': preset.ema_kimg, 'ema_rampup': preset.ema_rampup, 'ada_kimg': preset.ada_kimg,
        'kimg_per_tick': preset.kimg_per_tick,
    }


def _intervals(preset: Preset) -> dict[str, None]:
    return {} if preset.is_lazy else {'G_reg_interval': None, 'D_reg_interval': None}


def _data_settings(dataset: DatasetInfo) -> dict[str, Any]:
    height, width = dataset.height, dataset.width
    return {'path': dataset.path, 'use_labels': False, 'max_size': dataset.num_images, 'xflip': False,
            'resolution': height if height == width else (height, width)}


def _default_multipliers(preset: Preset, request: Request) -> dict[str, float]:
    # Without augmentation, training_options.json lists no transforms.
    if request.aug == 'noaug':
        return {}
    groups = PIPELINES[preset.augpipe]
    colourless = 'color' in groups and request.dataset.channels not in COLOR_CHANNELS
    return pipeline_multipliers('bg' if colourless else preset.augpipe)


def fitting_group(group: int, batch_gpu: int) -> int:
    """The largest group size up to `group` that divides batch_gpu; `group` itself if batch_gpu is smaller."""
    if batch_gpu <= group:
        return group
    return max(size for size in range(1, group + 1) if batch_gpu % size == 0)


def _build(settings: Settings) -> TrainConfig:
    top = {name: value for name, value in settings.items() if '.' not in name}
    for section, cls in SECTIONS.items():
        prefix = section + '.'
        top[section] = cls(**{name.removeprefix(prefix): value for name, value in settings.items()
                              if name.startswith(prefix)})
    return TrainConfig(**top)
