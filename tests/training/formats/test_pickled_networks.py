# SPDX-License-Identifier: Apache-2.0
"""Snapshots: whole or absent, on the CPU, and without a trace of the run."""
import pickle

import pytest
import torch
from small_networks import small_discriminator, small_generator

from dnnlib.util import UserError
from training.formats import pickled


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot be written'):
        pickled.save_network_snapshot(tmp_path / 'no' / 'net.pkl', G=None, D=None, G_ema=small_generator())


def test_a_snapshot_has_the_published_keys_and_leaves_the_run_alone(tmp_path):
    G, D = small_generator().train(), small_discriminator().train()
    kwargs = {'path': 'x', 'xflip': True}
    path = pickled.save_network_snapshot(
        tmp_path / 'net.pkl', G=G, D=D, G_ema=G, training_set_kwargs=kwargs)
    held = pickle.loads(path.read_bytes())
    assert list(held) == ['training_set_kwargs', 'G', 'D', 'G_ema', 'augment_pipe']
    assert held['training_set_kwargs'] == kwargs and held['augment_pipe'] is None
    for name, module in (('G', G), ('D', D)):
        assert module.training and all(p.requires_grad for p in module.parameters())
        assert not held[name].training and not any(p.requires_grad for p in held[name].parameters())
        for key, tensor in module.state_dict().items():
            assert torch.equal(held[name].state_dict()[key], tensor)


def test_a_copy_shares_no_memory_and_keeps_layout_and_classes():
    G = small_generator(synthesis_kwargs={'channel_max': 8, 'num_fp16_res': 2, 'fp16_channels_last': True})
    twin = pickled.HostCopies().module(G)
    assert [type(m) for m in twin.modules()] == [type(m) for m in G.modules()]
    for ours, theirs in zip(twin.state_dict().values(), G.state_dict().values(), strict=True):
        assert ours.stride() == theirs.stride() and (ours.data_ptr() != theirs.data_ptr() or not ours.numel())
    assert all(isinstance(p, torch.nn.Parameter) for p in twin.parameters())


def test_a_tensor_is_copied_once_however_often_it_is_met():
    G, copies = small_generator(), pickled.HostCopies()
    twin = copies.module(G)
    tree = copies.tree({'a': [G.mapping.fc0.weight], 'b': (G.mapping.w_avg, 3, None, 'x')})
    assert tree['a'][0].data_ptr() == twin.mapping.fc0.weight.data_ptr()
    assert tree['b'][0].data_ptr() == twin.mapping.w_avg.data_ptr() and tree['b'][1:] == (3, None, 'x')
    assert type(tree['a'][0]) is torch.Tensor and not tree['a'][0].requires_grad


def test_memory_is_used_again_for_the_next_moment():
    weight, once, copies = torch.zeros(5), torch.ones(3), pickled.HostCopies()
    first = copies(weight)
    copies(once)
    weight.fill_(1)
    assert copies(weight) is first and not first.any(), 'a second moment began by itself'
    copies.begin()
    assert copies(weight) is first and first.all()
    copies.begin()
    assert copies(once) is not once and len(copies._copies) == 2, 'what is not asked for is not kept'


def test_hooks_and_gradients_do_not_travel(tmp_path):
    G = small_generator()
    G.synthesis.b4.register_forward_hook(lambda *args: None)
    G.mapping.fc0.weight.grad = torch.ones_like(G.mapping.fc0.weight)
    path = pickled.save_network_snapshot(tmp_path / 'net.pkl', G=None, D=None, G_ema=G)
    held = pickle.loads(path.read_bytes())['G_ema']
    assert held.mapping.fc0.weight.grad is None and not held.synthesis.b4._forward_hooks
    assert len(G.synthesis.b4._forward_hooks) == 1


@pytest.mark.gpu
def test_copies_from_a_gpu_are_those_of_the_moment():
    copies, big = pickled.HostCopies(), torch.zeros(1 << 24, device='cuda')
    copy = copies(big)
    big.fill_(1)
    copies.wait()
    assert copy.is_pinned() and not copy.any() and copies(big) is copy


@pytest.mark.gpu
def test_a_snapshot_of_networks_on_a_gpu_is_on_the_cpu(tmp_path):
    G = small_generator().cuda()
    path = pickled.save_network_snapshot(tmp_path / 'net.pkl', G=G, D=None, G_ema=G)
    assert {t.device.type for t in pickle.loads(path.read_bytes())['G'].state_dict().values()} == {'cpu'}
