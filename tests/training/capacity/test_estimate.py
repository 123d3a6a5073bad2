# SPDX-License-Identifier: Apache-2.0
"""Estimates of memory and time: counted work against arithmetic by hand, and against a real iteration."""
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from small_run import CPU, SmallRun, small_config

from training.capacity import estimate as estimate_module
from training.capacity import speed
from training.capacity.count import Counter, Work
from training.capacity.estimate import (
    GB,
    Rehearsal,
    describe,
    device_memory,
    estimate,
    least_bytes,
    local_device,
    slow_precision,
)
from training.capacity.speed import OVERHEAD, Speed, measure_speed
from training.config import DatasetInfo, resolve

F32 = torch.float32


def preset(cfg, side, **flags):
    flags = {'cfg': cfg, 'data': 'x', 'outdir': 'x', **flags}
    return resolve(flags, DatasetInfo('x', 1000, side, side, 3, has_labels=False, label_dim=0))


def test_arithmetic_of_a_convolution_and_its_gradients_is_counted():
    with torch.device('meta'):
        x = torch.empty(2, 8, 16, 16, requires_grad=True)
        w = torch.empty(4, 8, 3, 3, requires_grad=True)
    with Counter() as counter:
        F.conv2d(x, w, padding=1).sum().backward()
    assert counter.work.total_flop == 3 * 2 * (2 * 4 * 16 * 16) * (8 * 9)
    assert counter.work.flop.keys() <= {(F32, 4), (F32, 8)}


def test_products_of_matrices_are_a_kind_of_their_own():
    x = torch.empty(3, 5, device='meta', dtype=torch.float16)
    with Counter() as counter:
        x @ x.t()
    assert counter.work.flop == {(torch.float16, 0): 2 * 3 * 3 * 5}


def test_memory_is_counted_while_it_is_alive():
    with Counter() as counter:
        a = torch.empty(1000, device='meta')
        b = a * 2
        c = b[::2]  # a view: no memory, nothing moved
        del a, b, c
        torch.empty(1500, device='meta')
    assert counter.work.peak == 4 * 2000
    assert counter.work.bytes == 4 * (1000 + 2000 + 1500)
    assert counter.work.calls == 3


def test_work_adds_up():
    work = Work({(F32, 8): 10.0}, bytes=1, calls=2, peak=7)
    work.add(Work({(F32, 8): 1.0, (F32, 0): 2.0}, bytes=3, calls=4, peak=5), 10)
    assert work == Work({(F32, 8): 20.0, (F32, 0): 20.0}, bytes=31, calls=42, peak=7)
    assert work.total_flop == 40


def test_time_is_that_of_computing_moving_and_calling():
    speed = Speed({(F32, 8): 100.0, (F32, 0): 10.0}, bytes_per_sec=1000, call_sec=0.001)
    work = Work({(F32, 8): 100.0, (F32, 4): 10.0}, bytes=2000, calls=3000)
    # A kind that was not measured is taken to be as slow as the slowest.
    assert speed.seconds(work) == pytest.approx(OVERHEAD * (1 + 1 + 2 + 3))


@pytest.mark.parametrize(('side', 'tflop'), [(256, 405), (1024, 2040)])
def test_arithmetic_of_the_large_presets_is_as_known(side, tflop):
    # Known to a few per cent, by another way of counting.
    result = estimate(preset('auto', side), 0, 3)
    assert result.flop_per_kimg / 1e12 == pytest.approx(tflop, rel=0.05)
    assert result.sec_per_kimg is None


def test_arithmetic_is_counted_with_the_intervals_of_the_phases():
    config = small_config(side=16, aug='noaug')
    often = dataclasses.replace(config, D_reg_interval=1)
    rare = dataclasses.replace(config, D_reg_interval=16)
    dreg = Rehearsal(config, 0, 3).rounds['Dreg'].total_flop / config.batch_size * 1000
    difference = [estimate(c, 0, 3).flop_per_kimg for c in (often, rare)]
    assert difference[0] - difference[1] == pytest.approx(dreg * 15 / 16)


