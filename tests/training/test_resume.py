# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and continued is, to the bit, the run that was not."""
import os
import random
import signal
import time

import pytest
import torch
from resume_cases import (
    configure,
    equal,
    final_state,
    finish,
    kill_after_progress,
    last_nimg,
    output,
    request_for,
    run_to_status,
    start,
    stats_lines,
    write_images,
)

from dnnlib.launched import STOPPED
from dnnlib.util import UserError
from training.run import interrupt
from training.run.manifest import read_manifest
from training.run.resume import find_state
from training.run.snapshots import read_state

KILLS = 4
KILLS_OF_TWO = 2


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert finish(start(configure(images, folder))) == 0
    return folder


def assert_same_run(folder, whole):
    found, expected = final_state(folder), final_state(whole)
    for key in expected['run']:
        assert equal(found['run'][key], expected['run'][key]), f'{key} differs'
    assert found['loop'] == expected['loop']
    assert stats_lines(folder) == stats_lines(whole)
    for path in whole.glob('fakes*.png'):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(images, whole, tmp_path, workers):
    config = configure(images, tmp_path / 'run', workers=workers)
    rng = random.Random(workers)
    for _ in range(KILLS):
        assert kill_after_progress(config, rng.uniform(0, 0.15)) == -signal.SIGKILL
    assert finish(start(config, request_for(config.run_dir))) == 0, output(config)
    assert output(config).count('Resuming from') == KILLS
    assert_same_run(tmp_path / 'run', whole)


def test_two_processes_killed_together_end_like_two_that_were_not(images, tmp_path):
    folders = tmp_path / 'whole', tmp_path / 'killed'
    first, second = (configure(images, f, gpus=2, steps=20, steps_per_tick=4) for f in folders)
    assert finish(start(first)) == 0, output(first)
    rng = random.Random(2)
    for _ in range(KILLS_OF_TWO):
        assert kill_after_progress(second, rng.uniform(0, 0.3)) == -signal.SIGKILL
    assert finish(start(second, request_for(second.run_dir))) == 0, output(second)
    assert_same_run(folders[1], folders[0])


def test_a_run_that_is_asked_to_stop_saves_itself_within_a_tick(images, whole, tmp_path):
    config = configure(images, tmp_path / 'run')
    moments = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        assert kill_after_progress(config, 0.07, number) == STOPPED
        moments.append(last_nimg(config))
    assert finish(start(config, request_for(config.run_dir))) == 0, output(config)
    # Otherwise this was no test of stopping inside a tick.
    assert any(nimg % 20 != 4 for nimg in moments), moments
    assert_same_run(tmp_path / 'run', whole)


def test_a_time_limit_stops_a_run_in_the_same_way(images, tmp_path):
    config = configure(images, tmp_path / 'run', steps=100000, time_limit='1s', snap='1000')
    assert finish(start(config)) == STOPPED
    assert '--time-limit' in output(config) and '--resume=latest resumes from here' in output(config)
    assert read_manifest(config.run_dir)


def test_a_second_signal_stops_at_once(images, tmp_path):
    config = configure(images, tmp_path / 'run', steps=100000)
    pid = start(config, before=never_stop)
    time.sleep(1)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    assert finish(pid) == 130
    assert 'Stopped at once' in output(config)


def never_stop():
    interrupt.SAME_REQUEST_SEC = 0.0
    interrupt.Interrupt.should_stop = lambda self, device=None: False


def test_what_was_written_after_the_snapshot_is_taken_back(images, whole, tmp_path):
    config = configure(images, tmp_path / 'run', steps=20)
    assert finish(start(config)) == 0
    request = request_for(config.run_dir)
    with open(tmp_path / 'run' / 'stats.jsonl', 'a') as file:
        file.write(stats_file_line(tick=9) + '\n' + stats_file_line(tick=10)[:30])
    longer = configure(images, tmp_path / 'run')
    assert finish(start(longer, request)) == 0, output(longer)
    assert_ticks(tmp_path / 'run', whole)


def stats_file_line(tick):
    return f'{{"Progress/tick": {{"num": 1, "mean": {tick}, "std": 0}}, "timestamp": 1}}'


def assert_ticks(folder, reference):
    # The tick that ended the short run ended early, so that later ones are shifted; none is there twice.
    ticks = [line['Progress/tick']['mean'] for line in stats_lines(folder)]
    assert ticks == list(range(len(ticks))) and len(ticks) >= len(stats_lines(reference))


def test_other_options_are_refused_by_name_unless_allowed(images, tmp_path):
    config = configure(images, tmp_path / 'run', steps=5)
    assert finish(start(config)) == 0
    request = request_for(config.run_dir)
    other = configure(images, tmp_path / 'run', steps=10, gamma=3.0)
    with pytest.raises(UserError, match=r'--gamma \(loss\.r1_gamma was 1, now 3\.0\)'):
        request.fit(other, 'cpu', ('gamma',))
    assert finish(start(request.fit(other, 'cpu', ('gamma', 'allow_changes')), request)) == 0, output(config)
    assert read_manifest(config.run_dir)[-1].nimg == 40


def test_a_damaged_state_is_passed_over_and_said_so(images, tmp_path):
    config = configure(images, tmp_path / 'run', steps=20)
    assert finish(start(config)) == 0
    last, before = [tmp_path / 'run' / e.files['state'].name for e in read_manifest(config.run_dir)[:-3:-1]]
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    request, notes = find_state(config.run_dir, None)
    assert request.state_path == str(before) and len(notes) == 1 and last.name in notes[0]
    assert torch.is_tensor(read_state(before)['run']['pl_mean'])


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_to_the_bit_with_deterministic_algorithms(tmp_path, monkeypatch):
    # In this process, because a process that has looked for a GPU cannot be forked. Of the augmentations only
    # those that have deterministic gradients, and a side at which their samples lie on pixels.
    side = 32
    (tmp_path / 'images').mkdir()
    images = write_images(tmp_path / 'images', side)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        folders = tmp_path / 'whole', tmp_path / 'parts'
        whole, parts = (configure(images, folder, side=side, device='cuda', augpipe='blit', nobench=True)
                        for folder in folders)
        assert run_to_status(whole) == 0
        for _ in range(3):
            assert run_until(parts, 11) == STOPPED
        assert run_to_status(parts, request_for(parts.run_dir)) == 0
        assert_same_run(folders[1], folders[0])
    finally:
        torch.use_deterministic_algorithms(mode=False)


def run_until(config, count):
    """Start or continue a run and stop it after so many steps."""
    steps = iter(range(count - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrupt.Interrupt, 'should_stop', lambda self, device=None: next(steps, None) is None)
        return run_to_status(config, request_for(config.run_dir))
