# SPDX-License-Identifier: Apache-2.0
"""Guards: broken networks are named, collapse and an invincible discriminator are reported, health is not."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from small_run import SmallRun, small_config

from training.guards import (
    PATIENCE_TICKS,
    REPEAT_TICKS,
    AnomalyDetector,
    DiversityProbe,
    Finding,
    Guards,
    broken_line,
    nearest_distance,
    ticks_in_a_row,
)

NAN = float('nan')


def nothing(name):
    """Statistics of a tick without any."""
    return math.nan


def build(**flags):
    """A run and its guards, without a probe."""
    run = SmallRun(small_config(**flags))
    return run, Guards(run.state, run.phases, None)


def ticks(run, guards, count, mean=nothing, p=0.0):
    """Lines of so many ticks of one iteration."""
    lines = []
    for _ in range(count):
        run.step()
        lines += guards.tick(mean, p)
    return lines


def set_weight(module, name, value):
    with torch.no_grad():
        module.get_parameter(name).fill_(value)


def test_a_healthy_run_is_left_alone():
    run, guards = build()
    assert ticks(run, guards, 5) == []
    assert all(int(p.num_broken) == 0 for p in run.phases)


def test_a_broken_weight_is_named_with_phase_step_count_and_remedy():
    run, guards = build()
    set_weight(run.state.G, 'synthesis.b8.conv0.weight', NAN)
    lines = ticks(run, guards, 2)
    gmain = next(line for line in lines if line.startswith('Gmain'))
    assert 'weight G.synthesis.b8.conv0.weight' in gmain and '2 steps so far' in gmain
    assert '--resume' in gmain and '--glr' in gmain and '\n' not in gmain
    # The generator's images are what breaks D.
    assert any(line.startswith('Dmain') and 'G.synthesis.b8.conv0.weight' in line for line in lines)


def test_an_overflow_is_named_by_its_layer():
    run, guards = build()
    set_weight(run.state.D, 'b8.conv1.weight', 3e38)
    (line,) = [line for line in ticks(run, guards, 2) if line.startswith('Dmain')]
    assert 'output of D.b8.conv1 ' in line and '--dlr' in line and 'kimg' in line


def test_the_remedy_is_for_the_network_that_broke():
    assert 'a lower --dlr' in broken_line('Gmain', Finding('activation', 'D.b8.conv1'), 1, 1)
    assert 'a lower --glr' in broken_line('Gmain', Finding('loss', ''), 1, 1)


def test_no_remedy_is_a_flag_that_the_run_would_refuse():
    line = broken_line('Dmain', Finding('loss', ''), 1, 1, ('gamma', 'cond'))
    assert 'a lower --dlr' in line and '--gamma' not in line
    run, guards = build()
    guards.unused = ('gamma',)
    scores = {'Loss/signs/real': 1, 'Loss/signs/fake': -1, 'Loss/D/loss': 0}
    run.state.ada = None
    (won,) = [line for _ in range(PATIENCE_TICKS) for line in guards._victory(scores.get, 0)]
    assert '--gamma' not in won and won.endswith('--mirror=1, a lower --dlr.')


def test_an_overflow_in_16_bits_suggests_full_precision():
    line = broken_line('Gmain', Finding('activation', 'G.synthesis.b64.conv1', is_half=True), 12.34, 1)
    assert '16-bit output of G.synthesis.b64.conv1' in line and '12.3 kimg' in line and '1 step ' in line
    assert '--precision=fp32' in line
    assert '--precision' not in broken_line('Gmain', Finding('activation', 'G.synthesis.b64.conv1'), 1, 1)


def test_a_broken_running_mean_of_path_lengths_is_named():
    run, guards = build()
    run.state.loss.pl_weight = 2
    run.state.loss.pl_mean.fill_(NAN)
    lines = ticks(run, guards, 8)
    assert any(line.startswith('Greg') and 'pl_mean' in line and '--resume' in line for line in lines)


def examine(run, name, spoil):
    """What an examination of one run of a phase finds, after `spoil` had its way with the losses."""
    found, phase = [], run.phase(name)
    original = phase.losses
    phase.losses = lambda batch: (spoil(loss) for loss in original(batch))
    modules = {'G': run.state.G, 'D': run.state.D}
    phase.detector = AnomalyDetector(phase, modules, {}, found.append, max_runs=1)
    run.step()
    return found, phase


def test_a_loss_that_breaks_after_finite_layers_is_told_from_layers():
    run, _ = build()
    found, phase = examine(run, 'Gmain', lambda loss: loss * NAN)
    assert found == [Finding('loss', '')] and int(phase.num_broken) == 1


def test_a_gradient_that_breaks_is_named_by_the_layer_where_the_backward_pass_meets_it_first():
    run, _ = build()
    layer = run.state.G.synthesis.b4.conv1
    layer.bias.requires_grad_(True).register_hook(lambda grad: grad * NAN)
    found, _ = examine(run, 'Gmain', lambda loss: loss)
    assert found == [Finding('gradient', 'G.synthesis.b4.conv1.bias')]


def test_a_detector_that_finds_nothing_ends_and_says_so():
    run, _ = build()
    found, _ = examine(run, 'Gmain', lambda loss: loss)
    assert found == [None]
    run.step()
    assert len(found) == 1 and not any(m._forward_hooks for m in run.state.G.modules())
    assert 'all were in the runs watched' in broken_line('Gmain', None, 1.0, 3)


def test_an_error_in_an_examined_phase_passes_and_leaves_no_hooks():
    run, _ = build()

    def fail(loss):
        raise KeyError('planned')
    with pytest.raises(KeyError):
        examine(run, 'Gmain', fail)
    assert not any(m._forward_hooks for m in [*run.state.G.modules(), *run.state.D.modules()])


def test_a_detector_changes_no_number():
    plain, watched = (SmallRun(small_config()) for _ in range(2))
    plain.step()
    examine(watched, 'Gmain', lambda loss: loss)
    for a, b in zip(plain.state.G.parameters(), watched.state.G.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reports_of_a_phase_are_repeated_only_now_and_then():
    run, guards = build()
    set_weight(run.state.G, 'synthesis.b8.conv0.weight', NAN)
    lines = [line for line in ticks(run, guards, 2 * REPEAT_TICKS) if line.startswith('Gmain')]
    assert len(lines) == 2
    assert f'{2 + REPEAT_TICKS} steps so far' in lines[1]


def test_training_goes_on_finite_past_a_broken_gradient():
    run, _ = build()
    found, _ = examine(run, 'Gmain', lambda loss: loss * NAN)
    assert found and all(p.isfinite().all() for p in run.state.G.parameters())


def images(num=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, [num, 3, 8, 8], dtype=np.uint8)


class Painter(torch.nn.Module):
    """A generator whose images are rows of a table, by the first number of the latent."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.from_numpy(table).float() / 127.5 - 1

    def forward(self, z, c, noise_mode):
        return self.table[z[:, 0].long()]


