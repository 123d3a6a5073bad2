# SPDX-License-Identifier: Apache-2.0
"""TrainingState: everything that a run is between two iterations."""
import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import legacy
from dnnlib.util import UserError
from torch_utils import distributed, misc
from training import ada, augment, ema, networks
from training.config import TrainConfig
from training.loss import StyleGAN2Loss
from training.phases import lazy_adam


@dataclass
class TrainingState:
    """Networks, optimizers, augmentation, running means and counters.

    loss owns pl_mean, augment_pipe its p, ada the statistics towards the next p (None unless --aug=ada).
    cur_nimg: real pictures shown so far, over all processes.  batch_idx: iterations so far.
    """

    G: networks.Generator
    D: networks.Discriminator
    G_ema: networks.Generator
    G_opt: torch.optim.Optimizer
    D_opt: torch.optim.Optimizer
    loss: StyleGAN2Loss
    augment_pipe: augment.AugmentPipe | None
    ada: ada.AdaController | None
    cur_nimg: int = 0
    batch_idx: int = 0

    def advance(self, config: TrainConfig) -> None:
        """After the phases of an iteration: average G, count, and move p where it is due. All processes call it."""
        # Running means of what each process saw; both are linear in it, so that averaging them loses nothing.
        means = [self.loss.pl_mean, *(b for name, b in self.G.named_buffers() if name.endswith('w_avg'))]
        distributed.average(means)
        beta = ema.ema_beta(self.cur_nimg, config.batch_size, config.ema_kimg, config.ema_rampup)
        ema.update_ema(self.G_ema, self.G, beta)
        self.cur_nimg += config.batch_size
        self.batch_idx += 1
        if self.ada is not None and self.ada.is_due(self.batch_idx):
            self.ada.update(self.augment_pipe.p)

    @property
    def augment_p(self) -> float:
        """Current probability of augmentation, 0 without; waits for a GPU."""
        return 0.0 if self.augment_pipe is None else float(self.augment_pipe.p)


def pick_device(name: str) -> torch.device:
    """The device of --device=auto|cuda|cpu. Raises UserError if there is no GPU to be had."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError(
            '--device=cuda: PyTorch sees no CUDA device here; use --device=cpu or install a CUDA build')
    return torch.device(name)


def seed_iteration(seed: int, rank: int, cur_nimg: int) -> np.random.Generator:
    """Seed torch for the iteration at cur_nimg and return NumPy's generator for it: a pure function of the
    three.
    """
    sequence = np.random.SeedSequence([seed, rank, cur_nimg])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return np.random.default_rng(sequence)


def build_state(
    config: TrainConfig, label_dim: int, channels: int, device: torch.device,
    report: Callable[[str, torch.Tensor], object],
) -> TrainingState:
    """A run at image 0: fresh networks, or those of config.resume_pkl as far as their tensors fit.

    label_dim, channels: of the dataset.  report(name, values): where the losses send their statistics.
    """
    torch.manual_seed(config.random_seed)
    shape = {'c_dim': label_dim, 'img_resolution': config.data.resolution, 'img_channels': channels}
    G = _at_rest(networks.Generator(**config.G_kwargs(), **shape), device)
    D = _at_rest(networks.Discriminator(**config.D_kwargs(), **shape), device)
    G_ema = copy.deepcopy(G).eval()
    if config.resume_pkl is not None:
        transfer(config.resume_pkl, {'G': G, 'D': D, 'G_ema': G_ema})
    pipe, controller = _build_augmentation(config, device)
    return TrainingState(
        G=G, D=D, G_ema=G_ema, augment_pipe=pipe, ada=controller,
        G_opt=lazy_adam(list(G.parameters()), **config.G_opt.kwargs(), interval=config.G_reg_interval),
        D_opt=lazy_adam(list(D.parameters()), **config.D_opt.kwargs(), interval=config.D_reg_interval),
        loss=StyleGAN2Loss(G, D, pipe, **config.loss.kwargs(), report=_with_signs(report, controller)))


def transfer(path_or_url: str, into: dict[str, torch.nn.Module]) -> None:
    """Copy every tensor of equal name and shape from a network pickle into the modules of the same key."""
    source = legacy.load_network(path_or_url)
    for name, module in into.items():
        tensors = dict(misc.named_params_and_buffers(source[name]))
        kept = 0
        for key, target in misc.named_params_and_buffers(module):
            if key in tensors and tensors[key].shape == target.shape:
                target.detach().copy_(tensors[key].detach())
                kept += 1
        total = len(misc.params_and_buffers(module))
        print(f'{name}: {kept} of {total} tensors taken from {path_or_url}, {total - kept} made fresh')


def _at_rest(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """In training mode, gradients off until a phase turns them on."""
    return module.train().requires_grad_(requires_grad=False).to(device)


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


def _with_signs(
    report: Callable[[str, torch.Tensor], object], controller: ada.AdaController | None,
) -> Callable[[str, torch.Tensor], object]:
    """The same report, which also shows the controller D's signs on real pictures."""
    if controller is None:
        return report

    def report_and_add(name: str, values: torch.Tensor) -> object:
        if name == 'Loss/signs/real':
            controller.add(values)
        return report(name, values)
    return report_and_add
