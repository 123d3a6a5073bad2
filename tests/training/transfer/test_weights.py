# SPDX-License-Identifier: Apache-2.0
"""Transfer: what a network of one shape makes of the weights of another, in numbers; and the table of it."""
import copy

import pytest
import torch
from golden_cases import cases, golden_dir
from small_networks import small_discriminator, small_generator

import legacy
from dnnlib.util import UserError
from torch_utils import misc
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d
from training.formats import pickled
from training.systems.dcgan import DCGANGenerator
from training.transfer.rules import image_map, overlap, resize_plane
from training.transfer.weights import (
    FRESH,
    KEPT,
    NOT_USED,
    RESIZED,
    full_lines,
    summary_lines,
    transfer,
    transfer_networks,
    transfer_notes,
)


def fresh(network):
    """The same network with other random weights."""
    torch.manual_seed(99)
    with torch.no_grad():
        for name, tensor in misc.named_params_and_buffers(network):
            if not name.endswith(('resample_filter', 'noise_strength')):
                tensor.normal_()
    return network


def generators(old, new):
    """(trained G, G of another shape that took its weights, actions by tensor)."""
    source, target = small_generator(**old), fresh(small_generator(**new))
    # Biases are zero at first, which would hide mistakes.
    with torch.no_grad():
        for name, tensor in source.named_parameters():
            if name.endswith('bias'):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return source, target, actions(transfer_networks({'G': source}, {'G': target}))


def discriminators(old, new):
    """The same of D."""
    source, target = small_discriminator(**old), fresh(small_discriminator(**new))
    with torch.no_grad():
        for name, tensor in source.named_parameters():
            if name.endswith('bias'):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return source, target, actions(transfer_networks({'D': source}, {'D': target}))


def actions(records):
    return {record.name: record.action for record in records}


def latents(n=4, z_dim=8):
    return torch.randn([n, z_dim], generator=torch.Generator().manual_seed(0))


def images(channels, n=4, size=16):
    return torch.rand([n, channels, size, size], generator=torch.Generator().manual_seed(1)) * 2 - 1


