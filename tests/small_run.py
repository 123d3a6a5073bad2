# SPDX-License-Identifier: Apache-2.0
"""A training of tiny networks on random images, without files, that tests can build in milliseconds."""
import dataclasses

import torch

from torch_utils import training_stats
from training.config import DatasetInfo, resolve
from training.iteration import PhaseClock, run_iteration
from training.state import build_state
from training.systems.table import SYSTEMS

CPU = torch.device('cpu')


def small_config(side=8, **flags):
    """--cfg=demo with next to no feature maps, but noise, on images of side x side."""
    flags = {'cfg': 'demo', 'data': 'x', 'outdir': 'x', 'batch': 4, 'cbase': 4 * side, 'cmax': 4,
             'device': 'cpu', **flags}
    config = resolve(flags, DatasetInfo('x', 12, side, side, 3, has_labels=False, label_dim=0))
    return _with_noise(config)


def small_training(data, run_dir, total_kimg, **flags):
    """What train() needs for a run of such networks on a folder of 8x8 RGB images, in ticks of one step."""
    flags = {'cfg': 'demo', 'data': str(data), 'outdir': 'unused', 'batch': 4, 'cbase': 32, 'cmax': 4,
             'device': 'cpu', 'metrics': 'none', 'workers': 0, **flags}
    config = resolve(flags, DatasetInfo(str(data), 8, 8, 8, 3, has_labels=False, label_dim=0))
    return dataclasses.replace(
        _with_noise(config), run_dir=str(run_dir), total_kimg=total_kimg, kimg_per_tick=0.004)


def _with_noise(config):
    return dataclasses.replace(config, G=dataclasses.replace(config.G, use_noise=True))


class SmallRun:
    """State, phases and statistics of a training, which step() advances by iterations."""

    def __init__(self, config, device=CPU):
        self.config, self.device = config, device
        self.store = training_stats.Store()
        self.collector = training_stats.Collector(keep_previous=False, store=self.store)
        self.state = build_state(config, 0, 3, device, self.store)
        self.phases = SYSTEMS[config.system].phases(
            config, self.state.loss, self.state.G_opt, self.state.D_opt)

    def phase(self, name):
        return next(p for p in self.phases if p.name == name)

    def step(self, count=1):
        for _ in range(count):
            # Of another seed than the iteration: real images have nothing to do with the latents.
            generator = torch.Generator().manual_seed(1 + self.state.cur_nimg)
            shape = [self.config.batch_size, 3, *self.config.data.size]
            real = torch.rand(shape, generator=generator).to(self.device) * 2 - 1
            run_iteration(self.state, self.phases, (real, torch.zeros([len(real), 0], device=self.device)),
                          lambda n, rng: torch.zeros([n, 0]), self.config, PhaseClock(self.device))
