# SPDX-License-Identifier: Apache-2.0
"""Our snapshots in other programs of the StyleGAN2-ADA lineage, for which tests/lineage stands in."""
import io
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import SYNTHESIS, small_discriminator, small_generator
from small_run import small_config
from test_earlier_runs import SYSTEMS, extract

import legacy
from torch_utils.ops import layers
from torch_utils.ops.plain_layers import PlainLayers
from training import augment, networks
from training.formats import convert, lineage, pickled
from training.systems import dcgan, stylegan1
from training.systems.table import SYSTEMS as SYSTEMS_OF_TRAINING

LINEAGE = Path(__file__).parent / 'lineage'
HALF = {**SYNTHESIS, 'num_fp16_res': 2, 'conv_clamp': 256}


def stylegan2(synthesis=SYNTHESIS, **shape):
    """A generator and a discriminator for it."""
    return small_generator(synthesis_kwargs=synthesis, **shape), small_discriminator(**synthesis, **shape)


def other_system(module, generator, **kwargs):
    torch.manual_seed(3)
    G = getattr(module, generator)(z_dim=8, c_dim=0, img_resolution=16, img_channels=3, **kwargs).eval()
    return G, small_discriminator(architecture='orig')


CASES = {
    'conditional': lambda: stylegan2(c_dim=2),
    'fp16': lambda: stylegan2(HALF),
    'gray': lambda: stylegan2(img_channels=1),
    '3:2': lambda: stylegan2(img_resolution=(8, 12)),
    'bf16': lambda: (small_generator(synthesis_kwargs={**HALF, 'half_dtype': 'bfloat16'}), None),
    'stylegan1': lambda: other_system(stylegan1, 'StyleGAN1Generator', w_dim=8, synthesis_kwargs=SYNTHESIS),
    'dcgan': lambda: (other_system(dcgan, 'DCGANGenerator', ngf=4)[0], dcgan.DCGANDiscriminator(0, 16, 3, 4)),
}


