# SPDX-License-Identifier: Apache-2.0
"""Tiny runs in processes of their own, which tests kill, continue and compare."""
import dataclasses
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch

from dnnlib import cli
from torch_utils import distributed
from training import training_loop
from training.config import DatasetInfo, resolve
from training.report import sheet
from training.run import log
from training.run.manifest import read_manifest
from training.run.resume import find_state
from training.run.snapshots import read_state

NUM_IMAGES = 12
# Imports half of PyTorch, which no child needs to do again.
torch.optim.Adam([torch.zeros(1)])
# What a clock decides.
CLOCK = ('Timing/', 'Resources/', 'timestamp')


def write_images(folder, side=8):
    """Twelve RGB images of side x side."""
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, [side, side, 3], dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f'{i:02d}.png')
    return folder


def configure(images, run_dir, *, steps=40, steps_per_tick=5, batch=4, side=8, **flags):
    """A run of so many steps of `batch` images, with ADA, style mixing and path lengths."""
    info = DatasetInfo(str(images), NUM_IMAGES, side, side, 3, has_labels=False, label_dim=0)
    flags = {'outdir': 'unused', 'data': str(images), 'cfg': 'demo', 'batch': batch, 'batch_gpu': 2,
             'cbase': 4 * side, 'cmax': 4, 'device': 'cpu', 'metrics': 'none', 'workers': 0, 'cache': 'off',
             'snap': '1', **flags}
    config = resolve(flags, info)
    Path(run_dir).mkdir(exist_ok=True)
    loss = dataclasses.replace(config.loss, pl_weight=2, style_mixing_prob=0.9)
    return dataclasses.replace(
        config, run_dir=str(run_dir), total_kimg=steps * batch / 1000,
        kimg_per_tick=steps_per_tick * batch / 1000,
        loss=loss, ada_kimg=0.5)


def request_for(run_dir):
    """To go on from the latest snapshot, if there is one."""
    return find_state(str(run_dir), None)[0] if read_manifest(run_dir) else None


def start(config, request=None, before=None):
    """Train in a process of its own; its id. Whatever it prints goes to output.txt beside the run."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        handle = os.open(config.run_dir + '.output.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        out = io.TextIOWrapper(os.fdopen(os.dup(1), 'wb', 0), write_through=True)
        sys.stdout = sys.stderr = out
        leave_out_images()
        if before is not None:
            before()
        status = run_to_status(config, request)
    finally:
        os._exit(status)


def leave_out_images(replace=setattr):
    """Curves and large sheets would take more time than the training.

    replace: as setattr, which nothing undoes.
    """
    replace(sheet, 'CPU_GRID_IMAGES', 12)
    replace(log.RunLog, 'plot', lambda self, state='': None)
    replace(log, 'open_sinks', lambda *args, **kwargs: [])
    replace(training_loop.Training, '_describe_networks', lambda self: None)


def train_briefly(config, request):
    """train() in a process that knows nothing of leave_out_images()."""
    leave_out_images()
    training_loop.train(config, request)


def run_to_status(config, request=None):
    """Train as train.py would; its exit status."""
    def callback():
        if config.num_gpus == 1:
            training_loop.train(config, request)
        else:
            # Started afresh, each process would import PyTorch for seconds.
            distributed.START_METHOD = 'fork'
            distributed.launch(train_briefly, (config, request), config.num_gpus)
    command = click.Command('train', callback=callback)
    try:
        cli.run_command(command, [])
    except SystemExit as error:
        return error.code or 0
    return 0


def finish(pid, timeout_sec=60):
    """Wait for a process: its exit status, negative for a signal."""
    deadline = time.monotonic() + timeout_sec
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError('the run did not end')


def last_nimg(config):
    """Images at the latest snapshot, 0 without one."""
    return max((entry.nimg for entry in read_manifest(config.run_dir)), default=0)


def kill_after_progress(config, delay_sec, number=signal.SIGKILL):
    """Start or continue a run, wait for its next snapshot and then for so long, and send it a signal.

    Its exit status.
    """
    before = last_nimg(config)
    pid = start(config, request_for(config.run_dir))
    deadline = time.monotonic() + 60
    while last_nimg(config) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay_sec)
    if number == signal.SIGKILL:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
    return finish(pid)


def output(config):
    """What the processes of a run have printed."""
    return Path(config.run_dir + '.output.txt').read_text()


def final_state(run_dir):
    """The training state of the latest snapshot, without what a clock decides."""
    payload = read_state(find_state(str(run_dir), None)[0].state_path)
    payload['loop'].pop('elapsed_sec')
    payload['extra'].pop('statistics')
    payload['config'].pop('run_dir')
    return payload


def stats_lines(run_dir):
    """The lines of stats.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in Path(run_dir, 'stats.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]


def equal(a, b):
    """Whether two nested structures are the same, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
