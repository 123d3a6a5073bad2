# SPDX-License-Identifier: Apache-2.0
"""The presets of --cfg: one row per preset, one column per hyperparameter.

Entries may be functions of image size and number of GPUs.
"""
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.config.systems import UNLIMITED

FMAPS_BASE = 32768  # channel_base of a preset with fmaps = 1
DCGAN_FEATURES, DCGAN_EPOCHS = 64, 25  # ngf and ndf; passes through the dataset


@dataclass(frozen=True)
class Scale:
    """What rules depend on. epoch_kimg: size of the dataset in use, in kimg."""

    height: int
    width: int
    gpus: int
    batch: int = 0
    epoch_kimg: float = 0

    @property
    def side(self) -> int:
        """Side of the square with the same area, in pixels."""
        return math.isqrt(self.height * self.width)


Rule = Callable[[Scale], float]
Entry = Any  # a number or a Rule


@dataclass(frozen=True)
class Preset:
    """Hyperparameters.

    ref_gpus: number of GPUs that the batch size assumes; None: any.  kimg: training length.  batch: total
    batch size.  mbstd: group size of the minibatch standard deviation.  fmaps: feature maps relative to
    FMAPS_BASE.  lrate: learning rate of G and D.  gamma: R1 weight.  map_depth: layers of the mapping
    network.  snap: ticks between snapshots; image_snap: between sample images, None: as snap.  aug:
    augmentation mode.  betas: of Adam.  is_lazy: lazy regularisation.  Others: as in TrainConfig.
    """

    ref_gpus: int | None
    kimg: Entry
    batch: Entry
    mbstd: Entry
    fmaps: Entry
    lrate: Entry
    gamma: Entry
    ema_kimg: Entry
    ema_rampup: float | None
    map_depth: int
    z_dim: int = 512
    w_dim: int = 512
    channel_max: int = 512
    num_fp16_res: int = 4
    conv_clamp: float | None = 256
    use_noise: bool = True
    architecture: str | None = None
    pl_weight: float = 2
    style_mixing_prob: float = 0.9
    augpipe: str = 'bgc'
    ada_kimg: float = 500
    kimg_per_tick: Entry = 4
    snap: int = 50
    metrics: tuple[str, ...] = ('fid50k_full',)
    system: str = 'stylegan2'
    aug: str = 'ada'
    betas: tuple[float, float] = (0.0, 0.99)
    is_lazy: bool = True
    image_snap: int | None = None

    def settle(self, height: int, width: int, gpus: int, epoch_kimg: float = 0) -> 'Preset':
        """Evaluate all rules."""
        scale = Scale(height, width, gpus, epoch_kimg=epoch_kimg)
        # First the batch size, because other rules depend on it.
        batch = int(_settle(self.batch, scale))
        scale = dataclasses.replace(scale, batch=batch)
        values = {f.name: _settle(getattr(self, f.name), scale) for f in dataclasses.fields(self)}
        return Preset(**{**values, 'batch': batch})


def _settle(entry: Any, scale: Scale) -> Any:
    return entry(scale) if callable(entry) else entry


def _auto_batch(scale: Scale) -> int:
    """As many images as fit a memory budget per GPU, about 64 in total at most, and the same on each GPU."""
    per_gpu = min(4096 // scale.side, 32)
    return max(min(scale.gpus * per_gpu, 64) // scale.gpus, 1) * scale.gpus


def _auto_gamma(scale: Scale) -> float:
    return 0.0002 * (scale.height * scale.width) / scale.batch


# Visible progress within minutes on two CPU cores: 1,750 steps of a small network. EMA over the last hundred
# steps or so. No noise: after so few steps it would be visible as a pattern over all images.
_DEMO = Preset(
    ref_gpus=1, kimg=28, batch=16, mbstd=4, fmaps=1 / 64, lrate=0.006, gamma=1, ema_kimg=1, ema_rampup=None,
    map_depth=2, z_dim=128, w_dim=128, channel_max=64, num_fp16_res=0, conv_clamp=None, pl_weight=0,
    style_mixing_prob=0, use_noise=False, ada_kimg=100, kimg_per_tick=1, snap=4, metrics=('swd',))

PRESETS: dict[str, Preset] = {
    'auto': Preset(
        ref_gpus=None, kimg=25000, batch=_auto_batch, mbstd=lambda s: min(s.batch // s.gpus, 4),
        fmaps=lambda s: 1 if s.side >= 512 else 0.5, lrate=lambda s: 0.002 if s.side >= 1024 else 0.0025,
        gamma=_auto_gamma, ema_kimg=lambda s: s.batch * 10 / 32,
        ema_rampup=0.05, map_depth=2),
    # Columns: ref_gpus, kimg, batch, mbstd, fmaps, lrate, gamma, ema_kimg, ema_rampup, map_depth.
    'stylegan2': Preset(8, 25000, 32, 4, 1, 0.002, 10, 10, None, 8),
    'paper256': Preset(8, 25000, 64, 8, 0.5, 0.0025, 1, 20, None, 8),
    'paper512': Preset(8, 25000, 64, 8, 1, 0.0025, 0.5, 20, None, 8),
    'paper1024': Preset(8, 25000, 32, 4, 1, 0.002, 2, 10, None, 8),
    'cifar': Preset(
        2, 100000, 64, 32, 1, 0.0025, 0.01, 500, 0.05, 2,
        pl_weight=0, style_mixing_prob=0, architecture='orig'),
    'demo': _DEMO,
    # Noise is an essential part of the StyleGAN generator.
    'stylegan1-demo': dataclasses.replace(
        _DEMO, kimg=14, batch=8, gamma=0.1, ema_kimg=2, architecture='orig', system='stylegan1',
        use_noise=True, snap=2),
    # Networks: Karras et al. 2019. Schedule: that of auto, for any image size.
    'stylegan1': Preset(
        ref_gpus=None, kimg=25000, batch=_auto_batch, mbstd=lambda s: min(s.batch // s.gpus, 4), fmaps=0.5,
        lrate=lambda s: 0.002 if s.side >= 1024 else 0.0025, gamma=_auto_gamma,
        ema_kimg=lambda s: s.batch * 10 / 32, ema_rampup=0.05, map_depth=8, num_fp16_res=0, conv_clamp=None,
        pl_weight=0, architecture='orig', system='stylegan1'),
    # Radford et al. 2016, Sec. 4; 25 epochs, each one tick with sample images. No EMA: the statistics of
    # batch norm are not valid for averaged weights.
    'dcgan': Preset(
        ref_gpus=1, kimg=lambda s: max(DCGAN_EPOCHS * s.epoch_kimg, 1), batch=128, mbstd=1,
        fmaps=lambda s: DCGAN_FEATURES * s.height / 2 / FMAPS_BASE, lrate=0.0002, gamma=0, ema_kimg=0,
        ema_rampup=None, map_depth=1, z_dim=100, w_dim=100, channel_max=UNLIMITED, num_fp16_res=0,
        conv_clamp=None, pl_weight=0, style_mixing_prob=0, kimg_per_tick=lambda s: max(s.epoch_kimg, 1),
        snap=5, image_snap=1, metrics=('swd',), system='dcgan', aug='noaug', betas=(0.5, 0.999),
        is_lazy=False),
}