def probe_of(num=8):
    return DiversityProbe(images(num), torch.arange(num)[:, None].float(), torch.zeros(num, 0), batch=3)


def test_diversity_is_measured_in_units_of_the_training_images():
    probe = probe_of()
    assert probe.ratio(Painter(images())) == pytest.approx(1)
    assert probe.ratio(Painter(images(seed=1))) == pytest.approx(1, abs=0.2)
    assert probe.ratio(Painter(np.full_like(images(), 90))) == 0
    halved = images() // 2 + 64
    assert probe.ratio(Painter(halved)) == pytest.approx(0.5, abs=0.02)


def test_a_generator_that_knows_two_images_is_not_diverse():
    table = images()
    assert probe_of().ratio(Painter(table[[0, 1] * 4])) == 0


def test_equal_training_images_give_no_figure():
    same = np.zeros([4, 3, 8, 8], dtype=np.uint8)
    probe = DiversityProbe(same, torch.zeros(4, 1), torch.zeros(4, 0), batch=4)
    assert math.isnan(probe.ratio(Painter(images())))
    assert nearest_distance(torch.zeros(1, 3, 8, 8)) == 0


def test_large_sheets_are_sampled_evenly():
    probe = DiversityProbe(images(200), torch.arange(200)[:, None].float(), torch.zeros(200, 0), batch=8)
    assert probe._z[0] == 0 and probe._z[-1] == 199 and len(probe._z) == 32


