# SPDX-License-Identifier: Apache-2.0
"""StyleGAN and DCGAN in the ordinary loop: training, snapshots, tools, going on, several processes."""
import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from resume_cases import (
    configure,
    equal,
    final_state,
    finish,
    kill_after_progress,
    output,
    request_for,
    run_to_status,
    start,
    stats_lines,
    write_images,
)
from small_networks import last_snapshot
from small_run import SmallRun, small_config

import generate
import legacy
import style_mixing
from torch_utils import misc
from training.capacity import memory
from training.config import TrainConfig
from training.config.changes import check_changes
from training.formats import pickled
from training.formats.convert import write_snapshot
from training.systems.dcgan import DCGANGenerator
from training.systems.stylegan1 import StyleGAN1Generator
from training.systems.table import SYSTEMS

FLAGS = {
    'stylegan1': {'cfg': 'stylegan1', 'map_depth': 2},
    # DCGAN has no maximum of feature maps.
    'dcgan': {'cfg': 'dcgan', 'cmax': None}}
GENERATORS = {'stylegan1': StyleGAN1Generator, 'dcgan': DCGANGenerator}
systems = pytest.mark.parametrize('system', FLAGS)


def system_config(system, **flags):
    # From 16 pixels on, D of DCGAN has batch norm, too.
    return small_config(**{'side': 16, **FLAGS[system], **flags})


def tensors_of(run):
    return {f'{name}.{key}': t.detach().clone() for name in ('G', 'D', 'G_ema')
            for key, t in misc.named_params_and_buffers(getattr(run.state, name))}


@systems
def test_a_system_is_built_of_its_own_classes(system):
    config = system_config(system)
    G, D = SYSTEMS[config.system].networks(config, 0, 3)
    assert isinstance(G, GENERATORS[system]) and G.img_resolution == D.img_resolution == 16
    assert system == 'dcgan' or D.b16.architecture == 'orig'


@systems
def test_training_moves_all_networks_and_stays_finite(system):
    run = SmallRun(system_config(system))
    before = tensors_of(run)
    run.step(4)
    after = tensors_of(run)
    assert all(t.isfinite().all() for t in after.values())
    for name in ('G', 'D', 'G_ema'):
        own = [key for key in after if key.startswith(f'{name}.')]
        moved = [key for key in own if not torch.equal(after[key], before[key])]
        assert len(moved) > 3, name
    assert all(int(phase.num_broken) == 0 for phase in run.phases)


def test_phases_follow_the_system():
    names = {system: [phase.name for phase in SmallRun(system_config(system)).phases] for system in FLAGS}
    assert names == {'stylegan1': ['Gmain', 'Greg', 'Dmain', 'Dreg'], 'dcgan': ['Dmain', 'Gmain']}


def test_phases_share_networks_optimizers_and_loss_with_the_state():
    run = SmallRun(system_config('dcgan'))
    assert isinstance(run.state.loss, SYSTEMS['dcgan'].loss)
    assert run.phases[0].module is run.state.D and run.phases[1].opt is run.state.G_opt


def test_the_averaged_generator_of_dcgan_is_the_generator():
    run = SmallRun(system_config('dcgan'))
    run.step(2)
    for (name, a), (_, b) in zip(*(misc.named_params_and_buffers(net)
                                   for net in (run.state.G, run.state.G_ema)), strict=True):
        assert torch.equal(a, b), name
    # In use the batch does not matter.
    z = torch.randn(3, 100)
    assert not run.state.G_ema.training
    torch.testing.assert_close(run.state.G_ema(z)[:1], run.state.G_ema(z[:1]))


@systems
def test_the_rehearsal_of_memory_changes_nothing(system):
    run = SmallRun(system_config(system))
    run.step(1)
    before, state = tensors_of(run), copy.deepcopy(run.state.state_dict())
    memory.rehearse(run.state, run.phases, run.config)
    after = tensors_of(run)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert equal(state, run.state.state_dict())


def test_dcgan_survives_a_halved_batch(monkeypatch):
    run, lines, real = SmallRun(system_config('dcgan')), [], memory.rehearse

    def rehearse(state, phases, config):
        if config.batch_gpu > 2:
            raise MemoryError
        real(state, phases, config)
    monkeypatch.setattr(memory, 'rehearse', rehearse)
    run.config = memory.fit_to_memory(run.state, run.phases, run.config, lines.append)
    assert run.config.batch_gpu == 2 and len(lines) == 1
    run.step(1)


