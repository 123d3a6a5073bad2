# SPDX-License-Identifier: Apache-2.0
"""Opening network files: recorded official ones, our own, and all that must be refused."""
import contextlib
import dataclasses
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from golden_cases import cases, golden_dir
from recorded_networks import open_recorded
from small_networks import save_small_network, small_discriminator, small_generator, without_end
from strange_network import Impostor
from tensorflow_files import tensorflow_pickle

import legacy
from dnnlib.util import UserError
from torch_utils.pickles import describe
from training import augment, networks
from training.formats import pickled, rebuild

FOLDER = golden_dir() / 'official_pickle'
TOLERANCE = 1e-4  # between releases of torch, as recorded
OPTIONS = ('truncation_psi', 'truncation_cutoff', 'noise_mode', 'force_fp32')


@torch.no_grad()
@pytest.mark.parametrize('case', cases('official_pickle'))
def test_official_networks_compute_what_was_recorded(case):
    found, recorded = open_recorded('official_pickle', case)
    for call in case['calls']:
        net, c = found[call['net']], recorded.get('c')
        if 'logits' in call:
            name, _, alone = call['input'].partition('[')
            rows = slice(1) if alone else slice(None)
            check(net(recorded[name][rows], c if c is None else c[rows], force_fp32=call['force_fp32']),
                  recorded[call['logits']])
            continue
        kwargs = {key: call[key] for key in OPTIONS if key in call}
        check(net(recorded['z'], c, **kwargs), recorded[call['img']])
        if 'ws' in call:
            check(net.mapping(recorded['z'], c, **{key: kwargs[key] for key in OPTIONS[:2] if key in kwargs}),
                  recorded[call['ws']])


