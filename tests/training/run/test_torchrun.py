# SPDX-License-Identifier: Apache-2.0
"""What a launch that starts again goes on with. The training itself is not started."""
import dataclasses
import time

import pytest
import torch

from dnnlib.util import UserError

if not torch.distributed.is_available():
    pytest.skip('torch without distributed', allow_module_level=True)

from small_run import small_config

from dnnlib.launched import STOPPED
from torch_utils.processes.rendezvous import Rendezvous
from training.formats.pickled import HostCopies
from training.run import torchrun
from training.run.folder import FLAGS_FILE, read_json, save_options
from training.run.snapshots import Snapshot, SnapshotWriter, make_payload


@pytest.fixture
def meet(monkeypatch):
    """Begin the next start of a launch, with so many processes."""
    store = torch.distributed.HashStore()

    def begin(size=2):
        name = f'start{time.monotonic_ns()}'
        meeting = Rendezvous(0, size, name, torch.distributed.PrefixStore(name, store), store)
        monkeypatch.setattr(torchrun, 'meet', lambda: meeting)
    begin()
    return begin


@pytest.fixture
def config(tmp_path):
    """A run of two processes that has just been planned."""
    config = dataclasses.replace(small_config(batch=12, batch_gpu=2, gpus=2), run_dir=str(tmp_path))
    save_options(config, {'gpus': 2, 'gamma': 3.0})
    return config


def save_snapshot(config):
    writer = SnapshotWriter(config.run_dir)
    payload = make_payload(config.to_options(), {'cur_nimg': 4000}, {'tick': 2}, {})
    writer.save(Snapshot(4000, payload, HostCopies()))
    writer.wait()


def never(_):
    raise AssertionError('a later start makes no plan of its own')


def test_a_second_start_goes_on_from_the_last_snapshot(meet, config, capsys):
    sizes = []
    assert torchrun.plan_together(lambda size: sizes.append(size) or (config, None)) == (config, None)
    save_snapshot(config)
    meet()
    again, request = torchrun.plan_together(never)
    assert sizes == [2] and again == config and request.flags is None
    assert request.state_path.endswith('training-state-000004.pt')
    assert 'Restarted by the launcher with 2 processes' in capsys.readouterr().out


def test_a_start_without_a_snapshot_begins_anew_in_the_same_folder(meet, config, tmp_path):
    torchrun.plan_together(lambda _: (config, None))
    meet()
    assert torchrun.plan_together(never) == (config, None)


def test_another_number_of_processes_is_remembered_and_said(meet, config, tmp_path, capsys):
    torchrun.plan_together(lambda _: (config, None))
    save_snapshot(config)
    meet(3)
    again, request = torchrun.plan_together(never)
    assert (again.num_gpus, again.batch_gpu, again.batch_size) == (3, 2, 12) and request is not None
    assert read_json(tmp_path / FLAGS_FILE) == {'gpus': 3, 'gamma': 3.0}
    assert 'There were 2 processes before' in capsys.readouterr().out


def test_the_time_limit_is_that_of_the_launch(meet, config, monkeypatch):
    limited = dataclasses.replace(config, time_limit_sec=100.0)
    torchrun.plan_together(lambda _: (limited, None))
    begin = time.time()
    monkeypatch.setattr(torchrun.time, 'time', lambda: begin + 60)
    meet()
    assert 39 < torchrun.plan_together(never)[0].time_limit_sec <= 40
    monkeypatch.setattr(torchrun.time, 'time', lambda: begin + 101)
    meet()
    with pytest.raises(SystemExit) as left:
        torchrun.plan_together(never)
    assert left.value.code == STOPPED


def test_a_machine_without_the_folder_of_the_run_is_named(config, tmp_path):
    torchrun.check_shared(config.run_dir, wait_sec=0)
    with pytest.raises(UserError, match=r'^--outdir: .*elsewhere does not exist on .* a shared disk$'):
        torchrun.check_shared(str(tmp_path / 'elsewhere'), wait_sec=0)


def test_a_dry_run_leaves_nothing_to_go_on_with(meet):
    assert torchrun.plan_together(lambda _: None) is None
    meet()
    assert torchrun.plan_together(lambda _: None) is None


@pytest.mark.parametrize(('batch', 'batch_gpu', 'group', 'gpus', 'expected'), [
    (32, 16, 4, 4, 8), (32, 16, 4, 1, 16), (24, 12, 4, 3, 8), (12, 6, 3, 4, 3), (12, 2, 4, 3, 2)])
def test_the_batch_is_split_anew_with_the_same_groups(batch, batch_gpu, group, gpus, expected):
    config = small_config(batch=batch, batch_gpu=batch_gpu, gpus=2)
    config = dataclasses.replace(config, D=dataclasses.replace(config.D, mbstd_group_size=group))
    found = torchrun.fit_layout(config, gpus)
    assert (found.num_gpus, found.batch_gpu, found.D, found.batch_size) == (gpus, expected, config.D, batch)


@pytest.mark.parametrize(('gpus', 'words'), [(3, 'is not divisible by the 3'), (16, 'groups of 4')])
def test_numbers_of_processes_that_do_not_fit_are_one_line(gpus, words):
    with pytest.raises(UserError, match=words) as caught:
        torchrun.fit_layout(small_config(batch=32, batch_gpu=16, gpus=2), gpus)
    assert '\n' not in str(caught.value)


def test_the_launcher_decides_the_number_of_processes():
    assert torchrun.with_world_size({'gpus': None, 'a': 1}, 3) == {'gpus': 3, 'a': 1}
    assert torchrun.with_world_size({'gpus': 3}, 3) == {'gpus': 3}
    with pytest.raises(UserError, match='--gpus=4, but the launcher started 3'):
        torchrun.with_world_size({'gpus': 4}, 3)