def test_collapse_is_reported_once_and_again_after_recovery():
    _, guards = build()
    guards.probe = probe_of()
    flat, varied = Painter(np.full_like(images(), 90)), Painter(images())

    def after(G_ema, count):
        guards.state.G_ema = G_ema
        return [line for _ in range(count) for line in guards.tick(nothing, 0.0)]
    assert after(flat, PATIENCE_TICKS - 1) == []
    (line,) = after(flat, 5)
    assert 'collapsed' in line and '--gamma' in line and '0.0%' in line
    assert after(varied, 2) == []
    assert len(after(flat, PATIENCE_TICKS)) == 1


def test_a_real_generator_with_constant_output_has_collapsed():
    run, guards = build()
    reals = images()
    guards.probe = DiversityProbe(
        reals, torch.randn(8, run.state.G.z_dim), torch.zeros(8, 0), batch=4)
    assert guards.probe.ratio(run.state.G_ema) > 0.1
    for name in ('b4', 'b8'):
        set_weight(run.state.G_ema.synthesis, f'{name}.torgb.weight', 0.0)
    assert len(ticks(run, guards, 0) + [x for _ in range(4) for x in guards.tick(nothing, 0.0)]) == 1


WON = {'Loss/signs/real': 0.99, 'Loss/signs/fake': -0.99, 'Loss/D/loss': 0.02}


@pytest.mark.parametrize(('flags', 'p', 'remedy'), [
    ({'aug': 'noaug'}, 0.0, '--aug=ada'), ({'aug': 'ada'}, 1.0, '--resume from a trained')])
def test_a_discriminator_that_has_won_is_reported_once(flags, p, remedy):
    _, guards = build(**flags)
    lines = [line for _ in range(10) for line in guards.tick(WON.get, p)]
    assert len(lines) == 1 and 'has won' in lines[0] and remedy in lines[0]


@pytest.mark.parametrize('change', [
    {'Loss/signs/real': 0.6}, {'Loss/signs/fake': -0.5}, {'Loss/D/loss': 0.7}, {'Loss/D/loss': math.nan}])
def test_a_discriminator_that_errs_has_not_won(change):
    _, guards = build(aug='noaug')
    statistics = {**WON, **change}
    assert [line for _ in range(10) for line in guards.tick(statistics.get, 0.0)] == []


def test_adaptive_augmentation_is_given_time_to_answer():
    _, guards = build(aug='ada')
    assert [line for _ in range(10) for line in guards.tick(WON.get, 0.5)] == []


def test_alarms_count_ticks_in_a_row():
    switches = (True, False, True, True, True, False, True, True)
    counts = itertools.accumulate(switches, ticks_in_a_row, initial=0)
    assert [count == 2 for count in counts][1:] == [False, False, False, True, False, False, False, True]


def test_a_continued_run_goes_on_counting():
    run, guards = build(aug='noaug')
    set_weight(run.state.G, 'synthesis.b8.conv0.weight', NAN)
    ticks(run, guards, 3, WON.get)
    counts = copy.deepcopy(run.state.guards)
    later = SmallRun(run.config)
    set_weight(later.state.G, 'synthesis.b8.conv0.weight', NAN)
    later.state.guards = copy.deepcopy(counts)
    continued = Guards(later.state, later.phases, None)
    assert later.state.guards == counts and counts.num_broken['Gmain'] == 3
    assert any('has won' in line for line in continued.tick(WON.get, 0.0))
    lines = [line for line in ticks(later, continued, REPEAT_TICKS) if line.startswith('Gmain')]
    assert len(lines) == 1 and f'{3 + REPEAT_TICKS - 2} steps so far' in lines[0]
