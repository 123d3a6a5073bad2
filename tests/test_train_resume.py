# SPDX-License-Identifier: Apache-2.0
"""train.py --resume: the command line of a run that goes on. The training itself is replaced."""
import functools
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from small_networks import small_discriminator, small_generator

import train
from metrics.data_key import training_key
from training import config as cfg
from training.capacity import dry_run
from training.dataset import ImageFolderDataset
from training.formats import convert
from training.formats.pickled import HostCopies
from training.run import resume
from training.run.folder import FLAGS_FILE, LOCK_FILE, RunLock, read_flags, save_options
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload
from training.systems import dcgan


@pytest.fixture
def started(monkeypatch):
    """The arguments of each training that was started."""
    from training import training_loop
    calls = []
    monkeypatch.setattr(training_loop, 'train', lambda *args: calls.append(args))
    return calls


@pytest.fixture
def run(capsys, tmp_path):
    """Run the command on four images: (exit status, stdout, stderr)."""
    data = tmp_path / 'pics'
    data.mkdir()
    for i in range(4):
        Image.new('RGB', (32, 32)).save(data / f'{i}.png')

    def run(*args, **kwargs):
        try:
            train.main([arg.format(data=data, out=tmp_path / 'out') for arg in args])
            status = 0
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()
    return run


NEW = ('--outdir={out}', '--data={data}', '--cfg=demo', '--gamma=3', '--device=cpu')


@pytest.fixture
def folder(run, started, tmp_path):
    """A run with a snapshot."""
    assert run(*NEW)[0] == 0
    (config,) = started.pop()
    payload = make_payload(config.for_device('cpu').to_options(), {'cur_nimg': 4000}, {'tick': 2}, {})
    writer = SnapshotWriter(config.run_dir)
    writer.save(Snapshot(4000, payload, HostCopies()))
    writer.wait()
    return tmp_path / 'out' / '00000-pics-demo-gamma3'


@pytest.mark.parametrize('args', [
    ('--outdir={out}', '--resume=latest'), ('--resume={out}/00000-pics-demo-gamma3',),
    ('--resume={out}/00000-pics-demo-gamma3/training-state-000004.pt',), (*NEW, '--resume=latest')])
def test_a_run_goes_on_in_its_folder_with_its_options(folder, run, started, args):
    status, stdout, stderr = run(*args)
    assert status == 0, stderr
    config, request = started[0]
    assert config.run_dir == str(folder) and config.loss.r1_gamma == 3
    assert request.state_path.endswith('training-state-000004.pt')
    assert 'Resuming from' in stdout and 'Fine-tuning' not in stdout
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


def test_options_that_may_change_do_and_are_remembered(folder, run, started):
    assert run('--resume={out}/' + folder.name, '--kimg=99', '--keep=2')[0] == 0
    save_options(started[0][0], started[0][1].flags)
    assert run('--resume={out}/' + folder.name, '--time-limit=1h')[0] == 0
    assert [c.total_kimg for c, _ in started] == [99, 99] and started[1][0].keep == 2
    # Saved by the training, once it has locked the folder.
    assert started[1][1].flags['time_limit'] == '1h' and started[1][1].flags['gamma'] == 3


def test_options_that_may_not_change_are_refused_before_anything_is_written(folder, run, started):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    status, _, stderr = run('--resume={out}/' + folder.name, '--gamma=5', '--kimg=99')
    assert status == 2
    assert stderr.startswith('Error: --resume: training would change because of --gamma (')
    assert stderr.count('\n') == 1 and not started
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert run('--resume={out}/' + folder.name, '--gamma=5', '--allow-changes=1')[0] == 0
    assert started[0][0].loss.r1_gamma == 5
    # Allowed once is not allowed for ever.
    save_options(started[0][0], started[0][1].flags)
    assert 'allow_changes' not in read_flags(folder)


def test_networks_that_a_run_started_from_stay_a_part_of_it(run, started, tmp_path):
    source = tmp_path / 'net.pkl'
    source.write_bytes(b'')
    assert run(*NEW, f'--resume={source}')[0] == 0
    config = started.pop()[0]
    writer = SnapshotWriter(config.run_dir)
    payload = make_payload(config.for_device('cpu').to_options(), {'cur_nimg': 4}, {'tick': 1}, {})
    writer.save(Snapshot(4, payload, HostCopies()))
    writer.wait()
    assert run('--outdir={out}', '--resume=latest')[0] == 0
    assert started[0][0].resume_pkl == str(source) and started[0][0].ada_kimg == config.ada_kimg == 100


