# SPDX-License-Identifier: Apache-2.0
"""Phases: schedule, lazy regularisation, flat gradients, and whole recorded iterations."""
from unittest import mock

import pytest
import torch
from golden_cases import arrays, cases, index
from loss_cases import build_networks, tensor, tiny_batch, tiny_pair

from training import state
from training.loss import MicroBatch, StyleGAN2Loss
from training.phases import GRADIENT_LIMIT, FlatGradients, PhaseSource, build_phases, lazy_adam


def build(loss, g_interval=4, d_interval=16, lr=0.002, betas=(0, 0.99), eps=1e-8):
    def source(module, interval):
        return PhaseSource(
            module, lazy_adam(list(module.parameters()), lr, betas, eps, interval), interval)
    return build_phases(loss, source(loss.G, g_interval), source(loss.D, d_interval))


@pytest.mark.parametrize('case', cases('loop_misc', 'phase_schedule'))
def test_recorded_schedule(case):
    phases = build(tiny_pair(), case['G_reg_interval'], case['D_reg_interval'])
    assert [p.name for p in phases] == case['phase_order']
    assert [p.interval for p in phases] == case['phase_gain']
    for i, expected in enumerate(case['executed']):
        assert [p.name for p in phases if p.is_due(i)] == expected


@pytest.mark.parametrize('case', cases('ema_ada', 'lazy_optimizer'))
def test_recorded_optimizer_constants(case):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    opt = lazy_adam(parameters, case['lr'], case['betas'], 1e-8, case['reg_interval'])
    assert opt.param_groups[0]['lr'] == pytest.approx(case['corrected_lr'], rel=1e-9)
    assert opt.param_groups[0]['betas'] == pytest.approx(case['corrected_betas'], rel=1e-9)


def test_networks_without_lazy_regularisation_have_one_phase_each():
    assert [p.name for p in build(tiny_pair(), None, None)] == ['Gboth', 'Dboth']


def test_flat_gradients_collect_what_autograd_computes():
    loss = tiny_pair(style_mixing_prob=0)
    torch.manual_seed(1)
    (value,) = loss.generator_main(tiny_batch(2))
    parameters = list(loss.G.parameters())
    expected = torch.autograd.grad(value.mean(), parameters, allow_unused=True, retain_graph=True)
    flat = FlatGradients(parameters)
    flat.attach()
    flat.add_gradient_of(value.mean())
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if grad is None else grad)
    assert flat.buffer.norm() > 0


def test_gradients_of_several_losses_and_of_other_strides_add_up():
    used, turned, unused = (torch.nn.Parameter(torch.ones(shape)) for shape in ([3], [2, 4], [5]))
    flat = FlatGradients([used, turned, unused])
    flat.attach()
    factors = torch.arange(8.0).view(4, 2)
    flat.add_gradient_of((turned.t() * factors).sum() + used.sum())
    flat.add_gradient_of(2 * used.sum())
    assert used.grad.tolist() == [3, 3, 3] and unused.grad.tolist() == [0] * 5
    assert torch.equal(turned.grad, factors.t()) and turned.grad.is_contiguous()


def test_non_finite_gradients_are_sanitised_and_finite_ones_left_alone():
    p = torch.nn.Parameter(torch.zeros(5))
    flat = FlatGradients([p])
    flat.attach()
    p.grad.copy_(torch.tensor([float('nan'), float('inf'), -float('inf'), 3e7, -2.0]))
    flat.reduce()
    assert p.grad.tolist() == [0.0, GRADIENT_LIMIT, -GRADIENT_LIMIT, 3e7, -2.0]


