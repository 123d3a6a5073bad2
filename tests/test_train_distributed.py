# SPDX-License-Identifier: Apache-2.0
"""train.py under torchrun, with real processes: restarts, machines, failures."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from resume_cases import equal, final_state, write_pictures
from source_tree import ROOT

from training.manifest import read_manifest

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
# 21 steps in five ticks, with a snapshot at the end of each.
OPTIONS = ['--cfg=demo', '--batch=48', '--batch-gpu=12', '--kimg=1', '--tick=0.2', '--snap=1', '--cbase=32',
           '--cmax=4', '--device=cpu', '--metrics=none', '--workers=0', '--cache=off', '--timeout=60']
ALONE = ['--standalone', '--nproc-per-node=2']


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp('pictures'))


class Launch:
    """torchrun with train.py, in a session of its own, with everything it prints in a file."""

    def __init__(self, folder, pictures, launcher, *options):
        self.folder, self.log = folder, folder.with_suffix('.txt')
        command = [*TORCHRUN, *launcher, str(ROOT / 'tests/launched_train.py'), f'--outdir={folder}',
                   f'--data={pictures}', *OPTIONS, *options]
        with self.log.open('a') as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})

    def status(self, timeout_sec=120):
        try:
            return self.process.wait(timeout_sec)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def output(self):
        return self.log.read_text()

    def run_dir(self):
        (folder,) = self.folder.iterdir()
        return folder

    def wait_for_snapshots(self, count):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if any(len(read_manifest(f)) >= count for f in self.folder.glob('0*-*')):
                return
            time.sleep(0.01)
        raise AssertionError(self.output())

    def workers(self):
        """Process numbers of the training processes."""
        found = subprocess.run(['ps', '-o', 'pid=,args=', '--ppid', str(self.process.pid)],
                               capture_output=True, text=True, check=True).stdout.splitlines()
        return [int(line.split()[0]) for line in found if 'launched_train' in line]


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def whole(pictures, tmp_path_factory):
    """The end of a run that nobody disturbed, of two machines with a process each."""
    folder = tmp_path_factory.mktemp('machines') / 'runs'
    node = ['--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d', '--rdzv-id=test',
            f'--rdzv-endpoint=localhost:{free_port()}']
    first, second = [Launch(folder, pictures, node) for _ in range(2)]
    assert (first.status(), second.status()) == (0, 0), first.output()
    assert first.output().count('Output directory:') == 1 and 'Training on 2 x the CPU' in first.output()
    return final_state(first.run_dir())


def assert_same_end(run_dir, whole):
    found = final_state(run_dir)
    for key in whole['run']:
        assert equal(found['run'][key], whole['run'][key]), f'{key} differs'


def test_a_killed_process_of_torchrun_is_started_again_and_the_run_is_the_same(pictures, whole, tmp_path):
    launch = Launch(tmp_path / 'runs', pictures, [*ALONE, '--max-restarts=1'])
    launch.wait_for_snapshots(2)
    os.kill(launch.workers()[1], signal.SIGKILL)
    assert launch.status() == 0, launch.output()
    assert 'Started again by the launcher' in launch.output() and 'Going on from' in launch.output()
    assert_same_end(launch.run_dir(), whole)


def test_what_is_wrong_is_said_once_and_nothing_is_created(pictures, tmp_path):
    launch = Launch(tmp_path / 'runs', pictures, ALONE, '--gpus=3')
    assert launch.status() == 1
    lines = [line for line in launch.output().splitlines() if line.startswith('Error')]
    assert lines == ['Error: --gpus=3, but the launcher started 2 processes; leave --gpus out']
    assert not (tmp_path / 'runs').exists()
