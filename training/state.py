# SPDX-License-Identifier: Apache-2.0
"""TrainingState: everything that a resume needs, and how it is built, saved and restored."""
import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dnnlib.util import UserError, first_line
from torch_utils import distributed, misc
from torch_utils.training_stats import Store
from training import augment
from training.augmentation import ada
from training.config import TrainConfig
from training.phases import lazy_adam
from training.systems.table import SYSTEMS
from training.transfer.weights import transfer

# In the order of the file.
LOOP_FIELDS = ('tick', 'tick_start_nimg', 'num_snapshots', 'metrics_due', 'named_nimg', 'elapsed_sec')


@dataclass
class GuardCounts:
    """What training.guards counts, in ticks; dictionaries are by phase.

    collapsed, won, nonfinite: ticks in a row in which the alarm's condition held.  num_broken: steps with a
    non-finite loss or gradient.  quiet_until: the tick before which a phase is not reported again.
    """

    num_ticks: int = 0
    collapsed: int = 0
    won: int = 0
    num_broken: dict[str, int] = field(default_factory=dict)
    quiet_until: dict[str, int] = field(default_factory=dict)
    nonfinite: int = 0


@dataclass
class TrainingState:
    """Networks, optimizers, augmentation, running means, and all counters of a run.

    loss owns pl_mean, augment_pipe its p, ada the sums for the next p (None unless --aug=ada).
    statistics: what has been reported since the last tick.
    cur_nimg: real images shown so far, over all processes.  batch_idx: iterations so far.
    tick: number of the current tick, which began at tick_start_nimg.  num_snapshots: network snapshots so
    far.  named_nimg: cur_nimg of the files named last, -1 for none.  metrics_due: the network snapshot whose
    metrics may be incomplete, '' for none.  elapsed_sec: duration of the run up to its last snapshot.
    """

    G: torch.nn.Module
    D: torch.nn.Module
    G_ema: torch.nn.Module
    G_opt: torch.optim.Optimizer
    D_opt: torch.optim.Optimizer
    loss: Any
    augment_pipe: augment.AugmentPipe | None
    ada: ada.AdaController | None
    statistics: Store = field(default_factory=Store)
    guards: GuardCounts = field(default_factory=GuardCounts)
    cur_nimg: int = 0
    batch_idx: int = 0
    tick: int = 0
    tick_start_nimg: int = 0
    num_snapshots: int = 0
    named_nimg: int = -1
    metrics_due: str = ''
    elapsed_sec: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values and tensors (not copies), in the sections of a training state: 'run'
        (networks, optimizers, augmentation), 'loop' (ticks and snapshots) and 'extra' (statistics and guard
        counts). All processes must call.
        """
        networks = {
            name: dict(misc.named_params_and_buffers(module)) for name, module in self._networks().items()}
        controller = None if self.ada is None else self.ada.state_dict()
        if controller is not None:
            # Each process has its own sums since the last update of p; sums of signs are exact.
            distributed.all_reduce_sum(controller['pending'])
        run = {
            **networks, 'G_opt': self.G_opt.state_dict(), 'D_opt': self.D_opt.state_dict(),
            'pl_mean': self.loss.pl_mean, 'ada': controller,
            'augment_p': None if self.augment_pipe is None else self.augment_pipe.p,
            'cur_nimg': self.cur_nimg, 'batch_idx': self.batch_idx}
        return {'run': run, 'loop': {name: getattr(self, name) for name in LOOP_FIELDS},
                'extra': {'statistics': distributed.gather_values(self.statistics.state_dict()),
                          'guards': dataclasses.asdict(self.guards)}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what state_dict() returned; settings such as learning rates stay those of this run.

        Raises UserError if the networks differ, or parts are missing.
        """
        try:
            self._load_parts(saved)
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f'--resume: parts of the training state are missing or of another kind '
                            f'({type(error).__name__}: {first_line(error)}); use an earlier one') from error

    def _load_parts(self, saved: Mapping[str, Any]) -> None:
        run, extra = saved['run'], saved['extra']
        for name, module in self._networks().items():
            _load_tensors(name, module, run[name])
        for name, opt in (('G_opt', self.G_opt), ('D_opt', self.D_opt)):
            opt.load_state_dict({**run[name], 'param_groups': opt.state_dict()['param_groups']})
            _lay_out_like_parameters(opt)
        self.loss.pl_mean.copy_(run['pl_mean'])
        # A run resumed with another kind of augmentation (--allow-changes) has its own p.
        if self.augment_pipe is not None and run['augment_p'] is not None and self.ada is not None:
            self.augment_pipe.p.copy_(run['augment_p'])
        if self.ada is not None and run['ada'] is not None:
            self.ada.load_state_dict(run['ada'])
            if distributed.rank() != 0:
                self.ada.pending.zero_()
        self.cur_nimg, self.batch_idx = run['cur_nimg'], run['batch_idx']
        for name in LOOP_FIELDS:
            setattr(self, name, saved['loop'][name])
        # A resume may have more processes than the run had before. All must know the same names, whose
        # moments they add up.
        of_ranks, own = extra['statistics'], distributed.rank()
        statistics = of_ranks[own] if own < len(of_ranks) else {**of_ranks[0], 'rows': []}
        self.statistics.load_state_dict(statistics, self.loss.pl_mean.device)
        if 'guards' in extra:
            self.guards = GuardCounts(**extra['guards'])

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {'G': self.G, 'D': self.D, 'G_ema': self.G_ema}

    @property
    def augment_p(self) -> float:
        """Current probability of augmentation, 0 without; waits for a GPU."""
        return 0.0 if self.augment_pipe is None else float(self.augment_pipe.p)


