# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a few iterations: what they write, and that only their configuration decides."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import torch
from resume_cases import leave_out_images
from small_networks import last_snapshot

from dnnlib.util import UserError
from legacy import load_network
from training import training_loop
from training.config import DatasetInfo, resolve
from training.report import sheet
from training.run.interrupt import Interrupt
from training.run.manifest import read_manifest
from training.training_loop import Training, train


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Twelve 8x8 RGB images of three classes."""
    folder = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    labels = []
    for i in range(12):
        PIL.Image.fromarray(rng.integers(0, 256, [8, 8, 3], dtype=np.uint8)).save(folder / f'{i:02d}.png')
        labels.append([f'{i:02d}.png', i % 3])
    (folder / 'dataset.json').write_text(json.dumps({'labels': labels}))
    return folder


@pytest.fixture
def no_sheets(monkeypatch):
    """For runs whose networks or words count, not their images and curves."""
    leave_out_images(monkeypatch.setattr)


def configure(images, run_dir, total_kimg=0.04, **flags):
    """A run of tiny networks over a few iterations, in ticks of four."""
    info = DatasetInfo(str(images), 12, 8, 8, 3, has_labels=True, label_dim=3)
    flags = {'outdir': 'unused', 'data': str(images), 'cfg': 'demo', 'batch': 4, 'cbase': 32, 'cmax': 4,
             'device': 'cpu', 'metrics': 'none', 'workers': 0, **flags}
    config = resolve(flags, info)
    run_dir.mkdir()
    return dataclasses.replace(config, run_dir=str(run_dir), total_kimg=total_kimg, kimg_per_tick=0.016)


def run(config):
    """Train, and say where."""
    train(config)
    return config.run_dir


def tensors(path):
    snapshot = load_network(str(path))
    return {f'{name}.{k}': v for name in ('G', 'D', 'G_ema') for k, v in snapshot[name].state_dict().items()}


def snapshot_of(config):
    """All tensors that a run ends with."""
    return tensors(last_snapshot(run(config)))


def test_a_run_writes_the_published_files(images, tmp_path, capsys):
    run(configure(images, tmp_path / 'run'))
    folder = tmp_path / 'run'
    names = {p.name for p in folder.iterdir()}
    assert {'log.txt', 'stats.jsonl', 'reals.png', 'fakes_init.png', 'fakes000000.png',
            'network-snapshot-000000.pkl', 'training_curves.png'} <= names
    ticks = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    assert [t['Progress/tick']['mean'] for t in ticks] == [0, 1, 2, 3]
    assert {'Loss/G/loss', 'Loss/D/loss', 'Loss/r1_penalty', 'Timing/Gmain', 'Timing/Dreg'} <= set(ticks[0])
    assert ticks[-1]['Progress/kimg']['mean'] == pytest.approx(0.04)
    log = (folder / 'log.txt').read_text()
    assert 'tick 3' in log and 'compute' in log and 'maintenance' in log
    assert 'Total' not in capsys.readouterr().out and 'Total' in (folder / 'networks.txt').read_text()
    snapshot = load_network(str(folder / 'network-snapshot-000000.pkl'))
    assert snapshot.training_set_kwargs['path'] == images.name
    assert snapshot.G_ema(torch.zeros(1, snapshot.G_ema.z_dim), None).shape == (1, 3, 8, 8)


@pytest.mark.parametrize('flags', [{}, {'cond': True, 'aug': 'fixed', 'p': 0.5}, {'batch_gpu': 2}])
def test_two_runs_of_one_configuration_are_the_same_to_the_bit(images, tmp_path, flags, no_sheets):
    first, second = (snapshot_of(configure(images, tmp_path / name, **flags)) for name in 'ab')
    assert first.keys() == second.keys()
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_another_seed_is_another_run(images, tmp_path, no_sheets):
    first, second = (snapshot_of(configure(images, tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert any(not torch.equal(v, second[k]) for k, v in first.items())


def test_reading_through_workers_or_out_of_memory_makes_no_difference(images, tmp_path, no_sheets):
    results = []
    ways = {'ram': {'cache': 'ram'}, 'files': {'cache': 'off'}, 'worker': {'cache': 'off', 'workers': 1}}
    for name, flags in ways.items():
        results.append(snapshot_of(configure(images, tmp_path / name, 0.02, **flags)))
    for other in results[1:]:
        assert all(torch.equal(v, other[k]) for k, v in results[0].items())


def test_labels_reach_both_networks(images, tmp_path, no_sheets):
    run(configure(images, tmp_path / 'run', 0.004, cond=True))
    snapshot = load_network(str(tmp_path / 'run' / 'network-snapshot-000000.pkl'))
    assert snapshot.G.c_dim == snapshot.D.c_dim == 3


def test_transfer_takes_what_fits_and_says_how_much(images, tmp_path, capsys, no_sheets):
    run(configure(images, tmp_path / 'first', 0.008))
    source = str(tmp_path / 'first' / 'network-snapshot-000000.pkl')
    capsys.readouterr()
    config = configure(images, tmp_path / 'second', resume=source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, 'run', lambda self, interrupt: setattr(Training, 'seen', self) or True)
        train(config)
    fresh, old = Training.seen.state.G.state_dict(), load_network(source).G.state_dict()
    assert all(torch.equal(v, old[k]) for k, v in fresh.items())
    total = len(old)
    assert f'G: {total} of {total} tensors' in capsys.readouterr().out


def test_a_failing_metric_is_named_once_and_training_goes_on(images, tmp_path, capsys, no_sheets):
    run(configure(images, tmp_path / 'run', metrics='fid50k_full', snap='1'))
    output = capsys.readouterr().out
    assert output.count('Metric fid50k_full is skipped') == 1 and 'tick 3' in output


def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(images, tmp_path, no_sheets):
    config = configure(images, tmp_path / 'run')
    broken = tmp_path / 'broken'
    broken.mkdir()
    for path in sorted(images.iterdir()):
        (broken / path.name).write_bytes(path.read_bytes() if path.name != '07.png' else b'no image')
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(broken)))
    with pytest.raises(UserError, match=r'07\.png'):
        train(config)


def test_cuda_is_refused_where_there_is_none(images, tmp_path):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(UserError, match='--device=cuda'):
        train(configure(images, tmp_path / 'run', device='cuda'))


@pytest.mark.gpu
@pytest.mark.parametrize('flags', [
    {}, {'precision': 'fp16'}, {'precision': 'bf16', 'nhwc': True}, {'cond': True}])
def test_a_run_on_a_gpu_writes_finite_networks(images, tmp_path, flags, no_sheets):
    folder = run(configure(images, tmp_path / 'run', device='cuda', **flags))
    assert all(v.isfinite().all() for v in tensors(last_snapshot(folder)).values())


def test_snapshots_within_a_thousand_images_keep_apart(images, tmp_path, no_sheets):
    run(configure(images, tmp_path / 'run', snap='1'))
    for kind in ('fakes', 'network-snapshot-'):
        names = sorted(path.name for path in (tmp_path / 'run').glob(f'{kind}0*'))
        ticks = len((tmp_path / 'run' / 'stats.jsonl').read_text().splitlines())
        assert len(names) == ticks > 2, names


def test_a_run_that_is_stopped_writes_the_network_a_sheet_and_a_page_that_says_so(
        images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sheet, 'CPU_GRID_IMAGES', 12)
    steps = iter([False] * 6)
    monkeypatch.setattr(Interrupt, 'should_stop', lambda self, also: next(steps, True))
    monkeypatch.setattr(Interrupt, 'reason', 'SIGTERM')
    with pytest.raises(SystemExit) as left:
        train(configure(images, tmp_path / 'run', snap='1'))
    assert left.value.code == 75
    assert {'network-snapshot-000000-028.pkl', 'fakes000000-028.png'} <= {
        path.name for path in (tmp_path / 'run').iterdir()}
    (entry,) = [entry for entry in read_manifest(tmp_path / 'run') if entry.nimg == 28]
    assert set(entry.files) == {'state', 'networks'}
    assert 'stopped (SIGTERM) at 0.0 kimg' in (tmp_path / 'run' / 'progress.html').read_text()
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith('Stopped: network-snapshot-000000-028.pkl, progress.html')
    assert last[1].startswith(f'Next: python train.py --resume={tmp_path}/run; or python generate.py --net')


def test_a_run_that_fails_says_so_on_its_page(images, tmp_path, monkeypatch):
    leave_out_images(lambda place, name, value: name != 'plot' and monkeypatch.setattr(place, name, value))

    def fail(*_):
        raise RuntimeError('no such kernel')
    config = configure(images, tmp_path / 'run')
    with pytest.raises(RuntimeError, match='kernel'), pytest.MonkeyPatch.context() as patch:
        steps = iter([training_loop.run_iteration] * 5)
        patch.setattr(training_loop, 'run_iteration', lambda *args: next(steps, fail)(*args))
        train(config)
    assert 'ended by an error at 0.0 kimg' in (tmp_path / 'run' / 'progress.html').read_text()


def test_the_options_and_layers_are_printed_if_asked_for(images, tmp_path, capsys, no_sheets, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sheet, 'CPU_GRID_IMAGES', 12)
    run(configure(images, tmp_path / 'run', 0.004, verbose=True))
    assert capsys.readouterr().out.count('Total') == 2
