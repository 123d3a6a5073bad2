# SPDX-License-Identifier: Apache-2.0
"""The demo's own part: which programs it runs, on what, and what it says."""
import contextlib
import os
import subprocess

import pytest

from dnnlib.launched import STOPPED
from scripts import demo


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The programs that the demo runs; training leaves a run folder with two snapshots."""
    made = []

    def pretend(script, *args):
        made.append((script, args))
        if script == 'train.py':
            folder = tmp_path / '00003-emoji32-cond-demo'
            folder.mkdir()
            for i, name in enumerate(['network-snapshot-000016.pkl', 'network-snapshot-000008.pkl']):
                (folder / name).touch()
                os.utime(folder / name, (2 - i, 2 - i))
    monkeypatch.setattr(demo, 'OUTDIR', tmp_path)
    monkeypatch.setattr(demo, 'run', pretend)
    return made


def test_it_trains_and_generates_from_the_newest_network_of_the_newest_run(calls, tmp_path, capsys):
    old = tmp_path / '00002-emoji32-cond-demo'
    old.mkdir()
    os.utime(old, (1, 1))
    demo.main([])
    (train, train_args), (generate, generate_args) = calls
    assert train == 'train.py' and '--data=emoji32' in train_args and '--cfg=demo' in train_args
    assert generate == 'generate.py' and '--grid' in generate_args
    network = tmp_path / '00003-emoji32-cond-demo' / 'network-snapshot-000016.pkl'
    assert f'--network={network}' in generate_args
    text = capsys.readouterr().out
    folder = os.path.relpath(network.parent)
    assert f'{folder}/generated/grid.png' in text and f'{folder}/training_curves.png' in text
    # The network is conditional, so that the printed command needs a class.
    assert '--class=6 --seeds=1000-1099' in text


@pytest.mark.parametrize(('error', 'code'), [
    (subprocess.CalledProcessError(2, 'train.py'), 2), (KeyboardInterrupt(), 'Stopped.')])
def test_it_ends_with_the_status_of_what_failed(monkeypatch, error, code):
    def fail(*_):
        raise error
    monkeypatch.setattr(demo, 'run', fail)
    with pytest.raises(SystemExit) as caught:
        demo.main([])
    assert caught.value.code == code


def test_help_explains_and_a_wrong_option_is_refused_without_training(calls, capsys):
    for argument, code in (('--help', 0), ('--kimg=1', 2)):
        with pytest.raises(SystemExit) as caught:
            demo.main([argument])
        assert caught.value.code == code
    assert calls == [] and 'demo-run' not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main(['--help'])
    assert 'five minutes' in capsys.readouterr().out


@pytest.mark.parametrize(('status', 'is_failure'), [(0, False), (STOPPED, False), (1, True)])
def test_only_a_training_that_the_clock_has_stopped_may_end_early(monkeypatch, status, is_failure):
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, status))
    with pytest.raises(subprocess.CalledProcessError) if is_failure else contextlib.nullcontext():
        demo.run('train.py')


def test_a_program_that_fails_is_noticed():
    with pytest.raises(subprocess.CalledProcessError):
        demo.run('train.py', '--no-such-option')