def seed_iteration(seed: int, rank: int, cur_nimg: int) -> np.random.Generator:
    """Seed torch for the iteration at cur_nimg and return NumPy's generator for it: a pure function of the
    three.
    """
    sequence = np.random.SeedSequence([seed, rank, cur_nimg])
    number = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    # torch.manual_seed also tries devices that this machine lacks, which takes a hundred microseconds.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    return np.random.default_rng(sequence)


def build_state(
    config: TrainConfig, label_dim: int, channels: int, device: torch.device,
    store: Store | None = None,
) -> TrainingState:
    """A run at image 0: fresh networks, or those of config.resume_pkl as far as their tensors fit.

    label_dim, channels: of the dataset.  store: of the statistics of the losses; None: they are dropped.
    """
    system = SYSTEMS[config.system]
    torch.manual_seed(config.random_seed)
    layout = _weight_format(config, device)
    G, D = [_at_rest(network, device, layout) for network in system.networks(config, label_dim, channels)]
    G_ema = copy.deepcopy(G).eval()
    if config.resume_pkl is not None:
        transfer(config.resume_pkl, {'G': G, 'D': D, 'G_ema': G_ema}, config.run_dir)
    pipe, controller = _build_augmentation(config, device)
    return TrainingState(
        G=G, D=D, G_ema=G_ema, augment_pipe=pipe, ada=controller,
        G_opt=lazy_adam(list(G.parameters()), **config.G_opt.kwargs(), interval=config.G_reg_interval),
        D_opt=lazy_adam(list(D.parameters()), **config.D_opt.kwargs(), interval=config.D_reg_interval),
        loss=system.loss(
            G, D, pipe, **config.loss_kwargs(), ada=controller,
            report=(lambda name, values: values) if store is None else store.report),
        statistics=Store() if store is None else store)


@torch.no_grad()
def _load_tensors(name: str, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into the module's of the same name; all must be there, in the same shape."""
    own = dict(misc.named_params_and_buffers(module))
    shapes, found = [{key: tuple(t.shape) for key, t in each.items()} for each in (own, tensors)]
    if shapes != found:
        key = next(key for key in [*shapes, *found] if shapes.get(key) != found.get(key))
        raise UserError(f'--resume: {name}.{key} is {found.get(key, "absent")} in the training state, but '
                        f'{shapes.get(key, "absent")} in this run; keep the options of the networks')
    for key, target in own.items():
        target.copy_(tensors[key])


def _lay_out_like_parameters(opt: torch.optim.Optimizer) -> None:
    """Give the moments the strides of their parameters, as fused optimizers expect: a state may come from a
    run on another device.
    """
    for p, values in opt.state.items():
        for key, value in values.items():
            if value.shape == p.shape and value.stride() != p.stride():
                values[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _weight_format(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """That of the activations, so that convolutions need not convert their weight."""
    is_nhwc = (device.type == 'cuda' and config.system == 'stylegan2' and config.allow_tf32 is not False
               and config.G.channels_last is not False)
    return torch.channels_last if is_nhwc else torch.preserve_format


def _at_rest(
    module: torch.nn.Module, device: torch.device, layout: torch.memory_format = torch.preserve_format,
) -> torch.nn.Module:
    """In training mode, with gradients disabled until a phase enables them."""
    return module.train().requires_grad_(requires_grad=False).to(device=device, memory_format=layout)


def _build_augmentation(
    config: TrainConfig, device: torch.device,
) -> tuple[augment.AugmentPipe | None, ada.AdaController | None]:
    """(pipeline, controller); no controller where p is fixed, no pipeline where p stays 0."""
    options = config.augment
    if options.mode == 'noaug' or (options.mode == 'fixed' and not options.p):
        return None, None
    pipe = _at_rest(augment.AugmentPipe(**config.augment_kwargs()), device)
    pipe.p.fill_(options.p)
    if options.mode == 'fixed':
        return pipe, None
    return pipe, ada.AdaController(
        options.target, config.batch_size, interval=config.ada_interval, kimg=config.ada_kimg, device=device)


def ema_beta(cur_nimg: int, batch_size: int, ema_kimg: float, ema_rampup: float | None) -> float:
    """Decay of the EMA of G per iteration: 0.5 ^ (batch_size / half-life) (Karras et al. 2018, App. A.1).

    cur_nimg: images shown before this iteration.  ema_kimg: half-life in thousand images.
    ema_rampup: limits the half-life to this share of cur_nimg, None for no limit; the first beta is then 0.
    """
    half_life_nimg = ema_kimg * 1000
    if ema_rampup is not None:
        half_life_nimg = min(half_life_nimg, cur_nimg * ema_rampup)
    return 0.5 ** (batch_size / max(half_life_nimg, 1e-8))


@torch.no_grad()
def update_ema(G_ema: torch.nn.Module, G: torch.nn.Module, beta: float) -> None:
    """G_ema = beta * G_ema + (1 - beta) * G for parameters; copy the buffers (w_avg, noise maps)."""
    averages, currents = list(G_ema.parameters()), list(G.parameters())
    assert len(averages) == len(currents), f'G_ema has {len(averages)} parameters, G {len(currents)}'
    if averages:
        get_ema_multi_avg_fn(beta)(averages, currents, None)  # all tensors in few kernels on a GPU
    averages, currents = list(G_ema.buffers()), list(G.buffers())
    assert len(averages) == len(currents), f'G_ema has {len(averages)} buffers, G {len(currents)}'
    if averages:
        torch._foreach_copy_(averages, currents)