def test_latest_without_a_run_starts_one(run, started):
    status, stdout, stderr = run(*NEW, '--resume=latest')
    assert status == 0, stderr
    assert 'this is a new one' in stdout and len(started[0]) == 1
    assert started[0][0].run_dir.endswith('00000-pics-demo-gamma3')


def test_latest_waits_for_no_run_that_has_just_begun_but_names_it(folder, run, started, monkeypatch):
    begun = folder.with_name('00001-new')
    begun.mkdir()
    (begun / LOCK_FILE).write_text('')
    # Its program is dead.
    assert run('--outdir={out}', '--resume=latest')[0] == 0 and started.pop()[0].run_dir == str(folder)
    monkeypatch.setattr(resume, 'RunLock', functools.partial(RunLock, wait_sec=0))
    monkeypatch.setattr(RunLock, '_try', lambda self: False)
    status, _, stderr = run('--outdir={out}', '--resume=latest')
    assert status == 2 and not started and stderr.count('\n') == 1
    assert stderr.startswith('Error: --resume=latest: ') and 'name its directory' in stderr
    assert '00001-new' in stderr


@pytest.mark.parametrize('resume, message', [
    ('nowhere', 'no such folder'), ('x.pt', 'no such file'), ('{data}', 'no complete snapshot')])
def test_what_cannot_go_on_is_explained_in_one_line(run, started, resume, message):
    status, _, stderr = run(*NEW, f'--resume={resume}')
    assert status == 2 and message in stderr and stderr.count('\n') == 1 and not started


def test_a_dry_run_says_where_it_would_go_on(folder, run, started, monkeypatch):
    monkeypatch.setattr(dry_run, 'summarise_needs', lambda *_: '')
    before = sorted(p.stat().st_mtime_ns for p in folder.iterdir())
    status, stdout, _ = run('--resume={out}/' + folder.name, '-n')
    assert status == 0 and 'training-state-000004.pt' in stdout and stdout.endswith('Dry run; exiting.\n')
    assert sorted(p.stat().st_mtime_ns for p in folder.iterdir()) == before and not started


@pytest.mark.parametrize('value, is_run', [
    ('latest', True), ('runs/00003-x', True), ('a/training-state-000004.pt', True), ('noresume', False),
    ('ffhq256', False), ('emoji32', False), ('a.pkl', False), ('A.PKL', False),
    ('https://example.com/net', False)])
def test_runs_are_told_from_networks_by_the_value_alone(value, is_run):
    assert cfg.continues(value) == is_run


# --- Weights of any network file

@pytest.mark.parametrize('name', ['net.pt', 'net.safetensors', 'net.pkl', 'net', 'net.ckpt'])
def test_any_network_file_starts_a_run_and_stays_alone(name, run, started, tmp_path):
    place = tmp_path / 'elsewhere'
    place.mkdir()
    kind = convert.check_suffix(name) if name.endswith(('.pt', '.safetensors')) else '.pkl'
    contents = {'G_ema': small_generator(img_resolution=32), 'D': small_discriminator(img_resolution=32)}
    convert.write(place / f'x{kind}', contents, convert.Choices())
    source = (place / f'x{kind}').rename(place / name)
    for flag in ('-n', None):
        status, stdout, stderr = run(*NEW, f'--resume={source}', *([flag] if flag else []))
        assert status == 0, stderr
        assert f'with the weights of {source}' in stdout and 'Resuming' not in stdout
    assert started[0][0].resume_pkl == str(source) and len(started[0]) == 1
    assert list(place.iterdir()) == [source]


def test_a_training_state_beside_no_run_is_taken_for_its_weights(folder, run, started, tmp_path):
    place = tmp_path / 'elsewhere'
    place.mkdir()
    for name in ('training-state-000004.pt', 'renamed.pt'):
        copied = shutil.copy(folder / 'training-state-000004.pt', place / name)
        assert cfg.continues(str(folder / 'training-state-000004.pt')) and not cfg.continues(str(copied))
        shutil.copy(copied, folder / name)
        assert cfg.continues(str(folder / name)), 'beside its run it continues it, whatever its name'
    (folder / 'weights.pt').write_bytes(b'PK')
    assert not cfg.continues(str(folder / 'weights.pt'))


