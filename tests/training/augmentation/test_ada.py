# SPDX-License-Identifier: Apache-2.0
"""The controller of the augmentation probability."""
import pytest
import torch
from golden_cases import cases

from training.augmentation.ada import HIGH_KIMG, AdaController, next_p


def controller(**settings):
    return AdaController(**{'target': 0.6, 'batch_size': 4, 'interval': 4, 'kimg': 1, **settings})


@pytest.mark.parametrize('case', cases('ema_ada', 'ada'))
def test_recorded_course_of_p(case):
    p, settings = torch.tensor(float(case['initial_p'])), {
        'batch_size': case['batch_size'], 'interval': case['ada_interval'], 'target': case['ada_target'],
        'kimg': case['ada_kimg']}
    for mean_sign, expected in zip(case['sign_mean'], case['p'], strict=True):
        p = next_p(p, mean_sign, **settings)
        assert p.item() == pytest.approx(min(expected, 1), abs=1e-5)
        if expected > 1:
            break  # the published p has no upper limit: from here on ours is another course


@pytest.mark.parametrize('case', cases('ema_ada', 'ada_from_logits'))
def test_recorded_course_from_logits(case):
    ada = controller(target=case['ada_target'], batch_size=case['batch_size'], interval=case['ada_interval'],
                     kimg=case['ada_kimg'])
    p, updates = torch.zeros([]), iter(case['updates'])
    for i, phases in enumerate(case['real_logits_per_iteration']):
        for logits in phases.values():
            ada.add(torch.tensor(logits)[:, None].sign())
        if ada.is_due(i + 1):
            expected = next(updates)
            assert i == expected['after_iteration'] and ada.pending[1].item() == expected['num']
            assert ada.update(p).item() == pytest.approx(expected['sign_mean'], abs=1e-6)
            assert p.item() == pytest.approx(min(expected['p'], 1), abs=1e-5)
            if expected['p'] > 1:
                return  # as above
    assert next(updates, None) is None


@pytest.mark.parametrize('start, sign, end', [
    (0.999, 1.0, 1.0), (0.001, -1.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_p_stays_within_0_and_1(start, sign, end):
    p = next_p(torch.tensor(start), sign, batch_size=4, interval=4, target=0.6, kimg=1)
    assert p.item() == end and p.dtype == torch.float32


def test_p_crosses_its_range_in_the_given_number_of_images():
    p = torch.zeros([])
    for _ in range(125):  # 2000 images
        p = next_p(p, 1.0, batch_size=4, interval=4, target=0.6, kimg=2)
    assert p.item() == pytest.approx(1, abs=1e-5)


def test_signs_equal_to_the_target_leave_p_alone():
    ada, p = controller(), torch.tensor(0.5)
    ada.add(torch.tensor([1.0] * 4 + [-1.0]))  # mean 0.6
    assert ada.update(p).item() == pytest.approx(0.6) and p.item() == 0.5


@pytest.mark.parametrize('signs', [[], [float('nan'), 1.0]])
def test_missing_or_invalid_signs_leave_p_alone(signs):
    ada, p = controller(), torch.tensor(0.5)
    ada.add(torch.tensor(signs))
    assert ada.update(p).isnan() and p.item() == 0.5
    ada.add(torch.ones(3))  # nothing of it stays behind
    assert ada.update(p).item() == 1 and p.item() == pytest.approx(0.516)


def test_signs_of_an_update_are_forgotten_after_it(device):
    ada, p = controller(device=device), torch.tensor(0.5, device=device)
    ada.add(torch.ones(8, 1, device=device))
    ada.update(p)
    ada.add(-torch.ones(2, device=device))
    assert ada.update(p).item() == -1 and p.item() == pytest.approx(0.5)


def test_updates_are_due_every_interval():
    assert [n for n in range(13) if controller().is_due(n)] == [4, 8, 12]


def test_state_survives_a_round_trip():
    ada, p = controller(), torch.tensor(0.5)
    ada.add(torch.tensor([1.0, -1.0, 1.0]))
    ada.warning(0.9, 1000)
    twin, state = controller(), ada.state_dict()
    twin.load_state_dict(state)
    ada.add(torch.ones(9))  # the saved state is a copy
    assert twin.update(p).item() == pytest.approx(1 / 3)
    assert twin.warning(0.9, 1000 + HIGH_KIMG * 1000) is not None
    assert state['pending'].tolist() == [1, 3]


def test_warning_comes_once_when_p_stays_high_and_says_what_to_do():
    ada = controller()
    assert ada.warning(0.85, 0) is None
    assert ada.warning(0.85, HIGH_KIMG * 1000 - 1) is None
    text = ada.warning(0.9, HIGH_KIMG * 1000)
    assert 'p = 0.90' in text and '--augpipe=bg' in text and '--mirror=1' in text
    assert ada.warning(0.95, HIGH_KIMG * 3000) is None


def test_a_short_excursion_of_p_gives_no_warning():
    ada = controller()
    for tick, p in enumerate([0.85, 0.75, 0.85]):
        assert ada.warning(p, tick * HIGH_KIMG * 1000) is None
