# SPDX-License-Identifier: Apache-2.0
"""Ticks: when they end, what they save, how their time is split."""
import dataclasses

import pytest
import torch
from golden_cases import index

from training.report import ticks
from training.report.ticks import (
    TickClock,
    TickReport,
    is_done,
    kimg_number,
    nimg_of_name,
    snapshot_due,
    tick_ends,
)

LOOP = index('loop_misc')


def simulate(batch_size, total_kimg, kimg_per_tick, snapshot_ticks):
    """The ticks of a run as the golden cases list them."""
    cur_nimg = tick = tick_start_nimg = 0
    found = []
    while not found or not is_done(cur_nimg, total_kimg):
        cur_nimg += batch_size
        if not tick_ends(cur_nimg, tick, tick_start_nimg, total_kimg, kimg_per_tick):
            continue
        is_due = snapshot_due(tick, is_done(cur_nimg, total_kimg), snapshot_ticks)
        found.append({'tick': tick, 'cur_nimg': cur_nimg, 'snapshot': is_due,
                      'number': kimg_number(cur_nimg) if is_due else None, 'progress': cur_nimg // 1000,
                      'tfevents_step': int(cur_nimg / 1000)})
        tick, tick_start_nimg = tick + 1, cur_nimg
    return found


@pytest.mark.parametrize('case', LOOP.get('ticks', []))
def test_golden_schedules(case):
    found = simulate(case['batch_size'], case['total_kimg'], case['kimg_per_tick'], case['snapshot_ticks'])
    assert found == case['ticks']


def test_a_run_shorter_than_a_tick_still_ends_with_a_snapshot():
    found = simulate(batch_size=400, total_kimg=1, kimg_per_tick=4, snapshot_ticks=50)
    assert [(row['cur_nimg'], row['snapshot']) for row in found] == [(400, True), (1200, True)]


def test_snapshots_can_be_switched_off():
    assert not any(row['snapshot'] for row in simulate(500, 4, 1, None))


def test_snapshots_by_minutes_come_first_last_and_when_time_has_passed():
    assert snapshot_due(0, False, None, every_minutes=30)
    assert not snapshot_due(50, False, 50, every_minutes=30, minutes=29)
    assert snapshot_due(51, False, 50, every_minutes=30, minutes=30)
    assert snapshot_due(51, True, 50, every_minutes=30, minutes=1)


@pytest.mark.parametrize('case', LOOP.get('status_lines', []))
def test_golden_status_lines_begin_our_line(case):
    names = {field.name for field in dataclasses.fields(TickReport)}
    report = TickReport(**{name: value for name, value in case.items() if name in names})
    assert report.published_line() == case['line']
    assert report.line().startswith(case['line'] + ' data 0%')


def test_the_line_says_where_the_time_went():
    report = TickReport(1, 2000, total_sec=9, sec_per_tick=6, sec_per_kimg=6, maintenance_sec=2, data_sec=2)
    assert report.line().endswith('augment 0.000 data 25% compute 50% maintenance 25%')
    assert TickReport(0, 0, 0, 0, 0, 0).line().endswith('data 0% compute 0% maintenance 0%')


def test_statistics_have_the_published_names_in_order():
    names = list(TickReport(0, 1500, 7200.0, 1, 1, 1).statistics())
    assert names[:11] == [
        'Progress/tick', 'Progress/kimg', 'Timing/total_sec', 'Timing/sec_per_tick', 'Timing/sec_per_kimg',
        'Timing/maintenance_sec', 'Resources/cpu_mem_gb', 'Resources/peak_gpu_mem_gb', 'Progress/augment',
        'Timing/total_hours', 'Timing/total_days']
    values = TickReport(0, 1500, 7200.0, 1, 1, 1).statistics()
    assert (values['Progress/kimg'], values['Timing/total_hours']) == (1.5, 2)


def test_the_clock_splits_time_into_data_training_and_maintenance(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(ticks.time, 'monotonic', lambda: now[0])

    def wait(sec):
        now[0] += sec
    clock = TickClock(cur_nimg=1000, elapsed_sec=100)
    wait(5)  # set-up
    clock.start_tick(1000)
    with clock.waiting_for_data():
        wait(1)
    wait(3)
    report = clock.end_tick(0, 3000, augment=0.25)
    assert (report.total_sec, report.sec_per_tick, report.sec_per_kimg) == (109, 4, 2)
    assert (report.maintenance_sec, report.data_sec, report.augment) == (5, 1, 0.25)
    wait(2)  # a snapshot
    clock.start_tick(3000)
    wait(1)
    report = clock.end_tick(1, 3000)
    assert (report.maintenance_sec, report.sec_per_tick, report.data_sec) == (2, 1, 0)


def test_memory_is_measured(device, monkeypatch):
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    x = torch.zeros(1 << 20, device=device)
    report = TickClock().end_tick(0, 1, device=device)
    assert 0.01 < report.cpu_mem_gb < 1000
    assert report.peak_gpu_mem_gb >= (x.numel() * 4 / 2 ** 30 if device.type == 'cuda' else 0)


def test_memory_is_0_where_nobody_tells_it(monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError
    monkeypatch.setattr(ticks.Path, 'read_text', fail)
    monkeypatch.setitem(__import__('sys').modules, 'psutil', None)
    assert ticks.resident_bytes() == 0


@pytest.mark.parametrize('nimg, is_taken, name', [
    (8, False, 'fakes000000.png'), (12480, False, 'fakes000012.png'), (12480, True, 'fakes000012-480.png'),
    (1_000_000_008, True, 'fakes1000000-008.png')])
def test_names_of_files_tell_the_images_shown(nimg, is_taken, name):
    assert f'fakes{kimg_number(nimg, is_taken)}.png' == name
    assert nimg_of_name(name, 'fakes') == (nimg if is_taken else nimg // 1000 * 1000)


@pytest.mark.parametrize('name', ['fakes_init.png', 'reals.png', 'fakes12.png', 'network-000001.pkl'])
def test_other_names_tell_nothing(name):
    assert nimg_of_name(name, 'fakes') is None
