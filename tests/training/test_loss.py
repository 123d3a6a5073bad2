# SPDX-License-Identifier: Apache-2.0
"""The losses and gradients of every phase against recorded ones."""
from unittest import mock

import pytest
import torch
from golden_cases import cases
from loss_cases import build_networks, tensor, tiny_batch, tiny_pair

from training.loss import MicroBatch, StyleGAN2Loss, pass_together

PHASES = {
    'Gmain': 'generator_main', 'Greg': 'path_length', 'Gboth': 'generator_both',
    'Dmain': 'discriminator_main', 'Dreg': 'r1', 'Dboth': 'discriminator_both',
}


def stand_in_augmentation(spec):
    if spec is None:
        return None
    if spec['kind'] == 'affine':
        return lambda x: (x.flip(3) if spec.get('flip_x') else x) * spec['scale'] + spec['shift']
    from training.augment import AugmentPipe
    pipe = AugmentPipe(**spec['kwargs'])
    return lambda x: pipe(x, debug_percentile=spec['debug_percentile'])


def run_step(loss, step, group='loss'):
    """Accumulate the gradients of one recorded step; returns its reports."""
    reports = {}
    loss.report = lambda name, value: reports.setdefault(name, []).append(value.detach().flatten().tolist())
    inputs = {k: tensor(group, key) for k, key in step['inputs'].items()}
    pl_noise = inputs.pop('pl_noise', None)
    module = loss.G if step['phase'].startswith('G') else loss.D
    if not step['keep_previous_gradients']:
        loss.G.zero_grad(set_to_none=True)
        loss.D.zero_grad(set_to_none=True)
    module.requires_grad_(True)
    with mock.patch.object(torch, 'randn_like', lambda x: pl_noise):
        for value in getattr(loss, PHASES[step['phase']])(MicroBatch(**inputs)):
            (value.mean() * step['gain']).backward()
    module.requires_grad_(False)
    return module, reports


def check_reports(actual, expected):
    assert set(actual) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            torch.tensor(actual[name]), torch.tensor(values), rtol=1e-3, atol=1e-5,
            msg=lambda text: f'{name}: {text}')


class KinkWatch:
    """Smallest output of any leaky ReLU: where one is zero but for rounding, rounding decides its slope."""

    def __init__(self, *modules):
        self.smallest = float('inf')
        for module in modules:
            for layer in module.modules():
                if getattr(layer, 'activation', None) == 'lrelu':
                    layer.register_forward_hook(self.see)

    def see(self, _layer, _inputs, output):
        self.smallest = min(self.smallest, output.detach().abs().min().item())

    def tolerance(self):
        """That of the README, 2e-3; wider where a unit may be on either side of its kink."""
        return 1e-2 if self.smallest < 1e-6 else 2e-3


def check_gradients(module, expected, tol):
    if expected['grads'] is None:
        assert all(p.grad is None for p in module.parameters())
        return
    parameters, total = dict(module.named_parameters()), expected['total_grad_norm']
    for name, recorded in expected['grads'].items():
        grad = parameters[name].grad
        if recorded is None:
            assert grad is None or not grad.any(), name
            continue
        flat = torch.zeros(parameters[name].numel()) if grad is None else grad.flatten()
        dot = (flat.double() * torch.arange(len(flat), dtype=torch.float64).cos()).sum().item()
        bound = tol * recorded['norm'] + 1e-5 * total
        assert abs(flat.norm().item() - recorded['norm']) <= bound, name
        assert abs(dot - recorded['dot']) <= bound, name


@pytest.mark.parametrize('case', cases('loss'))
def test_recorded_losses_and_gradients(case):
    G, D = build_networks('loss', case['nets'])
    loss = StyleGAN2Loss(G, D, stand_in_augmentation(case['augment']), **case['loss_kwargs'])
    watch = KinkWatch(G, D)
    for step in case['steps']:
        module, reports = run_step(loss, step)
        expected = step['expected']
        check_reports(reports, expected['reports'])
        assert loss.pl_mean.item() == pytest.approx(expected['pl_mean'], rel=1e-3, abs=1e-6)
        torch.testing.assert_close(G.mapping.w_avg, torch.tensor(expected['w_avg']), rtol=1e-4, atol=1e-6)
        assert expected['no_gradients'] == all(p.grad is None for p in module.parameters())
        check_gradients(module, expected, watch.tolerance())


def test_a_batch_of_one_still_has_a_path_length():
    (penalty,) = tiny_pair().path_length(tiny_batch(1))
    assert penalty.shape == (1,) and penalty.isfinite().all()


def test_style_mixing_replaces_a_tail_of_the_ws_and_does_not_move_the_average_twice():
    loss = tiny_pair(style_mixing_prob=1.0)
    seen = []
    with mock.patch.object(
        loss.G.synthesis, 'forward', lambda ws: seen.append(ws) or torch.zeros(2, 3, 8, 8)):
        for _ in range(20):
            loss._generate(torch.randn(2, 4), torch.zeros(2, 0))
    for ws in seen:
        same = [torch.equal(ws[:, 0], ws[:, i]) for i in range(ws.shape[1])]
        cut = same.index(False)
        assert 1 <= cut < ws.shape[1] and not any(same[cut:])
    cuts = {[torch.equal(ws[:, 0], ws[:, i]) for i in range(ws.shape[1])].index(False) for ws in seen}
    assert len(cuts) > 1


def test_without_style_mixing_all_ws_are_alike():
    loss = tiny_pair(style_mixing_prob=0)
    _, ws = loss._generate(torch.randn(2, 4), torch.zeros(2, 0))
    assert torch.equal(ws, ws[:, :1].expand_as(ws))


@pytest.mark.parametrize('method, kwargs', [('path_length', {'pl_weight': 0}), ('r1', {'r1_gamma': 0})])
def test_a_regulariser_of_weight_zero_yields_nothing(method, kwargs):
    assert list(getattr(tiny_pair(**kwargs), method)(tiny_batch(2))) == []


def test_r1_reaches_through_the_augmentation():
    plain, doubled = tiny_pair(), tiny_pair()
    doubled.G, doubled.D = plain.G, plain.D
    doubled.augment_pipe = lambda x: x * 2
    batch = tiny_batch(2)
    half = MicroBatch(batch.real_img / 2, batch.real_c, batch.gen_z, batch.gen_c)
    (a,), (b,) = plain.r1(batch), doubled.r1(half)
    torch.testing.assert_close(b, a * 4)  # the chain rule squared


@pytest.mark.parametrize('n, group, num_passes', [
    (8, 4, 1), (8, 2, 1), (4, 4, 1), (3, 1, 1), (3, 4, 2), (6, None, 2)])
def test_both_batches_have_the_logits_of_passes_of_their_own(n, group, num_passes):
    D = tiny_pair().D
    D.b4.mbstd.group_size = group
    fake, real = [(torch.randn(n, 3, 8, 8), torch.zeros(n, 0)) for _ in range(2)]
    passes = []
    D.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    together = pass_together(D, fake, real, D.samples_seen_together)
    assert len(passes) == num_passes and sum(passes) == 2 * n
    for logits, batch in zip(together, (fake, real), strict=True):
        torch.testing.assert_close(logits, D(*batch), rtol=1e-4, atol=1e-5)


def test_without_minibatch_deviation_every_sample_is_seen_alone():
    D = tiny_pair().D
    D.b4.mbstd = None
    assert D.samples_seen_together == 1