def onehot(classes, num_classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_equal_networks_are_taken_whole_with_average_w():
    source, target, found = generators({'c_dim': 3}, {'c_dim': 3})
    assert set(found.values()) == {KEPT} and 'mapping.w_avg' in found
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_more_pixels_and_classes_keep_the_lower_levels_and_the_old_classes():
    source, target, found = generators({'c_dim': 3}, {'c_dim': 5, 'img_resolution': 32})
    assert {name for name, action in found.items() if action == FRESH} == {
        name for name in found if name.startswith('synthesis.b32.')}
    assert [name for name, action in found.items() if action == RESIZED] == ['mapping.embed.weight']
    # The same class gives the same w, although the gain of the embedding depends on their number.
    w, w_old = (net.mapping(latents(), onehot([0, 1, 2, 2], net.c_dim))[:, 0] for net in (target, source))
    close(w, w_old)
    ws = w[:, None]
    shown, expected = (
        net.synthesis.b4(None, None, ws.repeat(1, 2, 1), noise_mode='const')[1] for net in (target, source))
    close(shown, expected)


@pytest.mark.parametrize('old, new', [(16, 32), (8, 32)])
def test_more_pixels_show_the_same_images_enlarged_until_details_are_learned(old, new):
    source, target, _ = generators({'img_resolution': old}, {'img_resolution': new})
    img = source(latents(), None, noise_mode='const')
    while img.shape[2] < new:
        img = upsample2d(img, setup_filter([1, 3, 3, 1]))
    # These tests fill new networks with noise; biases are zero in one that was just made.
    known = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name.endswith('torgb.bias') and name not in known:
            parameter.data.zero_()
    close(target(latents(), None, noise_mode='const'), img)
    target.requires_grad_()(latents(), None).square().sum().backward()
    assert target.synthesis.b32.torgb.weight.grad.abs().max() > 0


def test_without_skips_the_only_layer_that_makes_images_is_fresh():
    resnet = {'synthesis_kwargs': {'channel_base': 64, 'channel_max': 8, 'architecture': 'resnet'}}
    _, target, found = generators(resnet, {**resnet, 'img_resolution': 32})
    assert found['synthesis.b32.torgb.weight'] == FRESH and target.synthesis.b32.torgb.weight.any()


def test_fewer_classes_cut_the_embedding():
    source, target, _ = generators({'c_dim': 5}, {'c_dim': 2})
    close(*(net.mapping(latents(), onehot([0, 1, 0, 1], net.c_dim)) for net in (source, target)))


def test_fewer_pixels_leave_the_upper_levels_unused():
    _, _, found = generators({'img_resolution': 32}, {})
    assert {name.split('.')[1] for name, action in found.items() if action == NOT_USED} == {'b32'}
    assert set(found.values()) == {KEPT, NOT_USED}


@pytest.mark.parametrize('old, new', [(3, 4), (1, 3), (3, 1), (4, 3), (4, 1), (2, 4), (4, 2), (1, 2)])
def test_other_channels_show_the_corresponding_image(old, new):
    source, target, found = generators({'img_channels': old}, {'img_channels': new})
    expected = source(latents(), None, noise_mode='const')
    matrix, offset = image_map(old, new)
    img = target(latents(), None, noise_mode='const')
    close((img - offset.view(1, -1, 1, 1))[:, :, 4:-4, 4:-4],
          torch.einsum('no,bohw->bnhw', matrix, expected)[:, :, 4:-4, 4:-4])
    assert {name for name, action in found.items() if action == RESIZED} == {
        f'synthesis.b{level}.torgb.{kind}' for level in (4, 8, 16) for kind in ('weight', 'bias')}


@pytest.mark.parametrize('old, new', [(3, 4), (1, 3), (3, 1), (4, 3), (4, 1), (2, 4), (5, 3), (3, 5)])
def test_other_channels_are_judged_like_the_corresponding_image(old, new):
    source, target, _ = discriminators({'img_channels': old}, {'img_channels': new})
    img = images(new)
    matrix, offset = image_map(new, old)
    close(target(img, None),
          source(torch.einsum('no,bohw->bnhw', matrix, img) + offset.view(1, -1, 1, 1), None))


def test_images_of_other_channels_correspond_as_one_expects():
    assert image_map(1, 3)[0].tolist() == [[1], [1], [1]]
    torch.testing.assert_close(image_map(3, 1)[0], torch.full([1, 3], 1 / 3))
    matrix, offset = image_map(3, 4)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]] and offset.tolist() == [0, 0, 0, 1]
    matrix, offset = image_map(2, 4)
    assert matrix.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]] and not offset.any()
    assert image_map(3, 6)[0].sum() == 3 and image_map(6, 3)[0].sum() == 3


def test_labels_added_have_no_influence_at_first():
    source, target, found = generators({}, {'c_dim': 3})
    assert found['mapping.fc0.weight'] == RESIZED and found['mapping.embed.weight'] == FRESH
    img = source(latents(), None, noise_mode='const')
    for classes in ([0, 1, 2, 0], [2, 2, 1, 1]):
        close(target(latents(), onehot(classes, 3), noise_mode='const'), img)
    # But it can be learned.
    target.requires_grad_()(latents(), onehot([0, 1, 2, 0], 3)).square().sum().backward()
    assert target.mapping.fc0.weight.grad[:, 8:].abs().max() > 0


def test_labels_taken_away_leave_the_part_for_z():
    source, target, found = generators({'c_dim': 3}, {})
    close(target.mapping.fc0.weight, source.mapping.fc0.weight[:, :8] * 0.5 ** 0.5)
    assert found['mapping.embed.weight'] == NOT_USED


@pytest.mark.parametrize('old, new', [(0, 3), (3, 0)])
def test_d_with_and_without_labels_differ_in_the_last_layer_only(old, new):
    source, target, found = discriminators({'c_dim': old}, {'c_dim': new})
    made_fresh = {name for name, action in found.items() if action == FRESH and name[0] == 'b'}
    assert made_fresh == {'b4.out.weight', 'b4.out.bias'}
    assert torch.equal(target.b4.fc.weight, source.b4.fc.weight)


