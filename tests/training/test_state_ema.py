# SPDX-License-Identifier: Apache-2.0
"""The moving average of the generator."""
import copy

import pytest
import torch
from golden_cases import cases

from training.state import ema_beta, update_ema


class Toy(torch.nn.Module):
    def __init__(self, values=(0.0, 0.0, 0.0)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values))
        self.bias = torch.nn.Parameter(torch.ones([]))
        self.register_buffer('w_avg', torch.zeros(2))
        self.register_buffer('count', torch.zeros([], dtype=torch.int64))


@pytest.mark.parametrize('case', cases('ema_ada', 'ema_beta'))
def test_recorded_beta(case):
    beta = ema_beta(case['cur_nimg'], case['batch_size'], case['ema_kimg'], case['ema_rampup'])
    assert beta == pytest.approx(case['beta'], rel=1e-9, abs=1e-30)


@pytest.mark.parametrize('case', cases('ema_ada', 'ema_sequences'))
def test_recorded_sequence(case):
    average = Toy(case['initial_average'])
    for i, (weights, expected) in enumerate(
            zip(case['weights'], case['average_after_each_iteration'], strict=True)):
        update_ema(average, Toy(weights), ema_beta(
            i * case['batch_size'], case['batch_size'], case['ema_kimg'], case['ema_rampup']))
        torch.testing.assert_close(average.weight.data, torch.tensor(expected), rtol=0, atol=1e-5)


def test_half_life_halves_the_share_of_the_old_average():
    assert ema_beta(10 ** 9, batch_size=10_000, ema_kimg=10, ema_rampup=None) == 0.5
    assert ema_beta(10 ** 9, batch_size=10_000, ema_kimg=10, ema_rampup=0.05) == 0.5
    assert ema_beta(100_000, batch_size=5_000, ema_kimg=10, ema_rampup=0.05) == 0.5


def test_first_iteration_with_rampup_copies_the_generator():
    G = Toy([1.0, -2.0, 0.1])
    average = Toy([7.0, 7.0, 7.0])
    update_ema(average, G, ema_beta(0, 32, 10, 0.05))
    assert torch.equal(average.weight, G.weight)


def test_buffers_are_copied_whatever_beta_and_parameters_kept_apart(device):
    G, average = Toy([1.0, 2.0, 3.0]).to(device), Toy([5.0, 6.0, 7.0]).to(device)
    G.w_avg.fill_(3)
    G.count.fill_(4)
    update_ema(average, G, 0.75)
    assert average.w_avg.tolist() == [3, 3] and average.count.item() == 4
    torch.testing.assert_close(average.weight.data.cpu(), torch.tensor([4.0, 5.0, 6.0]))
    G.w_avg.zero_()
    assert average.w_avg.tolist() == [3, 3] and G.weight.tolist() == [1, 2, 3]


def test_average_of_equal_networks_stays_to_the_bit():
    G = Toy([0.1, 0.2, 0.3])
    average = copy.deepcopy(G)
    update_ema(average, G, 0.998)
    assert torch.equal(average.weight, G.weight) and average.weight.grad_fn is None


def test_networks_of_different_layout_are_refused():
    with pytest.raises(AssertionError, match='2 parameters'):
        update_ema(Toy(), torch.nn.Linear(2, 2, bias=False), 0.5)
