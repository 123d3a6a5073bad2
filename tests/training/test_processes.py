# SPDX-License-Identifier: Apache-2.0
"""Training with several processes: the same gradients and means as one process with as many rounds."""
import pytest
import torch
from loss_cases import tiny_batch, tiny_pair
from resume_cases import configure, last_nimg, leave_out_images, write_images

from dnnlib.util import UserError
from torch_utils import distributed
from training import training_loop
from training.phases import PhaseSource, build_phases, lazy_adam

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
ROUND = 2  # images


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    # Started afresh, each process would import PyTorch for seconds.
    monkeypatch.setattr(distributed, 'START_METHOD', 'fork')


def gradients(num_rounds, rank=0):
    """Flat gradients by phase for rounds rank * num_rounds ..., without randomness in the networks."""
    torch.manual_seed(0)
    loss = tiny_pair(style_mixing_prob=0, pl_weight=0)
    for block in loss.G.synthesis.modules():
        if hasattr(block, 'use_noise'):
            block.use_noise = False
    sources = [PhaseSource(m, lazy_adam(list(m.parameters()), 0.0, (0.0, 0.99), 1e-8, 4), 4)
               for m in (loss.G, loss.D)]
    rounds = [tiny_batch(ROUND) for _ in range(6)][rank * num_rounds:(rank + 1) * num_rounds]
    found = {}
    for phase in build_phases(loss, *sources):
        phase.run(rounds)
        found[phase.name] = phase.gradients.buffer.clone()
    return found


def save_gradients(folder, num_rounds):
    distributed.join('cpu')
    torch.save(gradients(num_rounds, distributed.rank()), f'{folder}/{distributed.rank()}.pt')
    distributed.leave()


@pytest.mark.parametrize('processes', [2, 3])
def test_gradients_do_not_depend_on_the_number_of_processes(processes, tmp_path):
    torch.set_num_threads(1)
    expected = gradients(6)
    distributed.launch(save_gradients, (str(tmp_path), 6 // processes), processes)
    for rank in range(processes):
        found = torch.load(tmp_path / f'{rank}.pt')
        for name, gradient in found.items():
            assert (gradient != 0).any() or name == 'Greg'
            # Sums in another order: a few units in the last place of the largest.
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def starve(config):
    """Train, but let process 1 find no tenth batch."""
    original = training_loop.Training._batches

    def batches(self):
        for number, batch in enumerate(original(self)):
            if distributed.rank() == 1 and number == 9:
                raise UserError('--data: a.png cannot be decoded')
            yield batch
    training_loop.Training._batches = batches
    leave_out_images()
    training_loop.train(config)


def test_a_process_without_data_stops_all_with_the_state_of_that_moment_saved(tmp_path):
    (tmp_path / 'images').mkdir()
    config = configure(write_images(tmp_path / 'images'), tmp_path / 'run', batch=4, gpus=2, steps=30,
                       steps_per_tick=100)
    with pytest.raises(UserError, match=r'a\.png cannot be decoded \(process 1\); then use --resume'):
        distributed.launch(starve, (config,), 2)
    assert last_nimg(config) == 4 * 9