def test_other_numbers_of_feature_maps_share_the_first():
    more = {'synthesis_kwargs': {'channel_base': 64, 'channel_max': 12}}
    source, target, _ = generators({}, more)
    before = fresh(small_generator(**more)).synthesis.b4.conv1.weight
    weight = target.synthesis.b4.conv1.weight
    assert torch.equal(weight[:8, :8], source.synthesis.b4.conv1.weight)
    assert torch.equal(weight[8:], before[8:]) and torch.equal(weight[:, 8:], before[:, 8:])
    smaller, cut, _ = generators(more, {})
    assert torch.equal(cut.synthesis.b4.conv1.weight, smaller.synthesis.b4.conv1.weight[:8, :8])


def test_the_deviation_stays_the_last_input_of_d():
    source, target, _ = discriminators({}, {'channel_max': 12})
    assert target.b4.conv.weight.shape[1] == 13
    assert torch.equal(target.b4.conv.weight[:8, -1], source.b4.conv.weight[:, -1])
    assert torch.equal(target.b4.conv.weight[:8, :8], source.b4.conv.weight[:, :8])


def test_images_that_are_not_square_resize_what_has_a_place():
    wide = {'img_resolution': (24, 48)}  # starts at 3x6
    source, target, found = generators({}, wide)
    noise, old = target.synthesis.b16.conv1.noise_const, source.synthesis.b16.conv1.noise_const
    close(noise.mean(), old.mean())
    close(noise.std(unbiased=False), old.std(unbiased=False))
    assert found['synthesis.b4.const'] == RESIZED and target.synthesis.b4.const.shape == (8, 3, 6)
    close(target.synthesis.b4.const, resize_plane(source.synthesis.b4.const, 3, 6))
    assert target(latents(), None).isfinite().all()
    # Weights that are the same everywhere see a uniform feature map of any size alike.
    source, target = small_discriminator(), fresh(small_discriminator(**wide))
    source.b4.fc.weight.data = torch.randn([8, 8, 1]).expand(8, 8, 16).flatten(1).contiguous()
    transfer_networks({'D': source}, {'D': target})
    features = torch.randn([2, 8, 1])
    close(target.b4.fc(features.expand(2, 8, 18).flatten(1)),
          source.b4.fc(features.expand(2, 8, 16).flatten(1)))


def test_latents_of_other_length_are_started_anew_and_said_loudly():
    source, target = small_generator(), fresh(small_generator(w_dim=6, z_dim=4))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    found = actions(transfer_networks({'G': source}, {'G': target}))
    for name, action in found.items():
        if name.startswith('mapping.') or name.endswith('affine.weight'):
            assert action == FRESH and torch.equal(before[name], target.state_dict()[name]), name
    assert torch.equal(target.synthesis.b8.conv0.weight, source.synthesis.b8.conv0.weight)
    notes = transfer_notes({'G': source, 'G_ema': source}, {'G': target})
    assert any('z_dim is 4, but 8 in the file' in note for note in notes)
    assert any('w_dim is 6, but 8 in the file' in note for note in notes)


def test_another_depth_of_the_mapping_network_is_said():
    source, target = small_generator(), small_generator(mapping_kwargs={'num_layers': 3})
    (note,) = transfer_notes({'G': source}, {'G': target})
    assert '--map-depth=2' in note
    found = actions(transfer_networks({'G': source}, {'G': target}))
    assert found['mapping.fc1.weight'] == KEPT and found['mapping.fc2.weight'] == FRESH


def test_frozen_layers_of_d_take_weights_too():
    source, target, found = discriminators(
        {'block_kwargs': {'freeze_layers': 3}, 'img_channels': 4}, {'block_kwargs': {'freeze_layers': 4}})
    assert torch.equal(target.b16.conv0.weight, source.b16.conv0.weight)
    assert found['b16.conv1.weight'] == KEPT and found['b16.fromrgb.bias'] == RESIZED


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp('source') / 'net.pkl'
    G = small_generator(c_dim=3)
    return str(pickled.save_network_snapshot(path, G=G, D=small_discriminator(c_dim=3), G_ema=G))


def networks_here(**kwargs):
    return {'G': small_generator(**kwargs), 'D': small_discriminator(**kwargs),
            'G_ema': small_generator(**kwargs)}


