# SPDX-License-Identifier: Apache-2.0
"""What may be different when a run goes on, and what would make another training of it."""
import dataclasses
from typing import Any

from dnnlib.util import UserError
from training.config.options import OPTIONS
from training.config.schema import TrainConfig

# Where a run reads, how long it lasts and what it reports: training itself is the same without.
MAY_CHANGE = frozenset({
    'run_dir', 'total_kimg', 'kimg_per_tick', 'image_snapshot_ticks', 'network_snapshot_ticks',
    'snapshot_minutes', 'metrics', 'metrics_every', 'keep', 'time_limit_sec', 'timeout_sec', 'wandb',
    'device', 'cudnn_benchmark', 'ops', 'cuda_graphs', 'compile', 'snapshot_formats', 'data.path',
    'data.num_workers', 'data.cache', 'detector_dir'})
# For settings that no flag, or more than one, sets as they are: what the user may have changed.
CAUSES = {
    'snapshot_formats': '--snapshot-format',
    'batch_size': '--batch', 'precision': '--precision', 'data.random_seed': '--subset',
    'num_gpus': '--gpus', 'G.channels_last': '--nhwc', 'D.channels_last': '--nhwc',
    'allow_tf32': '--allow-tf32', 'augment.mode': '--aug', 'augment.p': '--p',
    'augment.target': '--target', 'augment.multipliers': '--augpipe', 'data.use_labels': '--cond',
    'data.max_size': '--subset or --data', 'data.resolution': '--data', 'resume_pkl': '--resume',
    'G.num_fp16_res': '--precision', 'D.num_fp16_res': '--precision', 'ema_kimg': '--cfg',
    'ema_rampup': '--cfg', 'system': '--cfg', 'G_reg_interval': '--cfg', 'D_reg_interval': '--cfg',
    'G_opt.betas': '--cfg', 'D_opt.betas': '--cfg', 'ada_kimg': '--cfg', 'loss.pl_weight': '--cfg',
    'loss.style_mixing_prob': '--cfg'}


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Dotted names of the settings that differ."""
    old, new = _flatten(before), _flatten(after)
    return [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]


def check_changes(before: TrainConfig, after: TrainConfig) -> None:
    """Raise UserError, naming them, if there are changes that make another training of the run."""
    old, new = _flatten(before), _flatten(after)
    told = [f'{_flag(path)} ({path} was {old.get(path)}, now {new.get(path)})'
            for path in changes(before, after) if path not in MAY_CHANGE]
    if told:
        raise UserError(f'--resume: this would be another training because of {", ".join(told)}; leave out '
                        'what was not given before, or add --allow-changes=1')


def _flatten(config: TrainConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        # Only sections are opened; a dictionary inside one is a value.
        if dataclasses.is_dataclass(getattr(config, name)):
            flat.update({f'{name}.{key}': item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def _flag(path: str) -> str:
    names = [f'--{option.name}' for option in OPTIONS if path in option.paths]
    return CAUSES.get(path) or (names[0] if names else path)
