# SPDX-License-Identifier: Apache-2.0
"""training.config: presets, flags, their errors, and the published dictionary."""
import dataclasses
import json
import re
from operator import attrgetter

import pytest
from golden_cases import cases

from dnnlib.util import UserError
from training import config as cfg
from training.config.options import TRANSFER_FOLDER
from training.config.presets import Preset


def dataset(side=64, width=None, **kwargs):
    return cfg.DatasetInfo('some/where/pics.zip', 100, side, width or side, **kwargs)


LABELLED = {'has_labels': True, 'label_dim': 3}


def resolve(flags=None, **kwargs):
    return cfg.resolve(flags or {}, dataset(**kwargs))


# --- Presets

@pytest.mark.parametrize('side, gpus, batch, batch_gpu, gamma, ema', [
    (32, 1, 32, 32, 0.0064, 10), (64, 8, 64, 8, 0.0128, 20), (128, 2, 64, 32, 0.0512, 20),
    (256, 1, 16, 16, 0.8192, 5), (512, 4, 32, 8, 1.6384, 10), (1024, 1, 4, 4, 52.4288, 1.25),
    (1024, 8, 32, 4, 6.5536, 10),
])
def test_auto_follows_the_published_table(side, gpus, batch, batch_gpu, gamma, ema):
    config = resolve({'gpus': gpus}, side=side)
    assert (config.batch_size, config.batch_gpu, config.D.mbstd_group_size) == (batch, batch_gpu, 4)
    assert config.loss.r1_gamma == pytest.approx(gamma, rel=1e-9)
    assert (config.ema_kimg, config.ema_rampup, config.G.map_layers) == (ema, 0.05, 2)
    assert config.G.channel_base == config.D.channel_base == (32768 if side >= 512 else 16384)
    assert config.G_opt.lr == config.D_opt.lr == (0.002 if side >= 1024 else 0.0025)


@pytest.mark.parametrize('name, expected', [
    ('stylegan2', (25000, 32, 4, 4, 32768, 0.002, 10, 10, None, 8)),
    ('paper256', (25000, 64, 8, 8, 16384, 0.0025, 1, 20, None, 8)),
    ('paper512', (25000, 64, 8, 8, 32768, 0.0025, 0.5, 20, None, 8)),
    ('paper1024', (25000, 32, 4, 4, 32768, 0.002, 2, 10, None, 8)),
    ('cifar', (100000, 64, 32, 32, 32768, 0.0025, 0.01, 500, 0.05, 2)),
])
def test_fixed_presets_have_the_published_values_on_one_gpu(name, expected):
    columns = attrgetter('total_kimg', 'batch_size', 'batch_gpu', 'D.mbstd_group_size', 'G.channel_base',
                         'G_opt.lr', 'loss.r1_gamma', 'ema_kimg', 'ema_rampup', 'G.map_layers')
    assert columns(resolve({'cfg': name}, side=256)) == expected


def test_every_preset_resolves_at_every_common_size():
    for name in cfg.PRESETS:
        # The demos' few feature maps do not go round for more levels.
        for side in (8, 32, 128) if 'demo' in name else (8, 32, 128, 1024):
            assert resolve({'cfg': name}, side=side).batch_size >= 1


@pytest.mark.parametrize('name', ['demo', 'stylegan1-demo'])
def test_the_demo_presets_are_small_and_need_no_download(name):
    config = resolve({'cfg': name}, side=32)
    assert config.G.channel_max <= 64 and config.G.z_dim == config.G.w_dim <= 128 and config.total_kimg <= 50
    assert config.metrics == ('swd',) and config.G.num_fp16_res == 0 and config.kimg_per_tick <= 1


def test_auto_gives_every_process_as_many_images():
    for gpus in range(1, 70):
        config = resolve({'gpus': gpus}, side=256)
        assert config.batch_size == config.batch_gpu * gpus and config.batch_size <= max(64, gpus)


def test_auto_measures_images_that_are_not_square_by_their_area():
    wide = resolve(side=64, width=256)
    assert wide.batch_size == resolve(side=128).batch_size
    assert wide.loss.r1_gamma == pytest.approx(resolve(side=128).loss.r1_gamma)


