# SPDX-License-Identifier: Apache-2.0
"""Guards: at the end of each tick, warn about common failures of a run, with the usual remedies.

They detect non-finite values, mode collapse (fake images hardly differ) and a discriminator that is always
right. Only tick() and an active AnomalyDetector synchronize with the device.
"""
import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import misc
from training.phases import Phase
from training.state import TrainingState


@dataclass(frozen=True)
class Finding:
    """The first place with a non-finite value.

    kind: 'weight', 'activation', 'loss' or 'gradient'.  where: dotted name of the layer or tensor, as in
    named_modules; '' for the loss itself.  is_half: whether the values are float16 or bfloat16.
    """

    kind: str
    where: str
    is_half: bool = False


@dataclass(frozen=True)
class _Call:
    """A finished call of a module, and whether its outputs are finite: a bool scalar on their device."""

    name: str
    module: torch.nn.Module
    is_finite: torch.Tensor
    is_half: bool


class AnomalyDetector:
    """Context manager for Phase.detector: watches up to `max_runs` runs, then removes itself.

    modules: name -> network; all their submodules are watched.  buffers: name -> tensor, further possible
    causes.  found: called once, with the Finding, or None if all runs were finite. Synchronizes with the
    device after each watched run.
    """

    def __init__(
        self, phase: Phase, modules: Mapping[str, torch.nn.Module], buffers: Mapping[str, torch.Tensor],
        found: Callable[[Finding | None], object], max_runs: int = 32,
    ):
        self.phase, self.modules, self.buffers = phase, dict(modules), dict(buffers)
        self.found, self.runs_left = found, max_runs
        self._calls: list[_Call] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> None:
        for name, module in _all_modules(self.modules):
            handle = module.register_forward_hook(self._recorder(name))
            self._hooks.callback(handle.remove)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self._hooks.close()
        calls, self._calls = self._calls, []
        if error is not None:
            return
        finding = self._diagnose(calls)
        self.runs_left -= 1
        if finding is not None or self.runs_left <= 0:
            self.phase.detector = contextlib.nullcontext()
            self.found(finding)

    def _recorder(self, name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def record(module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            tensors = [t.detach() for t in (outputs if isinstance(outputs, tuple) else (outputs,))
                       if isinstance(t, torch.Tensor)]
            if tensors:
                is_half = any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
                self._calls.append(_Call(name, module, _all_finite(tensors), is_half))
        return record

    def _diagnose(self, calls: Sequence[_Call]) -> Finding | None:
        """The first non-finite value: an activation, a tensor of self.buffers, or a gradient."""
        # A submodule finishes before the module that contains it, so the first is also the innermost.
        first = _first([call.is_finite for call in calls])
        if first is not None:
            return _explain(calls[first])
        causes = {**self.buffers, '': self.phase.total_loss}
        first = _first([_all_finite([tensor]) for tensor in causes.values()])
        if first is not None:
            return Finding('loss', list(causes)[first])
        return self._diagnose_gradients(calls)

    def _diagnose_gradients(self, calls: Sequence[_Call]) -> Finding | None:
        """The gradient that is computed first: backward passes go from the last call to the first."""
        calls_by_name = {call.name: i for i, call in enumerate(calls)}
        names = _parameter_names(self.modules)
        rows = []
        for parameter, view in zip(self.phase.gradients.parameters, self.phase.gradients.views, strict=True):
            name = names[parameter]
            # Modules that were not called have no gradient.
            rows.append((calls_by_name.get(name.rpartition('.')[0], -1), name, view))
        rows.sort(key=lambda row: row[0], reverse=True)
        first = _first([_all_finite([view]) for _, _, view in rows])
        if first is None:
            return None
        last_call, name, _ = rows[first]
        return Finding('gradient', name, last_call >= 0 and calls[last_call].is_half)


def _all_modules(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    for network, module in modules.items():
        for name, submodule in module.named_modules():
            yield f'{network}.{name}' if name else network, submodule


def _parameter_names(modules: Mapping[str, torch.nn.Module]) -> dict[torch.nn.Parameter, str]:
    return {parameter: f'{network}.{name}'
            for network, module in modules.items() for name, parameter in module.named_parameters()}


def _all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.detach().isfinite().all() for t in tensors]).all()


def _first(are_finite: Sequence[torch.Tensor]) -> int | None:
    """Index of the first that is False, or None; waits for the device once."""
    if not are_finite:
        return None
    values = torch.stack(list(are_finite)).tolist()
    return values.index(False) if False in values else None


def _explain(call: _Call) -> Finding:
    """The non-finite weight or buffer of the layer, else its activation."""
    own = [*call.module.named_parameters(recurse=False), *call.module.named_buffers(recurse=False)]
    broken = _first([_all_finite([tensor]) for _, tensor in own])
    if broken is not None:
        return Finding('weight', f'{call.name}.{own[broken][0]}')
    return Finding('activation', call.name, call.is_half)


def nonfinite_weight(state: TrainingState) -> str | None:
    """Name of the first parameter, buffer or running mean of a run that is not finite. Waits for the device.

    Such a value stays non-finite: Adam and the averages add to it.
    """
    modules = {'G': state.G, 'D': state.D, 'G_ema': state.G_ema, 'augment': state.augment_pipe}
    named = {f'{network}.{name}': tensor for network, module in modules.items() if module is not None
             for name, tensor in misc.named_params_and_buffers(module)}
    named['pl_mean'] = state.loss.pl_mean
    index = _first([_all_finite([tensor]) for tensor in named.values()])
    return None if index is None else list(named)[index]


NONFINITE_TICKS = 3  # in a row with a non-finite weight, after which a run stops
PATIENCE_TICKS = 4  # shorter episodes also occur in healthy runs
REPEAT_TICKS = 10  # between reports of one phase

MIN_DIVERSITY = 0.1  # of the training images'; runs of the demo had 0.4 to 1 from 4 kimg on, 2 at the start
DIVERSITY_SIDE = 16  # pixels; finer detail such as noise is irrelevant for diversity
DIVERSITY_IMAGES = 32

WON_SIGN = 0.95  # mean sign of D's logits: right for 97.5 % of the images
WON_LOSS = 0.1  # of D; chance level is 1.39
HIGHEST_P = 0.99  # of augmentation; ADA cannot raise it further


class DiversityProbe:
    """Diversity of fake images from fixed latents, relative to training images.

    reals: uint8 [n, C, H, W].  z, c: latents [n, z_dim] and labels [n, c_dim], on the device of the
    generator. Of the n at most DIVERSITY_IMAGES are used, spread evenly.  batch: images at a time.
    """

    def __init__(self, reals: np.ndarray, z: torch.Tensor, c: torch.Tensor, batch: int):
        count = min(len(reals), DIVERSITY_IMAGES)
        chosen = np.linspace(0, len(reals) - 1, count).astype(int)
        self._z, self._c, self._batch = z[chosen], c[chosen], batch
        self.real_distance = nearest_distance(torch.from_numpy(reals[chosen]).float() / 127.5 - 1)

    @torch.inference_mode()
    def ratio(self, G_ema: torch.nn.Module) -> float:
        """Mean distance of a fake image from its nearest neighbour, divided by that of the real images.

        NaN if all real images are equal, or fake images non-finite.
        """
        img = torch.cat([_small(G_ema(z, c, noise_mode='const')) for z, c in zip(
            self._z.split(self._batch), self._c.split(self._batch), strict=True)])
        return nearest_distance(img) / self.real_distance if self.real_distance > 0 else math.nan


def nearest_distance(img: torch.Tensor) -> float:
    """Mean distance of each image [n, C, H, W] in [-1, 1] from the one most similar to it; 0 if n < 2.

    Unlike the mean over all pairs, it also falls when a generator makes only a few different images. Root
    mean square over the pixels of downsampled versions.
    """
    if len(img) < 2:
        return 0.0
    flat = _small(img).flatten(1).double()
    distances = torch.cdist(flat, flat, compute_mode='donot_use_mm_for_euclid_dist')
    distances.fill_diagonal_(math.inf)
    return float(distances.amin(dim=1).mean()) / math.sqrt(flat.shape[1])


def _small(img: torch.Tensor) -> torch.Tensor:
    size = [min(side, DIVERSITY_SIDE) for side in img.shape[2:]]
    return F.adaptive_avg_pool2d(img.float().clamp(-1, 1), size)


class Guards:
    """Watches a run; build it with the phases, and call tick() once each tick has been reported.

    probe: measures diversity; None on all ranks but 0.  unused: names of flags that this run would refuse,
    so that messages do not recommend them. The counts are in state.guards.
    """

    def __init__(
        self, state: TrainingState, phases: Sequence[Phase], probe: DiversityProbe | None,
        unused: Sequence[str] = (),
    ):
        self.state, self.phases, self.probe = state, {p.name: p for p in phases}, probe
        self.unused = unused
        counts = state.guards
        # A run resumed with other phases starts counting for them.
        for by_phase in (counts.num_broken, counts.quiet_until):
            by_phase.update({name: by_phase.pop(name, 0) for name in self.phases})
            for name in by_phase.keys() - self.phases.keys():
                del by_phase[name]
        # Phase.num_broken counts from the start of this process.
        self._before = dict(counts.num_broken)
        self._lines: list[str] = []

    def tick(self, mean: Callable[[str], float], augment_p: float) -> list[str]:
        """Lines to print, usually none. Waits for the device.

        Findings of an AnomalyDetector are reported at the next tick, all others immediately.
        mean(name): mean of a statistic over the tick, NaN if there is none.  augment_p: current probability.
        """
        counts = self.state.guards
        counts.num_ticks += 1
        counts.nonfinite = ticks_in_a_row(counts.nonfinite, nonfinite_weight(self.state) is not None)
        self._watch_broken_phases()
        lines, self._lines = self._lines, []
        return lines + self._collapse() + self._victory(mean, augment_p)

    def _watch_broken_phases(self) -> None:
        """Watch the next runs of phases with new non-finite steps."""
        counts = torch.stack([phase.num_broken for phase in self.phases.values()]).tolist()
        state, known = self.state, self.state.guards
        for (name, phase), count in zip(self.phases.items(), counts, strict=True):
            total = self._before[name] + count
            if total > known.num_broken[name] and known.num_ticks >= known.quiet_until[name]:
                known.quiet_until[name] = known.num_ticks + REPEAT_TICKS
                networks = {'G': state.G, 'D': state.D, 'augment': state.augment_pipe}
                phase.detector = AnomalyDetector(
                    phase, {key: module for key, module in networks.items() if module is not None},
                    {'pl_mean': state.loss.pl_mean}, functools.partial(self._report, phase))
            known.num_broken[name] = total

    def _report(self, phase: Phase, finding: Finding | None) -> None:
        count = self._before[phase.name] + int(phase.num_broken) + (finding is not None)
        self._lines.append(broken_line(
            phase.name, finding, self.state.cur_nimg / 1000, count, self.unused))

    def _collapse(self) -> list[str]:
        ratio = math.nan if self.probe is None else self.probe.ratio(self.state.G_ema)
        counts = self.state.guards
        counts.collapsed = ticks_in_a_row(counts.collapsed, ratio < MIN_DIVERSITY)
        if counts.collapsed != PATIENCE_TICKS:
            return []
        return [f'The generator seems to have collapsed: for {PATIENCE_TICKS} ticks its images have had less '
                f'than {MIN_DIVERSITY:.0%} of the diversity of training images (now {ratio:.1%}). '
                'Remedies: ' + self._remedies(
                    '--resume from an earlier snapshot', 'a higher --gamma', 'a lower --glr or --dlr')]

    def _victory(self, mean: Callable[[str], float], augment_p: float) -> list[str]:
        has_won = (mean('Loss/signs/real') > WON_SIGN and mean('Loss/signs/fake') < -WON_SIGN
                   and mean('Loss/D/loss') < WON_LOSS)
        # Below its limit, ADA will raise p by itself.
        is_alone = self.state.ada is None or augment_p >= HIGHEST_P
        counts = self.state.guards
        counts.won = ticks_in_a_row(counts.won, has_won and is_alone)
        if counts.won != PATIENCE_TICKS:
            return []
        help_first = '--aug=ada' if self.state.ada is None else '--resume from a trained network'
        return [f'The discriminator has won: for {PATIENCE_TICKS} ticks it has distinguished nearly all '
                'training images from generated ones, so the generator hardly learns anymore. Remedies: '
                + self._remedies(help_first, 'more training images', '--mirror=1', 'a higher --gamma',
                                 'a lower --dlr')]

    def _remedies(self, *texts: str) -> str:
        return ', '.join(usable(texts, self.unused)) + '.'


def ticks_in_a_row(num_ticks: int, is_on: bool) -> int:
    """The count after one more tick.

    An alarm fires when it reaches PATIENCE_TICKS, and is re-armed once the condition clears.
    """
    return num_ticks + 1 if is_on else 0


def usable(remedies: Iterable[str], unused: Sequence[str]) -> list[str]:
    """The remedies that name no flag in `unused`."""
    return [text for text in remedies if not set(re.findall(r'--([a-z-]+)', text)) & set(unused)]


def broken_line(
    phase: str, finding: Finding | None, kimg: float, count: int, unused: Sequence[str] = (),
) -> str:
    """One line about non-finite values: place, time, count and remedies.

    phase: its name, which begins with the letter of its network.  finding: None if later runs were finite.
    unused: as in Guards.
    """
    network = finding.where[0] if finding is not None and finding.where[:2] in ('G.', 'D.') else phase[0]
    times = f'{count} step{"s" if count != 1 else ""} so far'
    if finding is None:
        where = f'a loss or gradient was not finite, but all were in the runs watched up to {kimg:.1f} kimg'
    else:
        where = f'{_place(finding)} is not finite at {kimg:.1f} kimg'
    remedies = itertools.chain(
        _causes_in_state(finding), [f'a lower --{network.lower()}lr', 'a higher --gamma'],
        ['--precision=fp32'] if finding is None or finding.is_half else [])
    return (f'{phase}: {where} ({times}). Training continues without the non-finite gradients. '
            f'Remedies if this lasts: {", ".join(usable(remedies, unused))}.')


def _place(finding: Finding) -> str:
    if finding.kind == 'activation':
        precision = '16-bit ' if finding.is_half else ''
        return f'the {precision}output of {finding.where}'
    if finding.kind == 'loss':
        return f'the loss, as its {finding.where},' if finding.where else 'the loss, after finite outputs,'
    return f'the {finding.kind} {"of " if finding.kind == "gradient" else ""}{finding.where}'


def _causes_in_state(finding: Finding | None) -> list[str]:
    # Stored non-finite values never recover.
    if finding is not None and (finding.kind == 'weight' or (finding.kind == 'loss' and finding.where)):
        return ['start again from an earlier snapshot with --resume']
    return []
