# SPDX-License-Identifier: Apache-2.0
"""train.py --resume: the command line of a run that goes on. The training itself is replaced."""
import functools
import json

import pytest
from PIL import Image

import train
from training import config as cfg
from training.capacity import dry_run
from training.formats.pickled import HostCopies
from training.run import resume
from training.run.folder import LOCK_FILE, RunLock
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload


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
    payload = make_payload(config.to_options(), {'cur_nimg': 4000}, {'tick': 2}, {})
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
    assert request.state_path.endswith('training-state-000004.pt') and not request.allow_changes
    assert 'Resuming from' in stdout and 'Fine-tuning' not in stdout
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


def test_options_that_may_change_do_and_are_remembered(folder, run, started):
    assert run('--resume={out}/' + folder.name, '--kimg=99', '--keep=2')[0] == 0
    assert run('--resume={out}/' + folder.name, '--time-limit=1h')[0] == 0
    assert [c.total_kimg for c, _ in started] == [99, 99] and started[1][0].keep == 2
    assert started[1][1].given == {'resume', 'time_limit'}
    assert json.loads((folder / 'training_options.json').read_text())['total_kimg'] == 99


def test_options_that_may_not_change_are_refused_before_anything_is_written(folder, run, started):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    status, _, stderr = run('--resume={out}/' + folder.name, '--gamma=5', '--kimg=99')
    assert status == 2
    assert stderr.startswith('Error: --resume: training would change because of --gamma (')
    assert stderr.count('\n') == 1 and not started
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert run('--resume={out}/' + folder.name, '--gamma=5', '--allow-changes=1')[0] == 0
    assert started[0][0].loss.r1_gamma == 5 and started[0][1].allow_changes
    # Allowed once is not allowed for ever.
    assert 'allow_changes' not in json.loads((folder / train.FLAGS_FILE).read_text())


def test_networks_that_a_run_started_from_stay_a_part_of_it(run, started, tmp_path):
    source = tmp_path / 'net.pkl'
    source.write_bytes(b'')
    assert run(*NEW, f'--resume={source}')[0] == 0
    config = started.pop()[0]
    writer = SnapshotWriter(config.run_dir)
    payload = make_payload(config.to_options(), {'cur_nimg': 4}, {'tick': 1}, {})
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