def test_more_gpus_than_a_preset_was_made_for_share_its_batch():
    config = resolve({'cfg': 'cifar', 'gpus': 4}, side=32)
    assert (config.batch_size, config.batch_gpu) == (64, 16)
    with pytest.raises(UserError, match=r'--batch=32 must be divisible by --gpus=64.*multiple of 64'):
        resolve({'cfg': 'stylegan2', 'gpus': 64})


def test_settling_a_preset_leaves_no_rule():
    settled = cfg.PRESETS['auto'].settle(256, 256, 2)
    assert not any(callable(getattr(settled, f.name)) for f in dataclasses.fields(Preset))


# --- Image sizes

@pytest.mark.parametrize('size, expected', [
    ((8, 8), (4, 4, 1)), ((32, 32), (4, 4, 3)), ((1024, 1024), (4, 4, 8)), ((48, 48), (3, 3, 4)),
    ((64, 48), (4, 3, 4)), ((720, 1280), None), ((704, 1280), (11, 20, 6)), ((512, 768), (4, 6, 7)),
    ((6, 6), (3, 3, 1)), ((4, 4), None), ((100, 100), None), ((33, 33), None), ((64, 1024), (4, 64, 4)),
    ((32, 1), None), ((2, 2), None),
])
def test_sizes_split_into_a_start_and_doublings_or_are_refused(size, expected):
    if expected is None or max(expected[:2]) > 16:
        with pytest.raises(UserError, match=r'--data.*dataset_tool\.py --width'):
            cfg.split_resolution(*size)
    else:
        assert cfg.split_resolution(*size) == expected


def test_config_and_networks_agree_on_the_sizes_that_fit():
    resolution = pytest.importorskip('dnnlib.resolution')

    def outcome(split, *args):
        try:
            return split(*args)
        except ValueError:
            return None
    for h in range(1, 70):
        for w in (h, 24, 64, 100):
            assert outcome(cfg.split_resolution, h, w) == outcome(resolution.split_resolution, (h, w)), (h, w)


def test_the_size_that_the_error_proposes_fits_and_stays_square():
    with pytest.raises(UserError, match='--width=96 --height=96'):
        cfg.split_resolution(100, 100)
    assert cfg.split_resolution(96, 96) == (3, 3, 5)


# --- Flags: one entry for each, and where its value ends up

