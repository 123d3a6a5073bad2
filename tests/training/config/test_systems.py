# SPDX-License-Identifier: Apache-2.0
"""Presets of other systems: what they come to, and which flags they refuse."""
import dataclasses

import pytest

from dnnlib.util import UserError
from training.config import DatasetInfo, resolve
from training.config.systems import SYSTEM_FORMS, check_unused, read_sections, system_of
from training.systems.table import SYSTEMS

MNIST = DatasetInfo('mnist.zip', 10000, 64, 64, 1, has_labels=True, label_dim=10)


def resolved(info=MNIST, **flags):
    return resolve({'outdir': 'x', 'data': info.path, **flags}, info)


def test_each_system_has_a_form_and_the_classes_that_it_names():
    assert SYSTEM_FORMS.keys() == SYSTEMS.keys()
    for name, form in SYSTEM_FORMS.items():
        system = SYSTEMS[name]
        for dotted, cls in ((form.generator, system.generator), (form.discriminator, system.discriminator),
                            (form.loss, system.loss)):
            assert dotted == f'{cls.__module__}.{cls.__name__}'
        assert system_of({'class_name': form.generator}) == name
    assert system_of({}) == 'stylegan2'
    with pytest.raises(UserError, match=r'unknown generator another\.Generator'):
        system_of({'class_name': 'another.Generator'})


def test_dcgan_is_that_of_the_paper():
    config = resolved(cfg='dcgan')
    assert (config.G_kwargs(), config.D_kwargs()) == ({'z_dim': 100, 'ngf': 64}, {'ndf': 64})
    for opt in (config.G_opt, config.D_opt):
        assert (opt.lr, opt.betas) == (2e-4, (0.5, 0.999))
    assert (config.batch_size, config.batch_gpu, config.ema_kimg) == (128, 128, 0)
    assert config.augment.mode == 'noaug'
    assert config.G_reg_interval is None and config.D_reg_interval is None and config.loss_kwargs() == {}


def test_a_tick_of_dcgan_is_an_epoch_with_a_sheet():
    config = resolved(cfg='dcgan')
    assert (config.kimg_per_tick, config.total_kimg, config.image_snapshot_ticks) == (10, 250, 1)
    assert resolved(cfg='dcgan', subset=2000).kimg_per_tick == 2
    assert resolved(cfg='dcgan', mirror=True).kimg_per_tick == 20
    assert resolved(cfg='dcgan', tick=3.0).kimg_per_tick == 3
    tiny = dataclasses.replace(MNIST, num_images=12)
    assert (resolved(tiny, cfg='dcgan').kimg_per_tick, resolved(tiny, cfg='dcgan').total_kimg) == (1, 1)


@pytest.mark.parametrize('side', [8, 32, 128])
def test_dcgan_keeps_its_feature_maps_for_images_of_other_sizes(side):
    info = dataclasses.replace(MNIST, height=side, width=side)
    assert resolved(info, cfg='dcgan').G_kwargs()['ngf'] == 64
    assert resolved(info, cfg='dcgan', cbase=side * 8).D_kwargs()['ndf'] == 16


def test_dcgan_augments_if_asked():
    config = resolved(cfg='dcgan', aug='ada')
    assert config.augment.mode == 'ada' and 'xflip' in config.augment_kwargs()
    assert resolved(cfg='dcgan', aug='fixed', p=0.3).augment.p == 0.3


@pytest.mark.parametrize(('cfg', 'flags'), [
    ('dcgan', {'gamma': 1.0}), ('dcgan', {'cond': True}), ('dcgan', {'cmax': 64}), ('dcgan', {'freezed': 2}),
    ('dcgan', {'map_depth': 2}), ('dcgan', {'precision': 'fp16'}), ('stylegan1', {'precision': 'bf16'}),
    ('stylegan1', {'nhwc': True})])
def test_flags_without_effect_are_refused(cfg, flags):
    (name,) = flags
    with pytest.raises(UserError, match=f'--{name.replace("_", "-")}=.*no effect with --cfg={cfg}'):
        resolved(cfg=cfg, **flags)


@pytest.mark.parametrize('flags', [
    {'precision': 'fp32'}, {'precision': 'auto'}, {'nhwc': False}, {'nhwc': 'off'}, {'nhwc': 'auto'}])
def test_flags_that_ask_for_what_is_so_anyway_are_not(flags):
    assert resolved(cfg='stylegan1', **flags).system == 'stylegan1'


def test_a_flag_is_unused_only_by_systems_that_lack_it():
    check_unused('stylegan2', 'auto', 'precision', 'bf16')
    with pytest.raises(UserError, match='omit one of the two'):
        check_unused('dcgan', 'dcgan', 'cmax', 4)


@pytest.mark.parametrize(('height', 'width'), [(64, 32), (48, 48)])
def test_image_sizes_that_dcgan_does_not_support_are_refused(height, width):
    info = dataclasses.replace(MNIST, height=height, width=width)
    with pytest.raises(UserError, match=r'same power of two, at least 8.*--width=64'):
        resolved(info, cfg='dcgan')


def test_feature_maps_must_be_whole():
    with pytest.raises(UserError, match=r'--cbase=1000.*multiple of 32.*--cbase=992'):
        resolved(cfg='dcgan', cbase=1000)


def test_stylegan1_has_the_networks_of_its_paper():
    config = resolved(cfg='stylegan1', cond=True)
    assert config.G_kwargs() == {
        'z_dim': 512, 'w_dim': 512, 'mapping_kwargs': {'num_layers': 8},
        'synthesis_kwargs': {'channel_base': 16384, 'channel_max': 512}}
    D = config.D_kwargs()
    assert D['architecture'] == 'orig' and D['channel_base'] == 16384 and D['num_fp16_res'] == 0
    assert config.loss_kwargs() == {'r1_gamma': 0.0256, 'pl_weight': 0}


def test_sections_are_read_back_from_their_arguments():
    for cfg in ('stylegan2', 'stylegan1', 'dcgan'):
        config = resolved(cfg=cfg)
        options = config.to_options()
        sections = read_sections(options, config.system, config.data)
        assert sections == {'G': config.G, 'D': config.D, 'loss': config.loss}
        assert not {'G_kwargs', 'D_kwargs', 'loss_kwargs'} & options.keys()