def test_networks_without_lazy_regularisation_are_counted():
    config = dataclasses.replace(small_config(), G_reg_interval=None, D_reg_interval=None)
    assert set(Rehearsal(config, 0, 3).rounds) == {'Gboth', 'Dboth'}


def test_splitting_a_batch_costs_no_arithmetic_and_saves_memory():
    whole = preset('auto', 32)
    half = dataclasses.replace(whole, batch_gpu=whole.batch_gpu // 2)
    a, b = (estimate(config, 0, 3) for config in (whole, half))
    # Demodulation and the mapping network of style mixing do not depend on the number of images alone.
    assert a.flop_per_kimg == pytest.approx(b.flop_per_kimg, rel=0.01)
    assert 0.5 < b.memory_bytes / a.memory_bytes < 0.95


def test_16_bits_save_memory_and_augmentation_costs_some():
    full, half = preset('auto', 32, precision='fp32', aug='noaug'), preset('auto', 32, aug='noaug')
    augmented = preset('auto', 32)
    sizes = [estimate(c, 0, 3).memory_bytes for c in (half, full, augmented)]
    assert sizes[0] < sizes[1] and sizes[0] < sizes[2]


@pytest.mark.parametrize('flags', [{'aug': 'fixed', 'p': 0.3}, {'aug': 'fixed', 'p': 0.0}])
def test_fixed_augmentation_is_counted_unless_it_is_off(flags):
    calls = Rehearsal(small_config(side=16, **flags), 0, 3).rounds['Dmain'].calls
    without = Rehearsal(small_config(side=16, aug='noaug'), 0, 3).rounds['Dmain'].calls
    assert calls == without if flags['p'] == 0 else calls > without


def test_labels_and_other_shapes_are_counted():
    info = DatasetInfo('x', 10, 24, 16, 1, has_labels=True, label_dim=5)
    config = resolve({'cfg': 'demo', 'data': 'x', 'outdir': 'x', 'cond': True}, info)
    assert estimate(config, 5, 1).flop_per_kimg > 0


def test_counting_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    estimate(small_config(), 0, 3, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_of_a_real_phase_is_close_to_the_count():
    config = small_config(side=32, cbase=1024, cmax=32, batch=8, aug='noaug')
    run = SmallRun(config)
    counted = Rehearsal(config, 0, 3).rounds['Dmain'].peak
    run.step()
    real = torch.rand([8, 3, 32, 32])
    batch = estimate_module.MicroBatch(real, torch.zeros(8, 0), torch.randn(8, run.state.G.z_dim),
                                       torch.zeros(8, 0))
    with Counter() as counter:
        run.phase('Dmain').run([batch])
    # The real kernels of a CPU have temporary tensors of their own.
    assert 0.6 < counted / counter.work.peak < 1.1


def test_a_device_is_measured_in_sensible_units():
    work = Work({(F32, 16): 100.0, (F32, 0): 50.0, (F32, 64): 1.0})
    speed = measure_speed(work, CPU, batch=4)
    assert set(speed.flop_per_sec) == {(F32, 16), (F32, 0)}  # the rest hardly counts
    assert all(1e7 < rate < 1e14 for rate in speed.flop_per_sec.values())
    assert 1e7 < speed.bytes_per_sec < 1e14 and 1e-8 < speed.call_sec < 1e-2


def test_the_lines_tell_memory_speed_and_duration():
    memory, speed = describe(small_config(), 0, 3)
    assert re.search(r'memory: +about 0\.\d GB of \d+\.\d GB$', memory)
    assert re.search(r'speed: +about [\d.]+ s/kimg \([\d.e-]+ TFLOP/kimg\), \w.* for 28 kimg$', speed)


@pytest.mark.parametrize(('precision', 'half_speed', 'said'), [
    ('bf16', 0.5, '--precision=bf16: this CPU convolves in 16 bits at 0.5 times'), ('bf16', 2.0, None),
    ('fp16', 0.01, '--precision=fp16: this CPU convolves in 16 bits at 0.01 times'), ('fp32', 0.5, None),
    ('auto', 0.5, None)])
def test_16_bits_that_are_slower_than_32_on_a_cpu_are_worth_a_word(monkeypatch, precision, half_speed, said):
    asked = []

    def arithmetic(kind, device, batch):
        asked.append((kind, device, batch))
        return 1e9 * (1.0 if kind[0] == F32 else half_speed)

    monkeypatch.setattr(speed, '_arithmetic', arithmetic)
    note = slow_precision(preset('auto', 32, precision=precision, device='cpu', cbase=2048, batch=8))
    assert note is None if said is None else note.startswith(said) and note.endswith('trains faster.')
    assert all(entry[0][1] == 64 and entry[1:] == (CPU, 8) for entry in asked)
    assert bool(asked) == (precision in ('bf16', 'fp16'))


def test_16_bits_on_a_gpu_are_not_doubted(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(speed, '_arithmetic', lambda *_: pytest.fail('measured'))
    assert slow_precision(preset('auto', 32, precision='bf16')) is None


def test_datatypes_are_compared_by_real_convolutions():
    before = torch.get_rng_state()
    assert 1e-4 < speed.relative_speed(torch.bfloat16, 8, CPU, 4) < 1e2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_very_slow_operation_is_not_repeated(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(speed.time, 'perf_counter', lambda: now[0])

    def step():
        calls.append(now[0])
        now[0] += 2.0

    assert speed._seconds(step, CPU) == 2.0 and len(calls) == 2


def test_several_devices_are_said_to_need_memory_each():
    config = dataclasses.replace(small_config(batch=4, batch_gpu=2), num_gpus=2)
    memory, _ = describe(config, 0, 3)
    assert memory.endswith('on each device')


def test_a_training_for_a_missing_gpu_is_counted_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    config = dataclasses.replace(small_config(), device='cuda')
    assert local_device(config) is None and local_device(small_config()) == CPU
    memory, work = describe(config, 0, 3)
    assert ' of ' not in memory and 'TFLOP/kimg; speed unknown' in work


@pytest.mark.parametrize(('limit_gb', 'remedy'), [(0.455, '--batch-gpu='), (0.1, '--cbase')])
def test_short_memory_is_warned_of_with_a_batch_that_fits(monkeypatch, limit_gb, remedy):
    monkeypatch.setattr(estimate_module, 'device_memory', lambda device: limit_gb * GB)
    config = small_config(side=32, cbase=1024, cmax=32, batch=32)
    (warning,) = describe(config, 0, 3)[2:]
    assert warning.startswith('Warning: out of memory') and remedy in warning
    if remedy == '--batch-gpu=':
        batch_gpu = int(re.search(r'--batch-gpu=(\d+)', warning)[1])
        smaller = dataclasses.replace(config, batch_gpu=batch_gpu)
        assert batch_gpu < 32 and Rehearsal(smaller, 0, 3).memory_bytes('cpu') <= limit_gb * GB


def test_memory_of_this_machine_is_known_or_not_guessed(monkeypatch):
    assert device_memory(CPU) is None or device_memory(CPU) > 2 ** 28
    monkeypatch.delattr(estimate_module.os, 'sysconf', raising=False)
    assert device_memory(CPU) is None


@pytest.mark.parametrize(('cfg', 'side'), [
    ('demo', 32), ('stylegan2', 256), ('cifar', 32), ('dcgan', 64), ('stylegan1-demo', 32)])
def test_the_least_that_a_run_needs_is_less_than_what_is_counted(cfg, side):
    config = preset(cfg, side, device='cpu').for_device('cpu')
    least, counted = sum(least_bytes(config, 3).values()), Rehearsal(config, 0, 3).memory_bytes('cpu')
    assert 0 < least < counted
    # Otherwise small runs would not be told from others.
    assert counted - estimate_module.PROCESS_BYTES['cpu'] < estimate_module.CLEARLY_SMALL * least