def test_micro_batches_average_to_the_gradient_of_the_whole_batch():
    loss = tiny_pair(style_mixing_prob=0)
    loss.D.b4.mbstd.group_size = 1  # so that a sample does not see its neighbours
    for layer in loss.G.modules():
        layer.use_noise = False
    phase = build(loss)[0]
    batch = tiny_batch(4)
    halves = [MicroBatch(*[t[i:i + 2] for t in vars(batch).values()]) for i in (0, 2)]
    grads = []
    with mock.patch.object(phase.opt, 'step'):
        for rounds in ([batch], halves):
            phase.run(rounds)
            grads.append(phase.gradients.buffer.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_phase_touches_only_its_own_network_and_leaves_gradients_off():
    loss = tiny_pair()
    phases = build(loss)
    loss.G.requires_grad_(False)
    loss.D.requires_grad_(False)
    before = {k: v.clone() for k, v in loss.D.state_dict().items()}
    phases[0].run([tiny_batch(2)])
    assert all(torch.equal(v, before[k]) for k, v in loss.D.state_dict().items())
    assert not any(p.requires_grad for p in loss.G.parameters())
    assert all(p.grad is None for p in loss.D.parameters())


def test_a_phase_without_losses_takes_no_step():
    loss = tiny_pair(pl_weight=0)
    greg = build(loss)[1]
    with mock.patch.object(greg.opt, 'step') as step:
        greg.run([tiny_batch(2)])
    assert not step.called and not greg.active


def signature(values):
    flat = values.detach().double().flatten()
    return flat.norm().item(), (flat * torch.arange(len(flat), dtype=torch.float64).cos()).sum().item()


def check_signatures(named, recorded, tol):
    for name, expected in recorded.items():
        norm, dot = signature(named[name])
        assert norm == pytest.approx(expected['norm'], rel=tol, abs=1e-7), name
        assert dot == pytest.approx(expected['dot'], rel=0, abs=tol * expected['norm'] + 1e-5), name


def step_tolerance(step):
    """Relative tolerance: 1e-3 up to step 6, growing to 1e-1 at step 18, because Adam amplifies rounding."""
    return 1e-3 * 10 ** (min(max(step - 6, 0), 12) / 6)


def test_the_tolerance_of_a_recorded_trajectory_grows():
    found = [step_tolerance(step) for step in (1, 6, 12, 18, 30)]
    assert found == pytest.approx([1e-3, 1e-3, 1e-2, 1e-1, 1e-1])


@pytest.mark.skipif(not index('trajectory'), reason='no trajectory in this folder')
def test_recorded_training_iterations():
    record = index('trajectory')
    config, name = record['config'], next(iter(record['nets']))
    G, D = build_networks('trajectory', name)
    G_ema = build_networks('trajectory', name)[0].eval()
    for key, p in G.named_parameters():
        if key.endswith('noise_strength'):
            p.requires_grad_(True).register_hook(torch.zeros_like)
    loss_kwargs = {k: v for k, v in config.items() if k in vars(StyleGAN2Loss)}
    loss = StyleGAN2Loss(G, D, report=lambda name, value: None, **loss_kwargs)
    optimizer = {k: config[k] for k in ('lr', 'betas', 'eps') if k in config}
    phases = build(loss, config['G_reg_interval'], config['D_reg_interval'], **optimizer)
    data = {k: tensor('trajectory', k) for k in ('real_img', 'real_c', 'gen_z', 'gen_c')}
    has_lengths = 'pl_noise' in arrays('trajectory.npz')
    data['pl_noise'] = tensor('trajectory', 'pl_noise') if has_lengths else []
    size, rounds, greg_count, cur_nimg = config['batch_gpu'], config['batch'] // config['batch_gpu'], 0, 0
    for i, expected in enumerate(record['iterations']):
        tol = step_tolerance(i + 1)
        for k, phase in enumerate(phases):
            if not phase.is_due(i):
                continue
            inputs = [data['real_img'][i], data['real_c'][i], data['gen_z'][i, k], data['gen_c'][i, k]]
            batches = [MicroBatch(*parts) for parts in zip(*[t.split(size) for t in inputs], strict=True)]
            is_path_length = has_lengths and phase.name in ('Greg', 'Gboth')
            noise = iter(data['pl_noise'][greg_count] if is_path_length else [])
            greg_count += is_path_length
            with mock.patch.object(torch, 'randn_like', lambda x: next(noise)):
                phase.run(batches)
            # The record sums over rounds, we average.
            norm = phase.gradients.buffer.norm().item() * rounds
            assert norm == pytest.approx(expected['grad_norms'][phase.name], rel=tol), (i, phase.name)
        beta = state.ema_beta(cur_nimg, config['batch'], config['ema_kimg'], config['ema_rampup'])
        assert beta == pytest.approx(expected['ema_beta'], rel=1e-9)
        state.update_ema(G_ema, G, beta)
        cur_nimg += config['batch']
        assert cur_nimg == expected['cur_nimg']
        assert loss.pl_mean.item() == pytest.approx(expected['pl_mean'], rel=tol)
        check_signatures({'w_avg': G.mapping.w_avg}, {'w_avg': expected['w_avg']}, tol)
        for key, module in [('G', G), ('D', D), ('G_ema', G_ema)]:
            check_signatures(module.state_dict(), expected.get(key, {}), tol)