def test_the_buffers_that_follow_batches_are_averaged_over_processes(monkeypatch):
    run, seen = SmallRun(system_config('dcgan')), []
    monkeypatch.setattr('torch_utils.distributed.average', seen.extend)
    monkeypatch.setattr('torch_utils.distributed.world_size', lambda: 2)
    monkeypatch.setattr('torch_utils.distributed.all_reduce_sum', lambda tensor: tensor)
    run.step(1)
    found = {id(t) for t in seen}
    buffers = [b for net in (run.state.G, run.state.D) for b in net.buffers() if b.is_floating_point()]
    assert buffers and all(id(b) in found for b in buffers)


@systems
def test_options_survive_the_way_to_json_and_back(system):
    config = system_config(system)
    again = TrainConfig.from_options(config.to_options())
    assert again == config and again.system == system
    check_changes(config, again)


@systems
@pytest.mark.parametrize('kind', ['pkl', 'safetensors'])
def test_snapshots_open_without_running_their_code(system, kind, tmp_path):
    run = SmallRun(system_config(system))
    run.step(2)
    state, path = run.state, tmp_path / f'net.{kind}'
    copies = pickled.HostCopies()
    networks = pickled.copy_networks(copies, {'G': state.G, 'D': state.D, 'G_ema': state.G_ema})
    write_snapshot(path, networks, (kind,))
    loaded = legacy.load_network(str(path))
    z, c = torch.randn(2, state.G.z_dim), torch.zeros(2, 0)
    for name in ('G', 'D', 'G_ema'):
        ours, theirs = getattr(state, name), loaded[name]
        assert type(theirs) is type(ours) and not theirs.training
        for (key, a), (_, b) in zip(*(misc.named_params_and_buffers(n) for n in (ours, theirs)), strict=True):
            assert torch.equal(a, b), key
    expected = state.G_ema(z, c, noise_mode='const')
    torch.testing.assert_close(loaded.G_ema(z, c, noise_mode='const'), expected)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


def run_config(system, images, run_dir, steps=20, **flags):
    """The loss stays that of the preset: DCGAN has no other."""
    flags = {**FLAGS[system], **flags}
    config = configure(images, run_dir, steps=steps, **flags)
    plain = small_config(**FLAGS[system])
    return dataclasses.replace(config, loss=plain.loss)


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """System -> the folder of a run that nobody disturbed."""
    folders = {}
    for system in FLAGS:
        folders[system] = tmp_path_factory.mktemp(system) / 'run'
        config = run_config(system, images, folders[system])
        assert finish(start(config)) == 0, output(config)
    return folders


@systems
def test_a_killed_run_goes_on_to_the_bit(system, images, finished, tmp_path):
    config = run_config(system, images, tmp_path / 'run')
    kill_after_progress(config, 0.05)
    assert finish(start(config, request_for(config.run_dir))) == 0, output(config)
    assert 'Resuming from' in output(config)
    found, expected = final_state(config.run_dir), final_state(finished[system])
    assert equal(found['run'], expected['run'])
    assert stats_lines(config.run_dir) == stats_lines(finished[system])
    names = [key for key in expected['run']['G'] if 'running_' in key or 'num_batches' in key]
    assert bool(names) == (system == 'dcgan')


@systems
def test_images_are_generated_from_a_snapshot(system, finished, tmp_path):
    network = last_snapshot(finished[system])
    with pytest.raises(SystemExit) as done:
        generate.main([f'--outdir={tmp_path}', f'--network={network}', '--seeds=0-3', '--device=cpu'])
    assert not done.value.code
    files = sorted(tmp_path.glob('seed*.png'))
    assert len(files) == 4 and len({path.read_bytes() for path in files}) == 4


def test_dcgan_says_that_it_knows_no_truncation(finished, tmp_path, capsys):
    network = last_snapshot(finished['dcgan'])
    with pytest.raises(SystemExit) as done:
        generate.main([f'--outdir={tmp_path}', f'--network={network}', '--seeds=0', '--trunc=0.7'])
    assert done.value.code == 2 and 'only --trunc=1 works' in capsys.readouterr().err


def test_styles_of_stylegan_mix(finished, tmp_path):
    network = last_snapshot(finished['stylegan1'])
    with pytest.raises(SystemExit) as done:
        style_mixing.main([f'--outdir={tmp_path}', f'--network={network}', '--rows=1', '--cols=2',
                           '--styles=0-1', '--device=cpu'])
    assert not done.value.code
    images = {path.name: path.read_bytes() for path in tmp_path.glob('*-*.png')}
    assert set(images) == {'1-1.png', '1-2.png', '2-2.png'}
    assert len(set(images.values())) == 3


@systems
def test_a_new_run_starts_from_the_weights_of_an_old_one(system, images, finished, tmp_path):
    config = run_config(
        system, images, tmp_path / 'run', steps=1, resume=last_snapshot(finished[system]))
    assert run_to_status(config) == 0
    assert Path(tmp_path, 'run', 'transfer.txt').is_file()
