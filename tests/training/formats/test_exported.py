# SPDX-License-Identifier: Apache-2.0
"""Generators as ONNX and torch.export programs: the same images for any batch, without our operators."""
import pytest
import torch
from small_networks import small_discriminator, small_generator

from dnnlib.util import UserError
from training.formats import convert, exported
from training.formats.exported import ExportedGenerator
from training.systems.dcgan import DCGANGenerator
from training.systems.stylegan1 import StyleGAN1Generator

SMALL = {'img_resolution': 8, 'mapping_kwargs': {'num_layers': 1}}
SHAPES = {
    'plain': ({}, {}), 'conditional': ({'c_dim': 3}, {'truncation_psi': 0.7}),
    'wide gray': ({'img_resolution': (12, 8), 'img_channels': 1, 'c_dim': 2}, {'noise_mode': 'none'}),
    'resnet fp16': ({'synthesis_kwargs': {
        'channel_max': 8, 'architecture': 'resnet', 'num_fp16_res': 2, 'conv_clamp': 256}}, {})}


def other_generator(system):
    """A small generator of another system: 8x8 images, an average w that is not 0."""
    torch.manual_seed(1)
    if system == 'dcgan':
        return DCGANGenerator(z_dim=8, img_resolution=8, ngf=2).eval()
    G = StyleGAN1Generator(
        z_dim=8, c_dim=0, w_dim=8, img_resolution=8, img_channels=3, mapping_kwargs={'num_layers': 1},
        synthesis_kwargs={'channel_base': 32, 'channel_max': 4}).eval()
    with torch.no_grad():
        G.mapping.w_avg.normal_()
    return G


def needs_onnx():
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)


def generator_of(shape):
    network, options = SHAPES[shape]
    return ExportedGenerator(small_generator(**{**SMALL, **network}), **options)


@torch.no_grad()
@pytest.mark.parametrize('shape', [
    pytest.param(shape, marks=() if shape == 'wide gray' else pytest.mark.slow) for shape in SHAPES])
def test_onnx_gives_the_same_images_for_any_batch(shape, tmp_path):
    needs_onnx()
    import onnx
    import onnxruntime
    generator, path = generator_of(shape), tmp_path / 'net.onnx'
    assert exported.write_onnx(path, generator) < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for batch in (1, 3, 4):
        inputs = {name: value + 0.1 for name, value in generator.examples(batch).items()}
        actual = session.run(['img'], {name: value.numpy() for name, value in inputs.items()})[0]
        assert (torch.from_numpy(actual) - generator(**inputs)).abs().max() < 1e-4
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {'', 'ai.onnx'} and not model.functions
    assert [i.name for i in model.graph.input] == list(generator.examples(1))
    assert {i.type.tensor_type.shape.dim[0].dim_param for i in model.graph.input} == {'batch'}
    assert [p.name for p in tmp_path.iterdir()] == ['net.onnx']


@torch.no_grad()
def test_a_torch_export_program_gives_the_same_images_without_our_operators(tmp_path):
    generator = generator_of('conditional')
    assert exported.write_torch_export(tmp_path / 'net.pt2', generator) < 1e-5
    program = torch.export.load(tmp_path / 'net.pt2')
    assert not [node for node in program.graph.nodes if 'stylegan2' in str(node.target)]
    inputs = generator.examples(3)
    assert (program.module()(*inputs.values()) - generator(**inputs)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(('system', 'psi'), [
    pytest.param('stylegan1', 0.5, marks=pytest.mark.slow), ('dcgan', 1)])
def test_generators_of_other_systems_are_exported(system, psi, tmp_path):
    generator = ExportedGenerator(other_generator(system), truncation_psi=psi)
    assert exported.write_torch_export(tmp_path / 'net.pt2', generator) < 1e-5
    inputs = generator.examples(3)
    program = torch.export.load(tmp_path / 'net.pt2').module()
    assert (program(*inputs.values()) - generator(**inputs)).abs().max() < 1e-5


def test_a_truncation_that_the_network_cannot_do_is_refused(tmp_path):
    for system, psi in (('dcgan', 0.5), ('stylegan1', float('nan'))):
        with pytest.raises(UserError, match=f'--trunc={psi}: '):
            convert.write(tmp_path / 'net.pt2', {'G_ema': other_generator(system)},
                          convert.Choices(truncation_psi=psi))
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize('system', ['stylegan1', 'dcgan'])
def test_onnx_holds_generators_of_other_systems(system, tmp_path):
    needs_onnx()
    assert exported.write_onnx(tmp_path / 'net.onnx', ExportedGenerator(other_generator(system))) < 1e-4


@pytest.mark.parametrize('system', ['stylegan1', 'dcgan'])
def test_the_layout_of_rosinality_has_no_place_for_other_systems(system, tmp_path):
    with pytest.raises(UserError, match='not a StyleGAN2 network'):
        convert.write(tmp_path / 'net.pt', {'G_ema': other_generator(system)}, convert.Choices())
    assert list(tmp_path.iterdir()) == []


def test_operators_are_restored_even_after_a_failure(monkeypatch):
    G = small_generator(**SMALL)
    before = [op.overload for op in operators()]
    monkeypatch.setattr(torch.export, 'export', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported._program(ExportedGenerator(G))
    assert before == [op.overload for op in operators()]
    assert all(op.overload is not op.reference for op in operators())


def operators():
    from torch_utils.ops import bias_act, upfirdn2d
    return bias_act._bias_act, upfirdn2d._upfirdn2d


def test_a_file_whose_images_differ_is_not_written(tmp_path):
    generator = generator_of('plain')
    for wrong in (1.0, float('nan')):
        def run(inputs, wrong=wrong):
            return generator(**inputs) + wrong
        with pytest.raises(UserError, match='differ'):
            exported._checked(tmp_path / 'x', generator, run)


def test_only_our_generators_are_exported(tmp_path):
    with pytest.raises(UserError, match='Discriminator'):
        exported.write_torch_export(tmp_path / 'x.pt2', ExportedGenerator(small_discriminator()))
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(exported, 'optional', lambda package: None)
    with pytest.raises(UserError, match='pip install onnx'):
        exported.write_onnx(tmp_path / 'x.onnx', generator_of('plain'))
    assert exported._check_onnx(tmp_path, tmp_path, generator_of('plain')) is None


def test_a_package_that_is_not_there_is_none():
    assert exported.optional('no_such_package') is None and exported.optional('json').dumps(1) == '1'