EFFECTS = [
    ('gpus', 2, 'num_gpus', 2), ('wandb', True, 'wandb', True),
    ('verbose', True, 'verbose', True), ('threads', 3, 'num_threads', 3),
    ('snap', '10', 'network_snapshot_ticks', 10), ('ops', 'torch', 'ops', 'torch'),
    ('cuda_graphs', 'off', 'cuda_graphs', 'off'), ('compile', True, 'compile', True),
    ('snapshot_format', 'pkl,safetensors', 'snapshot_formats', ('pkl', 'safetensors')),
    ('snap', '10', 'image_snapshot_ticks', 10), ('snap', '30m', 'snapshot_minutes', 30.0),
    ('snap', '1.5m', 'network_snapshot_ticks', None), ('metrics', 'none', 'metrics', ()),
    ('metrics', 'NONE', 'metrics', ()), ('metrics', 'swd,swd', 'metrics', ('swd',)),
    ('metrics_every', 3, 'metrics_every', 3), ('detector_dir', '.', 'detector_dir', '.'),
    ('keep', 3, 'keep', 3), ('time_limit', '2h', 'time_limit_sec', 7200),
    ('timeout', 30.0, 'timeout_sec', 30), ('gpus', 3, 'batch_size', 63), ('gpus', 3, 'batch_gpu', 21),
    ('seed', 7, 'random_seed', 7), ('tick', 0.5, 'kimg_per_tick', 0.5),
    ('cond', True, 'data.use_labels', True), ('cond', False, 'data.use_labels', False),
    ('subset', 9, 'data.max_size', 9), ('subset', 9, 'data.random_seed', 0),
    ('subset', 100, 'data.random_seed', None), ('mirror', True, 'data.xflip', True),
    ('cfg', 'paper256', 'ema_kimg', 20), ('gamma', 3.5, 'loss.r1_gamma', 3.5), ('kimg', 5, 'total_kimg', 5),
    ('batch', 6, 'batch_size', 6), ('batch', 6, 'batch_gpu', 6), ('batch_gpu', 8, 'batch_gpu', 8),
    ('batch_gpu', 8, 'batch_size', 32), ('cbase', 4096, 'G.channel_base', 4096),
    ('cbase', 4096, 'D.channel_base', 4096), ('cmax', 64, 'G.channel_max', 64),
    ('cmax', 64, 'D.channel_max', 64), ('map_depth', 4, 'G.map_layers', 4), ('glr', 0.1, 'G_opt.lr', 0.1),
    ('dlr', 0.1, 'D_opt.lr', 0.1), ('dlr', 0.1, 'G_opt.lr', 0.0025),
    ('aug', 'noaug', 'augment.mode', 'noaug'), ('aug', 'noaug', 'augment.multipliers', {}),
    ('target', 0.5, 'augment.target', 0.5), ('augpipe', 'noise', 'augment.multipliers', {'noise': 1}),
    ('resume', 'a/b.pkl', 'resume_pkl', 'a/b.pkl'), ('resume', 'a/b.pkl', 'ada_kimg', 100),
    ('resume', 'a/b.pkl', 'ema_rampup', None), ('resume', 'noresume', 'resume_pkl', None),
    ('resume', 'noresume', 'ema_rampup', 0.05),
    ('resume', 'ffhq512', 'resume_pkl', TRANSFER_FOLDER + 'ffhq-res512-mirror-stylegan2-noaug.pkl'),
    ('freezed', 3, 'D.freeze_layers', 3), ('freezed', 0, 'D.freeze_layers', 0),
    ('device', 'cpu', 'device', 'cpu'), ('precision', 'bf16', 'precision', 'bf16'),
    ('precision', 'fp32', 'G.num_fp16_res', 0), ('precision', 'fp32', 'D.conv_clamp', None),
    ('fp32', True, 'D.num_fp16_res', 0), ('fp32', True, 'precision', 'auto'),
    ('fp32', False, 'G.num_fp16_res', 4), ('nhwc', True, 'G.channels_last', True),
    ('nhwc', True, 'D.channels_last', True), ('nobench', True, 'cudnn_benchmark', False),
    ('nhwc', 'auto', 'G.channels_last', None), ('nhwc', '0', 'D.channels_last', False),
    ('allow_tf32', True, 'allow_tf32', True), ('allow_tf32', 'auto', 'allow_tf32', None),
    ('allow_tf32', 'off', 'allow_tf32', False), ('workers', 0, 'data.num_workers', 0),
    ('cache', 'off', 'data.cache', 'off'),
]


@pytest.mark.parametrize('flag, value, path, expected', EFFECTS, ids=lambda x: str(x).rsplit('/', 1)[-1])
def test_a_flag_sets_its_field(flag, value, path, expected):
    assert attrgetter(path)(resolve({flag: value}, **LABELLED)) == expected


def test_every_flag_that_shapes_the_training_is_tested_above():
    shaping = {option.key for option in cfg.OPTIONS} - {
        'outdir', 'data', 'strict', 'desc', 'p', 'allow_changes'}
    assert {flag for flag, *_ in EFFECTS} == shaping


def test_a_flag_changes_nothing_beside_its_own_fields():
    base = resolve().to_options()
    changed = resolve({'batch': 8}).to_options()
    assert {key for key in base if base[key] != changed[key]} == {'batch_size', 'batch_gpu'}


def test_fixed_augmentation_takes_its_probability():
    augment = resolve({'aug': 'fixed', 'p': 0.25, 'augpipe': 'bg'}).augment
    assert (augment.mode, augment.p, len(augment.multipliers)) == ('fixed', 0.25, 7)


def test_pipelines_are_groups_or_their_initials():
    sizes = {name: len(resolve({'augpipe': name}).augment_kwargs()) for name in cfg.PIPELINES}
    assert sizes == {'blit': 3, 'geom': 4, 'color': 5, 'filter': 1, 'noise': 1, 'cutout': 1,
                     'bg': 7, 'bgc': 12, 'bgcf': 13, 'bgcfn': 14, 'bgcfnc': 15}


