# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run: options, presets, and the resolved TrainConfig.

Standard library only, so that --help is instant.
"""
from training.config.options import AUGMENT_GROUPS, OPTIONS, PIPELINES, Option, continues
from training.config.presets import PRESETS, Preset
from training.config.resolve import check_flags, fitting_group, notes, resolve, run_description
from training.config.schema import TrainConfig
from training.config.sections import (
    AugmentConfig,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
)
from training.config.values import METRICS, DatasetInfo, split_resolution

__all__ = [
    'AUGMENT_GROUPS',
    'METRICS',
    'OPTIONS',
    'PIPELINES',
    'PRESETS',
    'AugmentConfig',
    'DataConfig',
    'DatasetInfo',
    'DiscriminatorConfig',
    'GeneratorConfig',
    'LossConfig',
    'OptimizerConfig',
    'Option',
    'Preset',
    'TrainConfig',
    'check_flags',
    'continues',
    'fitting_group',
    'notes',
    'resolve',
    'run_description',
    'split_resolution',
]