def check(actual, expected):
    assert actual.shape == expected.shape and (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize('case', cases('official_pickle'))
def test_official_files_give_our_classes_with_every_tensor(case):
    found, _ = open_recorded('official_pickle', case)
    with open(FOLDER / case['file'], 'rb') as file:
        described = describe.load(file)
    assert found.training_set_kwargs == case.get('training_set_kwargs')
    for key, expected in case['nets'].items():
        if expected is None:
            assert found[key] is None
            continue
        net = found[key]
        assert isinstance(net, rebuild.class_of('', expected['class_name'])) and not net.training
        assert not any(p.requires_grad for p in net.parameters())
        assert {n: type(m).__name__ for n, m in net.named_modules() if n} == {
            n: name for n, name in expected['submodule_classes'].items() if n != '<root>'}
        assert [n for n, _ in net.named_parameters()] == list(expected['parameters'])
        for name, stored in described[key].state().items():
            assert torch.equal(net.state_dict()[name], stored.tensor()), name


@pytest.mark.parametrize('case', cases('official_pickle', where=lambda c: c['nets'].get('augment_pipe')))
def test_official_augmentation_computes_what_was_recorded(case):
    found, recorded = open_recorded('official_pickle', case)
    for key, expected in recorded.items():
        if key.startswith('aug_out_'):
            with torch.no_grad():
                check(found.augment_pipe(recorded['aug_in'], debug_percentile=float(key[8:])), expected)
    assert found.augment_pipe.p.item() == pytest.approx(case['augment_pipe_p'])


def test_a_rebuilt_network_can_be_built_again_from_its_arguments():
    for case in [param.values[0] for param in cases('official_pickle')]:
        G = open_recorded('official_pickle', case)[0].G_ema
        again = type(G)(*G.init_args, **G.init_kwargs)
        shapes = [{n: t.shape for n, t in net.state_dict().items()} for net in (G, again)]
        assert shapes[0] == shapes[1]


@pytest.fixture
def snapshot(tmp_path):
    """Function: path of a snapshot of these networks."""
    def save(G=None, D=None, G_ema=None, **others):
        return pickled.save_network_snapshot(tmp_path / 'net.pkl', G=G, D=D, G_ema=G_ema, **others)
    return save


def test_our_own_snapshots_come_back(snapshot):
    shape = {'c_dim': 2, 'img_resolution': (16, 24)}
    G, D = small_generator(**shape), small_discriminator(**shape)
    pipe = augment.AugmentPipe(xflip=1, imgfilter_bands=[1, 0, 1, 1])
    pipe.p.fill_(0.25)
    path = snapshot(G=G, D=D, G_ema=G, augment_pipe=pipe, training_set_kwargs={'path': 'x'})
    found = legacy.load_network(path)
    z, c = torch.randn(2, 8), torch.eye(2)
    with torch.no_grad():
        images = found.G_ema(z, c, noise_mode='const')
        assert torch.equal(images, G(z, c, noise_mode='const'))
        assert torch.equal(found.D(images, c), D(images, c))
    assert list(found) == list(legacy.KEYS) and found.training_set_kwargs == {'path': 'x'}
    assert found.augment_pipe.p == 0.25 and found.augment_pipe.init_kwargs == pipe.init_kwargs


def test_missing_keys_are_none_and_only_what_is_asked_for_is_built(snapshot):
    path = snapshot(G=small_generator(), G_ema=small_generator())
    found = legacy.load_network(path)
    assert found.D is None and found.augment_pipe is None and found.training_set_kwargs is None
    assert legacy.load_network(path, only=['G_ema']).G is None


def test_memory_layout_and_frozen_layers_are_kept(snapshot):
    half = {'num_fp16_res': 2, 'conv_clamp': 256}
    G = small_generator(synthesis_kwargs={'channel_max': 8, 'fp16_channels_last': True, **half})
    D = small_discriminator(block_kwargs={'freeze_layers': 3}, **half)
    found = legacy.load_network(snapshot(G_ema=G, D=D))
    strides = {name: tensor.stride() for name, tensor in G.state_dict().items()}
    assert {name: tensor.stride() for name, tensor in found.G_ema.state_dict().items()} == strides
    assert found.G_ema.synthesis.b16.conv0.weight.stride()[1] == 1
    assert [n for n, _ in found.D.named_buffers()] == [n for n, _ in D.named_buffers()]


def test_force_fp16_changes_precision_but_no_tensor(snapshot):
    G, D = small_generator(), small_discriminator()
    found = legacy.load_network(snapshot(G_ema=G, D=D), force_fp16=True)
    assert found.G_ema.synthesis.b16.use_fp16 and found.G_ema.synthesis.b16.conv1.conv_clamp == 256
    assert found.D.b16.use_fp16 and found.D.init_kwargs.num_fp16_res == 4
    assert all(torch.equal(t, found.D.state_dict()[n]) for n, t in D.state_dict().items())


def test_weights_of_another_type_become_float32(snapshot):
    found = legacy.load_network(snapshot(G_ema=small_generator().half()))
    assert {p.dtype for p in found.G_ema.parameters()} == {torch.float32}


def test_the_published_function_takes_an_open_file(snapshot):
    with open(snapshot(G_ema=small_generator()), 'rb') as file:
        assert isinstance(legacy.load_network_pkl(file).G_ema, networks.Generator)


def test_trust_runs_the_code_in_the_file(snapshot, tmp_path, monkeypatch):
    path = snapshot(G_ema=small_generator())
    assert isinstance(legacy.load_network(path, trust_pickle=True).G_ema, networks.Generator)
    monkeypatch.setattr(networks.Generator, '_orig_module_src', 'raise RuntimeError("it ran")')
    path = snapshot(G_ema=small_generator())
    with pytest.raises(UserError, match='it ran'):
        legacy.load_network(path, trust_pickle=True)
    assert isinstance(legacy.load_network(path).G_ema, networks.Generator)
    with pytest.raises(UserError, match='fp16'):
        legacy.load_network(path, trust_pickle=True, force_fp16=True)


def refusal(contents, **kwargs):
    """The text with which a pickle of these contents is refused, without running anything."""
    data = contents if isinstance(contents, bytes) else pickle.dumps(contents)
    with pytest.raises(UserError) as error:
        legacy.load_network_pkl(io.BytesIO(data), **kwargs)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize('contents', [[], {}, {'G_ema': None}, {'G_ema': 'text'}, 7])
def test_a_pickle_without_networks_is_refused(contents):
    assert 'holds no networks' in refusal(contents)


@pytest.mark.parametrize('value', [*without_end(), {1}, np.zeros(2)], ids=['doubled', 'cycle', 'set', 'np'])
def test_data_options_that_are_no_plain_values_are_refused(value):
    refusal({'G_ema': small_generator(), 'training_set_kwargs': {'path': value}})


def test_an_unknown_class_is_refused_by_name():
    assert 'class Impostor' in refusal({'G_ema': Impostor()})


def test_a_changed_attribute_is_noticed():
    G = small_generator()
    G.synthesis.b8.conv1.conv_clamp = 3
    assert 'synthesis.b8.conv1.conv_clamp is 3' in refusal({'G_ema': G})


def test_missing_and_wrong_tensors_are_noticed():
    G = small_generator()
    del G.mapping.fc1.weight
    assert 'mapping.fc1.weight' in refusal({'G_ema': G})
    G = small_generator()
    G.mapping.w_avg = torch.zeros(9)
    assert 'mapping.w_avg' in refusal({'G_ema': G})


def test_missing_submodules_are_noticed():
    G = small_generator()
    del G.synthesis.b16
    assert 'synthesis.b16' in refusal({'G_ema': G})


def described_generator(**changes):
    """What the safe loader makes of a small generator, with changes."""
    described = describe.load(io.BytesIO(pickle.dumps(small_generator())))
    return dataclasses.replace(described, **changes)


def build(described):
    return pickled.Blueprint('net.pkl: G_ema', described).build(force_fp16=False)


@pytest.mark.parametrize('changes, text', [
    ({'img_resolution': 2 ** 40}, 'img_resolution'), ({'z_dim': -3}, 'constructed'),
    ({'mapping_kwargs': {'num_layers': 10 ** 9}}, 'num_layers'),
    ({'synthesis_kwargs': {'channel_max': 2 ** 21}}, 'channel_max'),
    ({'synthesis_kwargs': {'x': 1}}, "'x'"),
    ({'synthesis_kwargs': {'resample_filter': [1] * 5000}}, 'resample_filter'),
    ({'mapping_kwargs': 7}, 'not a dict'), ({'img_resolution': 'big'}, 'constructed'),
    ({'synthesis_kwargs': {'channel_base': 2 ** 20, 'channel_max': 2 ** 20}}, 'weight_gain')])
def test_forged_arguments_are_refused_before_anything_is_allocated(changes, text):
    described = described_generator()
    with pytest.raises(UserError, match=text):
        build(dataclasses.replace(described, init_kwargs={**described.init_kwargs, **changes}))


def test_positional_arguments_are_understood():
    names = ('z_dim', 'c_dim', 'w_dim')
    described = described_generator()
    kwargs = dict(described.init_kwargs)
    args = tuple(kwargs.pop(name) for name in names)
    assert build(dataclasses.replace(described, init_args=args, init_kwargs=kwargs)).init_kwargs.z_dim == 8


def test_a_stylegan3_generator_is_named_as_such():
    child = describe.ModuleDescription('SynthesisNetwork', children={'input': None})
    with pytest.raises(UserError, match='StyleGAN3 generator'):
        build(described_generator(children={'synthesis': child}))


def test_a_missing_file_a_folder_and_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / 'text').write_text('hello')
    for name in ('absent.pkl', '', 'text'):
        with pytest.raises(UserError) as error:
            legacy.load_network(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and '\n' not in str(error.value)


def test_a_file_url_works(tmp_path):
    path = save_small_network(tmp_path / 'net.pkl')
    assert legacy.load_network(path.as_uri()).G_ema.img_resolution == 16


def run(*args, status=0):
    """What the command line prints; it must end with this status."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        with pytest.raises(SystemExit) as ended:
            legacy.main([str(arg) for arg in args])
    assert ended.value.code == status, output.getvalue()
    return output.getvalue()


@torch.no_grad()
def test_the_command_line_converts_through_all_formats_without_a_changed_bit(tmp_path):
    (tmp_path / '0.pkl').write_bytes(tensorflow_pickle())
    names = ['0.pkl', '1.safetensors', '2.pt', '3.pkl', '4.safetensors', '5.pkl']
    for source, dest in itertools.pairwise(names):
        assert 'Done.' in run(f'--source={tmp_path / source}', f'--dest={tmp_path / dest}')
    z = torch.randn(2, 8)
    images = [legacy.load_network(tmp_path / name).G_ema(z, None, noise_mode='const') for name in names]
    assert all(torch.equal(image, images[0]) for image in images)


def test_the_published_and_the_full_form_of_a_conversion_are_the_same(tmp_path):
    source = save_small_network(tmp_path / 'a.pkl')
    run('convert', '--source', source, '--dest', tmp_path / 'b.pkl', '--force-fp16', 'yes')
    run('--source', source, '--dest', tmp_path / 'c.pkl', '--force-fp16=1')
    found = [legacy.load_network(tmp_path / name).G_ema for name in ('b.pkl', 'c.pkl')]
    assert found[0].init_kwargs == found[1].init_kwargs and found[0].synthesis.b16.use_fp16
    assert all(map(torch.equal, found[0].state_dict().values(), found[1].state_dict().values()))


def test_a_converted_pickle_has_the_published_keys(tmp_path):
    (tmp_path / 'a.pkl').write_bytes(tensorflow_pickle())
    run('--source', tmp_path / 'a.pkl', '--dest', tmp_path / 'b.pkl')
    with open(tmp_path / 'b.pkl', 'rb') as file:
        held = pickle.load(file)
    assert set(held) == set(legacy.KEYS) and held['augment_pipe'] is held['training_set_kwargs'] is None
    assert isinstance(held['G_ema'], networks.Generator)


def test_the_command_line_inspects(tmp_path):
    assert 'Generator of 16x16' in run('inspect', save_small_network(tmp_path / 'a.pkl'))
    assert 'Error: ' in run('inspect', tmp_path / 'absent.pkl', status=2)


def test_mistakes_of_the_command_line_are_one_line_and_leave_nothing(tmp_path):
    source = save_small_network(tmp_path / 'a.pkl', c_dim=2)
    for dest in ('x.foo', 'absent/x.pkl', 'x.pt'):
        text = run('--source', source, '--dest', tmp_path / dest, status=2)
        assert text.splitlines()[-1].startswith('Error: ') and 'Traceback' not in text
    assert [path.name for path in tmp_path.iterdir()] == ['a.pkl']
    assert '--dest' in run('--source', source, status=2) and 'inspect' in run('--help')


def test_safetensors_need_no_trust(tmp_path):
    run('--source', save_small_network(tmp_path / 'a.pkl'), '--dest', tmp_path / 'a.safetensors')
    assert legacy.load_network(tmp_path / 'a.safetensors', trust_pickle=True).G_ema.img_resolution == 16