def test_half_precision_can_be_asked_of_a_preset_without_it():
    config = resolve({'cfg': 'demo', 'precision': 'bf16'}, side=32)
    assert config.G_kwargs()['synthesis_kwargs']['half_dtype'] == 'bfloat16'
    assert config.D_kwargs()['block_kwargs']['half_dtype'] == 'bfloat16'
    assert config.G.num_fp16_res == config.D.num_fp16_res == 4 and config.G.conv_clamp == 256


def test_automatic_precision_is_float32_on_a_cpu_only():
    config = resolve()
    assert config.for_device('cuda') == config
    assert config.for_device('cpu').G.num_fp16_res == config.for_device('cpu').D.num_fp16_res == 0
    forced = resolve({'precision': 'bf16'})
    assert forced.for_device('cpu') == forced


@pytest.mark.parametrize('batch, group', [(12, 6), (16, 8), (7, 7), (64, 8), (11, 1), (1, 8)])
def test_groups_for_minibatch_deviation_divide_the_batch(batch, group):
    config = resolve({'cfg': 'paper256', 'batch': batch})
    actual = min(config.D.mbstd_group_size, config.batch_gpu)
    assert config.batch_gpu % actual == 0 and actual == min(group, batch)


def test_images_without_colour_get_the_other_augmentations():
    assert set(resolve(channels=5).augment_kwargs()) == set(resolve({'augpipe': 'bg'}).augment_kwargs())
    with pytest.raises(UserError, match=r'--augpipe=bgc .*5 channels.*--augpipe=bg'):
        resolve({'augpipe': 'bgc'}, channels=5)


# --- Errors

ERRORS = [
    ({'gpus': 0}, '--gpus=0 .*at least 1'), ({'gpus': -4}, '--gpus=-4 .*nearest valid: 1'),
    ({'timeout': 0.0}, '--timeout=0.0 .*at least 0.1'), ({'snap': '0'}, '--snap=0 .*30m'),
    ({'snap': '2h'}, '--snap=2h '), ({'snap': '0m'}, '--snap=0m '),
    ({'metrics': 'fid'}, '--metrics=fid: .*fid50k_full.*ppl_wend.*swd'),
    ({'metrics': 'swd, swd'}, "' swd' is not"),
    ({'metrics_every': 0}, '--metrics-every=0 .*at least 1; nearest valid: 1'),
    ({'seed': -1}, '--seed=-1 .*nearest valid: 0'), ({'seed': 2 ** 32}, '--seed=4294967296 .*: 4294967295'),
    ({'tick': 0.0}, '--tick=0.0 '), ({'tick': float('nan')}, '--tick=nan '),
    ({'cond': True}, '--cond=True .*dataset.json'), ({'subset': 0}, '--subset=0 '),
    ({'subset': 101}, '--subset=101 .*100'), ({'cfg': 'paper2048'}, '--cfg=paper2048 .*demo'),
    ({'gamma': -1.0}, '--gamma=-1.0 '), ({'gamma': float('inf')}, '--gamma=inf '), ({'kimg': 0}, '--kimg=0 '),
    ({'batch': 0}, '--batch=0 '), ({'batch': 5, 'gpus': 2}, '--batch=5 .*--gpus=2.*4 or 6'),
    ({'batch': 1, 'gpus': 4}, '--batch=1 .*--gpus=4.*: 4'),
    ({'batch_gpu': 5}, '--batch=32 .*--batch-gpu=5.*1 or 2 or 4 or 8 or 16 or 32'),
    ({'batch_gpu': 0}, '--batch-gpu=0 '), ({'cbase': 32}, '--cbase=32 .*--cbase=64'),
    ({'cmax': 0}, '--cmax=0 '), ({'map_depth': 0}, '--map-depth=0 '), ({'glr': -0.1}, '--glr=-0.1 '),
    ({'dlr': -0.1}, '--dlr=-0.1 '), ({'aug': 'ADA'}, '--aug=ADA .*noaug, ada, fixed'),
    ({'aug': 'fixed'}, '--aug=fixed .*--p'), ({'p': 0.3}, '--p=0.3 .*fixed'),
    ({'aug': 'fixed', 'p': 1.5}, '--p=1.5 .*between 0 and 1'),
    ({'aug': 'noaug', 'p': 0.5}, '--p=0.5 .*noaug'), ({'target': 1.5}, '--target=1.5 .*between 0 and 1'),
    ({'target': 0.5, 'aug': 'noaug'}, '--target=0.5 .*noaug'),
    ({'augpipe': 'bgc', 'aug': 'noaug'}, '--augpipe=bgc .*noaug'), ({'augpipe': 'gb'}, '--augpipe=gb '),
    ({'freezed': -1}, '--freezed=-1 '), ({'workers': -1}, '--workers=-1 '),
    ({'fp32': True, 'precision': 'fp16'}, '--fp32=True .*--precision=fp16'), ({'desc': 'a/b'}, '--desc=a/b '),
    ({'device': 'tpu'}, '--device=tpu .*cpu'), ({'precision': 'fp8'}, '--precision=fp8 '),
    ({'cache': 'disk'}, '--cache=disk '), ({'kimgs': 3}, "'kimgs'.*kimg"),
]