@pytest.mark.parametrize('content, message', [
    (None, 'cannot be read'), (b'<html>', 'an HTML page'), (b'', 'an empty file'),
    (b'\x80\x04}.', 'holds no networks')])
def test_a_dry_run_refuses_the_file_that_the_run_would_refuse(content, message, run, tmp_path):
    source = tmp_path / 'net.pkl'
    if content is not None:
        source.write_bytes(content)
    status, stdout, stderr = run(*NEW, f'--resume={source}', '-n')
    assert status == 2 and message in stderr and 'Dry run; exiting' not in stdout


def test_a_dry_run_refuses_networks_of_which_nothing_fits(run, tmp_path):
    G = dcgan.DCGANGenerator(z_dim=8, img_resolution=32, img_channels=3, ngf=2)
    convert.write(tmp_path / 'net.pkl', {'G_ema': G}, convert.Choices())
    assert 'nothing in DCGANGenerator fits' in run(*NEW, f'--resume={tmp_path / "net.pkl"}', '-n')[2]


def test_a_dry_run_says_which_weights_it_could_not_check(run, tmp_path):
    for source in (f'{tmp_path}/absent/net.pkl', 'https://example.com/net.pkl'):
        status, stdout, _ = run(*NEW, f'--resume={source}', '-n')
        assert status == 0 and f'--resume={source} is not on this machine and was not checked' in stdout


# --- Files of another type, other data

@pytest.mark.parametrize('text', [
    '[]', '3', '{"gamma": "high"}', '{"gamma": [1]}', '{"cond": 1}', '{"nonsense": 1}', '[' * 100_000,
    '\x80'])
def test_flags_of_another_type_are_refused_in_one_line(folder, run, started, text):
    (folder / FLAGS_FILE).write_bytes(text.encode('latin1'))
    status, _, stderr = run('--resume={out}/' + folder.name)
    assert status == 2 and not started and stderr.count('\n') == 1
    assert stderr.startswith('Error: --resume: ') and 'training_flags.json cannot be used' in stderr


@pytest.mark.parametrize('text', ['[]', '{"G_kwargs": 3}', '[' * 100_000, '\x80', ''])
def test_options_in_the_folder_do_not_matter_as_the_state_has_them(folder, run, started, text):
    (folder / 'training_options.json').write_bytes(text.encode('latin1'))
    assert run('--resume={out}/' + folder.name)[0] == 0
    assert started[0][0].loss.r1_gamma == 3


@pytest.mark.parametrize('change', ['images', 'labels'])
def test_other_data_is_refused_or_said(run, started, tmp_path, change, folder_with_key):
    folder, data = folder_with_key
    assert run('--resume={out}/' + folder.name)[0] == 0 and len(started) == 1
    if change == 'images':
        # As many, of the same names and sizes.
        (data / '0.png').write_bytes((data / '1.png').read_bytes())
    else:
        write_labels(data, [1, 0, 0, 1])
    for extra in ([], ['-n']):
        status, _, stderr = run('--resume={out}/' + folder.name, *extra)
        assert status == 2 and 'other images or labels' in stderr and stderr.count('\n') == 1
    assert len(started) == 1
    status, stdout, _ = run('--resume={out}/' + folder.name, '--allow-changes=1')
    assert status == 0 and 'Note: --data holds other images or labels than before' in stdout
    assert started[1][1].data_key != started[0][1].data_key


def write_labels(data, labels):
    table = [[f'{i}.png', label] for i, label in enumerate(labels)]
    (data / 'dataset.json').write_text(json.dumps({'labels': table}))


@pytest.fixture
def folder_with_key(run, started, tmp_path):
    """(a conditional run with a snapshot that knows its data, the data)."""
    data = tmp_path / 'pics'
    for i in range(4):
        Image.new('L', (32, 32), 10 * i).save(data / f'{i}.png')
    write_labels(data, [0, 0, 1, 1])
    assert run(*NEW, '--cond=1')[0] == 0
    (config,) = started.pop()
    key = training_key(ImageFolderDataset(**config.data.kwargs()))
    writer = SnapshotWriter(config.run_dir)
    options = config.for_device('cpu').to_options()
    payload = make_payload(options, {'cur_nimg': 4}, {'tick': 1}, {'data_key': key})
    writer.save(Snapshot(4, payload, HostCopies()))
    writer.wait()
    return Path(config.run_dir), data