def test_a_file_is_transferred_with_a_table_on_the_screen_and_in_the_folder(snapshot, tmp_path, capsys):
    here = networks_here(c_dim=5, img_resolution=32)
    records = transfer(snapshot, here, tmp_path)
    shown, written = capsys.readouterr().out, (tmp_path / 'transfer.txt').read_text()
    assert '16x16 images with 3 channels, 3 labels -> 32x32 images with 3 channels, 5 labels' in shown
    for text in (shown, written):
        assert 'D: 43 of 55 tensors taken (42 kept, 1 resized), 12 fresh; 3 of the file not used' in text
    assert any('mapping.embed.weight' in line and '8x3' in line and '8x5' in line
               for line in shown.splitlines())
    assert 'synthesis.b32.{conv0, conv1, resample_filter} (15)' in shown and '(as G)' in shown
    # The screen has a row for what belongs together, the file one for each tensor.
    tensors = sum(len(misc.params_and_buffers(net)) for net in here.values())
    assert len(shown.splitlines()) < 30 and len(written.splitlines()) > tensors
    assert all(f'{r.network:<5}    {r.name} ' in written for r in records)


def test_without_a_folder_nothing_is_written(snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transfer(snapshot, networks_here(c_dim=3))
    assert not list(tmp_path.iterdir())


def test_a_file_with_an_average_generator_alone_gives_it_to_g_and_warns_of_d(tmp_path, capsys):
    source = small_generator()
    path = str(pickled.save_network_snapshot(tmp_path / 'a.pkl', G=None, D=None, G_ema=source))
    here = {name: fresh(net) for name, net in networks_here().items()}
    before = here['D'].b4.fc.weight.clone()
    records = transfer(path, here)
    assert torch.equal(here['G'].synthesis.b4.const, source.synthesis.b4.const)
    assert torch.equal(here['D'].b4.fc.weight, before)
    assert {r.action for r in records if r.network == 'D'} == {FRESH}
    output = capsys.readouterr().out
    assert 'NOTE: the file contains no D' in output and 'NOTE: the file contains no G:' in output


def test_a_file_without_anything_of_use_is_refused(tmp_path):
    path = str(pickled.save_network_snapshot(
        tmp_path / 'a.pkl', G=None, D=small_discriminator(), G_ema=None))
    with pytest.raises(UserError, match=r'--resume=.*a\.pkl: contains none of G, G_ema'):
        transfer(path, {'G': small_generator(), 'G_ema': small_generator()})
    path = str(pickled.save_network_snapshot(
        tmp_path / 'b.pkl', G=None, D=None, G_ema=DCGANGenerator(8, img_resolution=8, ngf=2)))
    with pytest.raises(UserError, match='nothing in DCGANGenerator fits Generator; train with the --cfg'):
        transfer(path, {'G': small_generator(), 'G_ema': small_generator()})


def test_every_tensor_is_counted_once_in_the_summary():
    source, target = small_generator(c_dim=2), small_generator(img_resolution=(24, 16), img_channels=4)
    records = transfer_networks({'G': source}, {'G': target})
    table = summary_lines(records)
    counts = [int(line.split('(')[1].split(')')[0]) if '(' in line.split('  ')[0] or ' (' in line else 1
              for line in table[1:-1] for line in [line.split(': image')[0].split(': ')[0]]]
    assert sum(counts) == len(records)
    assert len(full_lines(records)) == len(records) + 2


def test_overlap_keeps_what_lies_outside():
    value = overlap(torch.ones([2, 3]), torch.zeros([3, 2]))
    assert value.tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize('case', cases('official_pickle'))
def test_official_networks_are_taken_whole(case):
    path = str(golden_dir() / 'official_pickle' / case['file'])
    source = legacy.load_network(path)
    here = {name: fresh(copy.deepcopy(source[name])) for name in legacy.NETWORKS if source[name] is not None}
    assert {record.action for record in transfer(path, here)} == {KEPT}
    for name, net in here.items():
        assert all(torch.equal(v, source[name].state_dict()[k]) for k, v in net.state_dict().items())