def use_elsewhere(path, folder):
    """What tests/lineage/use_network.py found out about a snapshot."""
    out = folder / 'results.pt'
    done = subprocess.run([sys.executable, LINEAGE / 'use_network.py', path, out], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(io.BytesIO(out.read_bytes()), weights_only=True)


@pytest.mark.parametrize('name', CASES)
def test_a_snapshot_gives_the_same_images_in_other_programs(name, tmp_path):
    G, D = CASES[name]()
    pipe = augment.AugmentPipe(xflip=1, rotate90=1, xint=1, scale=1, rotate=1, aniso=1, xfrac=1, contrast=1,
                               imgfilter=1, cutout=1)
    path = pickled.save_network_snapshot(
        tmp_path / 'net.pkl', G=type(G)(*G.init_args, **G.init_kwargs), D=D, G_ema=G, augment_pipe=pipe,
        training_set_kwargs={'path': 'x.zip'})
    found = use_elsewhere(path, tmp_path)
    z, c = found['z'], torch.eye(G.c_dim)[:2] if G.c_dim else None
    options = {'noise_mode': 'const', 'force_fp32': True}
    with torch.no_grad():
        images = G(z, c, **options)
        torch.testing.assert_close(found['images'], images, rtol=0, atol=1e-4)
        if 'truncated' in found:
            torch.testing.assert_close(
                found['truncated'], G(z, c, truncation_psi=0.5, truncation_cutoff=2, **options),
                rtol=0, atol=1e-4)
        if 'half' in found:
            torch.testing.assert_close(found['half'], images, rtol=0, atol=0.1)
            assert found['features'] == [[2, 8, *(2 * n for n in G.synthesis.b4.const.shape[1:])]]
            assert len(found['noise']) == 2 * len(G.synthesis.block_resolutions) - 1
        torch.testing.assert_close(
            found['augmented'], pipe(images, debug_percentile=0.7), rtol=0, atol=2e-4)
        if D is not None:
            torch.testing.assert_close(found['logits'], D.eval()(images, c), rtol=0, atol=2e-3)


@pytest.mark.parametrize('name', SYSTEMS)
def test_rewriting_an_earlier_snapshot_makes_it_portable_and_keeps_every_bit(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = extract(name, tmp_path) / 'network-snapshot-000000-060.pkl'
    subprocess.run([sys.executable, legacy.__file__, 'convert', f'--source={old}', '--dest=new.pkl'],
                   check=True, capture_output=True)
    networks_then, networks_now = (legacy.load_network(str(path)) for path in (old, 'new.pkl'))
    for key in ('G', 'D', 'G_ema'):
        for (n, a), (_, b) in zip(networks_then[key].state_dict().items(),
                                  networks_now[key].state_dict().items(), strict=True):
            assert torch.equal(a, b), n
    G = networks_now.G_ema
    z = torch.randn(2, G.z_dim)
    c = torch.zeros(2, G.c_dim)
    images = [net.G_ema(z, c, noise_mode='const') for net in (networks_then, networks_now)]
    assert torch.equal(*images)
    use_elsewhere(tmp_path / 'new.pkl', tmp_path)


@pytest.mark.parametrize(('flags', 'expected'), [
    ({'cfg': name}, []) for name in ('auto', 'stylegan2', 'paper256', 'cifar', 'demo')] + [
    ({'cfg': 'auto', 'nhwc': '1', 'precision': 'fp16', 'freezed': 2}, []),
    ({'cfg': 'auto', 'precision': 'bf16'}, ['half_dtype=bfloat16'])])
def test_runs_make_networks_with_published_arguments(flags, expected):
    config = small_config(**{'cbase': 64, **flags})
    for net in SYSTEMS_OF_TRAINING['stylegan2'].networks(config, 2, 3):
        assert lineage.obstacles(net, net.init_kwargs) == expected and not net.init_args


@pytest.mark.parametrize('name', ['3:2', 'bf16', 'stylegan1', 'dcgan'])
def test_what_published_constructors_cannot_build_is_said(name):
    G, _ = CASES[name]()
    expected = {'3:2': ['img_resolution=(8, 12)'], 'bf16': ['half_dtype=bfloat16'],
                'stylegan1': ['StyleGAN1Generator'], 'dcgan': ['DCGANGenerator']}
    assert lineage.obstacles(G, G.init_kwargs) == expected[name]


def test_a_snapshot_pickles_for_python_3_7(tmp_path):
    """By a protocol that it knows, and without what only numpy 2 has."""
    path = pickled.save_network_snapshot(tmp_path / 'net.pkl', G=None, D=None, G_ema=small_generator())
    data = path.read_bytes()
    assert max(arg for opcode, arg, _ in pickletools.genops(data) if opcode.name == 'PROTO') <= 4
    assert not any(opcode.proto > 4 for opcode, _, _ in pickletools.genops(data))
    assert b'numpy._core' not in data


def test_class_names_are_no_argument_of_a_published_dataset(tmp_path):
    kwargs = {'class_name': 'training.dataset.ImageFolderDataset', 'path': 'x.zip', 'use_labels': True}
    path = pickled.save_network_snapshot(
        tmp_path / 'net.pkl', G=None, D=None, G_ema=small_generator(c_dim=2),
        training_set_kwargs={**kwargs, 'class_names': ['cat', 'dog']})
    again = tmp_path / 'again.pkl'
    convert.write(again, legacy.load_network(str(path)), convert.Choices())
    for file in (path, again):
        assert pickle.loads(file.read_bytes())['training_set_kwargs'] == kwargs
        for trust in (False, True):
            found = legacy.load_network(str(file), trust_pickle=trust)
            assert found.training_set_kwargs == {**kwargs, 'class_names': ['cat', 'dog']}


@pytest.mark.parametrize('name', ['fp16', 'bf16'])
def test_16_bits_become_32_where_others_have_no_operators_for_them(name, monkeypatch):
    G, _ = CASES[name]()
    z = torch.randn(2, G.z_dim)
    monkeypatch.setattr(networks, 'layers', PlainLayers)
    half, full = (G(z, None, noise_mode='const', force_fp32=f) for f in (False, True))
    assert torch.equal(half, full)


def test_plain_layers_and_ours_agree_in_float16():
    G, D = CASES['fp16']()
    x, styles = torch.randn(2, 8, 8, 8).half(), torch.randn(2, 8)
    layer = G.synthesis.b16.conv0
    noise, weight = layer.noise_const * 0.3, layer.weight * 300
    conv, torgb = D.b8.conv1, G.synthesis.b8.torgb
    results = []
    for choice in (layers, PlainLayers):
        up = choice.synthesis(
            x, weight, styles * 100, noise, layer.bias, layer.resample_filter, 'lrelu', 2 ** 0.5, 256, up=2,
            padding=1)
        down = choice.convolution(
            x, conv.weight, conv.bias, conv.resample_filter, 0.1, 'lrelu', 1, 256, down=2, padding=1)
        rgb = choice.to_image(x, torgb.weight, styles, torgb.bias, 256)
        assert {t.dtype for t in (up, down, rgb)} == {torch.float16}
        results.append([up, down, rgb])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('shape', [{}, {'img_resolution': (8, 12)}, {'synthesis_kwargs': HALF}])
def test_plain_layers_and_ours_have_the_same_numbers_and_gradients(shape, monkeypatch):
    G = small_generator(**shape).train().requires_grad_(True)
    D = small_discriminator(**{k: v for k, v in shape.items() if k == 'img_resolution'})
    z = torch.randn(4, 8)
    results = []
    for choice in (networks.layers, PlainLayers):
        monkeypatch.setattr(networks, 'layers', choice)
        images = G(z, None, noise_mode='const', force_fp32=True)
        loss = D.train()(images, None).square().sum()
        results.append([images, *torch.autograd.grad(loss, list(G.parameters()))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
