# SPDX-License-Identifier: Apache-2.0
"""The demo's own part: which programs it runs, on what, and what it says."""
import contextlib
import importlib
import os
import re
import shlex
import subprocess

import numpy as np
import pytest
from PIL import Image

from dnnlib.launched import STOPPED
from scripts import demo

SMALL = ('--data=smileys', '--mirror=1', '--cfg=demo', '--kimg=1', '--batch=64', '--cbase=64', '--cmax=4',
         '--aug=noaug', '--metrics=none', '--workers=0', '--time-limit=170s')


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The programs that the demo runs; training leaves a run folder with two snapshots."""
    made = []

    def pretend(script, *args):
        made.append((script, args))
        if script == 'train.py':
            folder = tmp_path / '00003-smileys-mirror-demo'
            folder.mkdir()
            for i, name in enumerate(['network-snapshot-000016.pkl', 'network-snapshot-000008.pkl']):
                (folder / name).touch()
                os.utime(folder / name, (2 - i, 2 - i))
        else:
            folder = tmp_path / '00003-smileys-mirror-demo' / 'generated'
            folder.mkdir()
            for i in range(36):
                Image.new('RGB', (32, 32), (i, 0, 0)).save(folder / f'seed{i:04d}.png')
    monkeypatch.setattr(demo, 'OUTDIR', tmp_path)
    monkeypatch.setattr(demo, 'run', pretend)
    return made


def test_it_trains_and_generates_from_the_newest_network_of_the_newest_run(calls, tmp_path, capsys):
    old = tmp_path / '00002-smileys-mirror-demo'
    old.mkdir()
    os.utime(old, (1, 1))
    demo.main([])
    (train, train_args), (generate, generate_args) = calls
    assert train == 'train.py' and {'--data=smileys', '--mirror=1', '--cfg=demo'} <= set(train_args)
    assert generate == 'generate.py' and '--seeds=0-35' in generate_args
    network = tmp_path / '00003-smileys-mirror-demo' / 'network-snapshot-000016.pkl'
    assert f'--network={network}' in generate_args
    assert os.path.relpath(network.parent / 'sheet.png') in capsys.readouterr().out


def test_the_sheet_shows_real_images_beside_generated_ones(calls, tmp_path):
    demo.main([])
    sheet = np.asarray(Image.open(tmp_path / '00003-smileys-mirror-demo' / 'sheet.png'))
    side, margin = 32 * demo.SCALE, demo.MARGIN_PX
    middle = margin + side // 2
    reals, fakes = (sheet[middle:middle + 6 * side:side, left + side // 2:left + 6 * side:side]
                    for left in (margin, 2 * margin + 6 * side))
    assert fakes[:, :, 0].flatten().tolist() == list(range(36)) and not fakes[:, :, 1:].any()
    assert len(np.unique(reals.reshape(36, 3), axis=0)) > 10


def run_line(line):
    """Run a printed command line in this process; its exit status."""
    script, *args = shlex.split(line)[1:]
    assert os.path.isfile(script)
    with pytest.raises(SystemExit) as left:
        importlib.import_module(os.path.basename(script).removesuffix('.py')).main(args)
    return left.value.code or 0


@pytest.mark.slow
def test_it_runs_as_a_whole_and_so_do_the_lines_that_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'OUTDIR', tmp_path / 'demo-run')
    monkeypatch.setattr(demo, 'TRAINING', SMALL)
    demo.main([])
    printed = capsys.readouterr().out
    for path in re.findall(r'^  (demo-run\S+)', printed, re.MULTILINE):
        assert (tmp_path / path).is_file(), path
    lines = re.findall(r'^  (\S+ \S+\.py .*)', printed, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert run_line(line.replace('--kimg=200', '--kimg=2')) == 0, line
    assert (tmp_path / 'demo-out' / 'grid.png').is_file()
    assert next(tmp_path.glob('demo-run/0*/network-snapshot-000002.pkl'))


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
    assert 'three minutes' in capsys.readouterr().out


@pytest.mark.parametrize(('status', 'is_failure'), [(0, False), (STOPPED, False), (1, True)])
def test_only_a_training_that_the_clock_has_stopped_may_end_early(monkeypatch, status, is_failure):
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, status))
    with pytest.raises(subprocess.CalledProcessError) if is_failure else contextlib.nullcontext():
        demo.run('train.py')


def test_a_program_that_fails_is_noticed():
    with pytest.raises(subprocess.CalledProcessError):
        demo.run('train.py', '--no-such-option')
