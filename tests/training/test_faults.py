# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a run is one line each, and costs no more than it must."""
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from resume_cases import (
    configure,
    equal,
    final_state,
    finish,
    last_nimg,
    output,
    request_for,
    start,
    stats_lines,
    write_images,
)

from metrics import metric_main
from training import training_loop
from training.run import snapshots
from training.run.manifest import read_manifest
from training.run.snapshots import read_state

STEPS = 21


@pytest.fixture
def images(tmp_path):
    (tmp_path / 'images').mkdir()
    return write_images(tmp_path / 'images')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The training state that a run ends with if nothing happens."""
    folder = tmp_path_factory.mktemp('whole')
    config = configure(write_images(folder), folder / 'run', steps=STEPS)
    assert finish(start(config)) == 0, output(config)
    return final_state(config.run_dir)


@pytest.fixture
def config(images, tmp_path):
    return configure(images, tmp_path / 'run', steps=STEPS)


def assert_ends_like(whole, config):
    assert equal(final_state(config.run_dir)['run'], whole['run'])


def lines_with(config, text):
    return [line for line in output(config).splitlines() if text in line]


def fill_disk_at(counts):
    """Let the snapshots of these numbers meet a full disk, for which a limit on the size of files stands."""
    original, calls = snapshots.SnapshotWriter._write, []

    def write(self, snapshot):
        calls.append(snapshot.nimg)
        if len(calls) in counts:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        original(self, snapshot)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    snapshots.SnapshotWriter._write = write


def test_a_disk_that_is_full_for_a_while_costs_one_snapshot(config, whole):
    assert finish(start(config, before=lambda: fill_disk_at([2]))) == 0, output(config)
    assert len(lines_with(config, 'Snapshot not saved, training continues: ')) == 1
    assert 'File too large' in output(config) and 'Traceback' not in output(config)
    assert_ends_like(whole, config)


def test_a_run_whose_end_cannot_be_saved_says_so_and_can_be_continued(config, whole):
    assert finish(start(config, before=lambda: fill_disk_at(range(3, 99)))) == 2
    assert output(config).splitlines()[-1].startswith('Error: ') and '--resume=latest' in output(config)
    assert 0 < last_nimg(config) < 4 * STEPS
    assert finish(start(config, request_for(config.run_dir))) == 0, output(config)
    assert_ends_like(whole, config)


@pytest.mark.parametrize('name', ['log.txt', 'stats.jsonl'])
def test_records_that_cannot_be_opened_stop_the_start_in_one_line(config, name):
    # A folder in place of the file, because permissions do not stop root.
    Path(config.run_dir, name).mkdir()
    assert finish(start(config)) == 2
    last = output(config).splitlines()[-1]
    assert last.startswith('Error: ') and f'{name}: cannot be written' in last
    assert 'Traceback' not in output(config)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_records_that_cannot_be_written_do_not_stop_the_training(config, whole):
    for name in ('log.txt', 'stats.jsonl'):
        Path(config.run_dir, name).symlink_to('/dev/full')
    assert finish(start(config)) == 0, output(config)
    assert lines_with(config, 'stats.jsonl: cannot be written')
    # Once for each of the two streams that it copies.
    assert 1 <= len(lines_with(config, 'Logging to the file has stopped')) <= 2
    assert_ends_like(whole, config)


def workers_of(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='needs Linux')
def test_a_killed_data_worker_is_replaced(images, tmp_path, whole):
    config = configure(images, tmp_path / 'run', steps=STEPS, workers=2)
    pid = start(config)
    while last_nimg(config) == 0:
        time.sleep(0.002)
    for worker in workers_of(pid):
        os.kill(worker, signal.SIGKILL)
    assert finish(pid) == 0, output(config)
    assert len(lines_with(config, 'A data loader process died')) == 1
    assert_ends_like(whole, config)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_spoilt_after_the_start_stops_the_run_with_everything_saved(
        images, tmp_path, whole, workers):
    config = configure(images, tmp_path / 'run', steps=STEPS, workers=workers)
    original = {path: path.read_bytes() for path in images.glob('*.png')}

    def spoil():
        for path, data in original.items():
            path.write_bytes(data[:40] + b'????' + data[44:])
    assert finish(start(config, before=lambda: at_step(6, spoil))) == 2
    last = output(config).splitlines()[-1]
    assert last.startswith('Error: --data: ') and '.png cannot be decoded' in last
    assert '--resume=latest' in last
    assert last_nimg(config) >= 4 * 6
    for path, data in original.items():
        path.write_bytes(data)
    assert finish(start(config, request_for(config.run_dir))) == 0, output(config)
    assert_ends_like(whole, config)


def at_step(number, action):
    """Do something before a step."""
    original, steps = training_loop.run_iteration, []

    def run_iteration(*args):
        steps.append(1)
        if len(steps) == number:
            action()
        original(*args)
    training_loop.run_iteration = run_iteration


def fail_once(error):
    """Let the first metric fail."""
    original, calls = metric_main.calc_metric, []

    def calc_metric(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return original(*args, **kwargs)
    metric_main.calc_metric = calc_metric


@pytest.mark.parametrize('error', [
    RuntimeError('CUDA out of memory'), OSError(5, 'Input/output error')])
def test_a_metric_that_fails_once_is_tried_again_at_the_next_snapshot(
        images, tmp_path, whole, error):
    config = configure(images, tmp_path / 'run', steps=STEPS, metrics='swd')
    assert finish(start(config, before=lambda: fail_once(error))) == 0, output(config)
    assert len(lines_with(config, 'Metric swd failed')) == 1
    # One snapshot a tick, the first of which has no result.
    results = Path(config.run_dir, 'metric-swd.jsonl').read_text().splitlines()
    assert len(results) == len(stats_lines(config.run_dir)) - 1
    assert_ends_like(whole, config)


def test_metrics_that_a_kill_cut_off_are_made_up_for(images, tmp_path):
    config = configure(images, tmp_path / 'run', steps=1, metrics='swd')

    def die(self, metrics, is_untrained):
        self.writer.wait()
        os._exit(9)

    def be_killed():
        training_loop.Training._compute_metrics = die
    assert finish(start(config, before=be_killed)) == 9
    results = Path(config.run_dir, 'metric-swd.jsonl')
    assert not results.exists()
    for _ in range(2):
        assert finish(start(config, request_for(config.run_dir))) == 0, output(config)
        assert len(results.read_text().splitlines()) == 1


@pytest.mark.parametrize('kind', ['pipe', 'full'])
def test_an_output_that_is_gone_does_not_stop_the_training(config, whole, kind):
    if kind == 'full' and not os.path.exists('/dev/full'):
        pytest.skip('no device that is always full')

    def lose_output():
        read, write = os.pipe()
        os.close(read)
        sys.stdout = sys.stderr = open('/dev/full' if kind == 'full' else write, 'w')
    assert finish(start(config, before=lose_output)) == 0, output(config)
    log = Path(config.run_dir, 'log.txt').read_text()
    assert 'cannot be written to any more' in log and 'Complete: network-snapshot' in log
    assert_ends_like(whole, config)


def poison():
    """Let a weight become NaN in step 12, in the third tick of five steps."""
    original, steps = training_loop.run_iteration, []

    def run_iteration(state, *args):
        steps.append(1)
        if len(steps) == 12:
            state.G.synthesis.b4.const.data.view(-1)[0] = float('nan')
        original(state, *args)
    training_loop.run_iteration = run_iteration


def test_broken_snapshots_never_replace_sound_ones_and_the_run_stops(images, tmp_path, whole):
    config = configure(images, tmp_path / 'run', steps=40, keep=1)
    assert finish(start(config, before=poison)) == 2
    entries = read_manifest(config.run_dir)
    assert [entry.nimg for entry in entries if 'state' in entry.files] == [24, 44]
    last = Path(config.run_dir, entries[-1].files['state'].name)
    assert len(lines_with(config, 'Snapshot not saved: G.synthesis.b4.const is not finite')) == 3
    error = output(config).splitlines()[-1]
    assert error.startswith('Error: G.') and f'--resume={last} --allow-changes=1' in error
    # The remedy is there, and finite.
    assert equal(final_state(config.run_dir)['run']['cur_nimg'], 44)
    tensors = read_state(last)['run']['G_ema'].values()
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_a_run_that_ends_broken_does_not_end_well(images, tmp_path):
    config = configure(images, tmp_path / 'run', steps=13)
    assert finish(start(config, before=poison)) == 2
    assert max(entry.nimg for entry in read_manifest(config.run_dir)) == 44
