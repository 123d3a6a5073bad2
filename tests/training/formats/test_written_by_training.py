# SPDX-License-Identifier: Apache-2.0
"""The network files of a real training: who can open them, and that all formats hold the same."""
import pytest
import torch
from elsewhere import open_elsewhere
from metrics_stand_in import write_images
from small_run import small_training

from legacy import load_network
from training.training_loop import train


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
    """A finished run of two iterations with augmentation that saves networks in both formats."""
    folder = tmp_path_factory.mktemp('run')
    data = write_images(tmp_path_factory.mktemp('data'), 8, shape=(8, 8))
    train(small_training(data, folder, 0.008, snapshot_format='pkl,safetensors', aug='fixed', p=0.5))
    return folder


def test_a_pickle_of_a_training_opens_where_there_are_only_torch_utils_and_dnnlib(run_dir, tmp_path):
    path = run_dir / 'network-snapshot-000000.pkl'
    there, here = open_elsewhere(path, tmp_path), load_network(path)
    with torch.no_grad():
        images = here.G_ema(torch.zeros(2, here.G_ema.z_dim), None, noise_mode='const')
        torch.testing.assert_close(there['images'], images)
        torch.testing.assert_close(there['logits'], here.D(images, None))


def test_both_formats_of_a_snapshot_hold_the_same_networks(run_dir):
    paths = [run_dir / f'network-snapshot-000000.{kind}' for kind in ('pkl', 'safetensors')]
    first, second = map(load_network, paths)
    assert first.training_set_kwargs == second.training_set_kwargs and first.augment_pipe.p == 0.5
    for key in ('G', 'D', 'G_ema', 'augment_pipe'):
        ours, theirs = first[key].state_dict(), second[key].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