@pytest.mark.parametrize('flags, message', ERRORS, ids=lambda x: str(x) if isinstance(x, dict) else '')
def test_a_wrong_flag_is_explained_in_one_line_that_names_it(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(flags)
    assert '\n' not in str(caught.value)


def test_the_first_of_several_errors_in_the_published_order_is_reported():
    wrong = {'gpus': 0, 'snap': '0', 'metrics': 'x', 'cond': True, 'subset': 0, 'gamma': -1.0, 'kimg': 0,
             'batch': 0, 'aug': 'fixed', 'target': 5.0, 'augpipe': 'x', 'freezed': -1, 'workers': -1}
    while wrong:
        with pytest.raises(UserError, match=f'--{next(iter(wrong))}'):
            resolve(wrong)
        del wrong[next(iter(wrong))]


def test_flags_before_the_dataset_are_checked_without_it():
    cfg.check_flags({'gamma': -1.0}, before='data')
    with pytest.raises(UserError, match='--snap'):
        cfg.check_flags({'snap': 'x', 'gamma': -1.0}, before='data')
    with pytest.raises(UserError, match='--gamma'):
        cfg.check_flags({'gamma': -1.0})


# --- Names and notes

@pytest.mark.parametrize('flags, name', [
    ({}, 'pics-auto1'), ({'gpus': 2, 'cfg': 'auto'}, 'pics-auto2'),
    ({'gpus': 2, 'cfg': 'cifar'}, 'pics-cifar'),
    ({'cond': True, 'subset': 100, 'mirror': True}, 'pics-cond-subset100-mirror-auto1'),
    ({'cond': False, 'mirror': False, 'fp32': True, 'seed': 3, 'snap': '5'}, 'pics-auto1'),
    ({'gamma': 10.0, 'kimg': 1000, 'batch': 16, 'aug': 'ada'}, 'pics-auto1-gamma10-kimg1000-batch16-ada'),
    ({'aug': 'fixed', 'p': 0.25, 'augpipe': 'bg'}, 'pics-auto1-fixed-p0.25-bg'),
    ({'target': 0.7}, 'pics-auto1-target0.7'),
    ({'resume': 'ffhq256', 'freezed': 10}, 'pics-auto1-resumeffhq256-freezed10'),
    ({'resume': 'x/y.pkl', 'freezed': 0}, 'pics-auto1-resumecustom-freezed0'),
    ({'resume': 'noresume'}, 'pics-auto1-noresume'),
    ({'desc': 'try_2', 'glr': 0.001, 'map_depth': 4}, 'pics-auto1-map4-glr0.001-try_2'),
])
def test_a_run_is_named_after_what_affects_training(flags, name):
    assert cfg.run_description(flags, dataset(**LABELLED)) == name


@pytest.mark.parametrize('path, name', [('a/my.dotted-set', 'my'), ('a/pics/', 'pics'), ('x.zip', 'x')])
def test_a_run_is_named_after_the_last_part_of_the_dataset_path(path, name):
    assert cfg.run_description({}, dataclasses.replace(dataset(), path=path)) == f'{name}-auto1'


@pytest.mark.parametrize('flags, info, word', [
    ({'cfg': 'paper256', 'batch': 12}, {}, 'groups of 6 .*not 8'),
    ({}, {'channels': 2}, 'colours'),
    ({'subset': 45}, {}, '^45 images are few'),
    ({'resume': 'a.pkl'}, {}, 'from kimg 0, with the weights of a.pkl'),
])
def test_what_a_user_may_not_expect_is_said(flags, info, word):
    info = dataset(**info)
    (note,) = cfg.notes(flags, info, cfg.resolve(flags, info))
    assert re.search(word, note)


def test_an_ordinary_run_has_no_notes():
    assert cfg.notes({}, dataset(), resolve()) == []
    assert cfg.notes({'cond': True}, dataset(**LABELLED), resolve({'cond': True}, **LABELLED)) == []


# --- The published dictionary

@pytest.mark.parametrize('flags', [
    {}, {'cfg': 'demo', 'snap': '2m', 'precision': 'bf16', 'device': 'cpu', 'metrics_every': 2, 'tick': 2.0},
    {'cfg': 'cifar', 'cond': True, 'freezed': 0, 'nhwc': True, 'nobench': True, 'subset': 9},
    {'aug': 'fixed', 'p': 0.0, 'augpipe': 'bgcfnc', 'resume': 'ffhq256', 'fp32': True},
    {'aug': 'noaug', 'cache': 'ram', 'allow_tf32': True},
])
def test_options_survive_json_and_back(flags):
    for width in (64, 48):
        config = resolve(flags, width=width, **LABELLED)
        assert cfg.TrainConfig.from_options(json.loads(json.dumps(config.to_options()))) == config


def test_settings_of_this_project_appear_only_where_asked_for():
    published = set(resolve().to_options())
    own = {'kimg_per_tick', 'precision', 'device', 'cache', 'metrics_every', 'snapshot_minutes'}
    assert not published & own
    flags = {'tick': 1.0, 'precision': 'bf16', 'device': 'cpu', 'cache': 'off', 'metrics_every': 2,
             'snap': '5m'}
    assert set(resolve(flags).to_options()) == published | own


@pytest.mark.parametrize('case', cases('train_configs', where=lambda c: c['expected']['exit_code'] == 0))
def test_published_options_are_read_and_written_unchanged(case):
    options = case['expected']['options']
    try:
        config = cfg.TrainConfig.from_options(options)
    except UserError as error:  # recorded from a program that let these pass and failed later
        pytest.skip(str(error))
    assert config.to_options() == options
    assert list(config.to_options()) == list(options)


@pytest.mark.parametrize('change, message', [
    (lambda o: o.pop('batch_size'), 'lack batch_size'),
    (lambda o: o.pop('loss_kwargs'), "lack 'loss_kwargs'"),
    (lambda o: o.update(colour='red'), 'unknown key colour'),
    (lambda o: o['D_kwargs'].update(depth=3), 'unknown key depth'),
    (lambda o: o.update(batch_gpu=5), '--batch-gpu=5'),
    (lambda o: o.update(device='tpu'), 'device=tpu'),
    (lambda o: o.update(total_kimg=0), 'total_kimg=0'),
    (lambda o: o['training_set_kwargs'].update(max_size=0), 'max_size=0'),
    (lambda o: o['G_kwargs'].update(z_dim=0), 'z_dim=0'),
    (lambda o: o['training_set_kwargs'].update(resolution=100), 'no network fits'),
])
def test_options_that_no_run_can_have_are_refused_by_name(change, message):
    options = resolve().to_options()
    change(options)
    with pytest.raises(UserError, match=message):
        cfg.TrainConfig.from_options(options)


def test_constructor_arguments_build_the_networks_they_describe():
    torch, networks = pytest.importorskip('torch'), pytest.importorskip('training.networks')
    config = resolve({'cfg': 'demo', 'freezed': 2, 'nhwc': True}, side=32, width=48)
    assert config.data.resolution == (32, 48)
    with torch.device('meta'):
        G = networks.Generator(c_dim=0, img_resolution=(32, 48), img_channels=3, **config.G_kwargs())
        D = networks.Discriminator(c_dim=0, img_resolution=(32, 48), img_channels=3, **config.D_kwargs())
    assert (G.z_dim, G.w_dim, G.mapping.num_layers) == (128, 128, 2)
    assert 'b32.conv0.weight' in dict(D.named_buffers())  # frozen layers are buffers
