# SPDX-License-Identifier: Apache-2.0
"""calc_metrics.py: what it prints and writes, where its data comes from, and how it says no."""
import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from launched_calc_metrics import FEW
from metrics_stand_in import write_detectors, write_images
from small_networks import small_generator
from source_tree import ROOT

import calc_metrics
import legacy
from dnnlib import util
from dnnlib.util import UserError
from metrics import evaluation, metric_main
from training.formats import convert, pickled


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A training run with a network that notes its data, beside that data and feature networks."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'training_options.json').write_text('{}')
    write_detectors(tmp_path / 'detectors')
    noted = {'class_name': 'os.system', 'path': write_images(tmp_path / 'data'), 'xflip': True}
    pickled.save_network_snapshot(
        folder / 'net.pkl', G=None, D=None, G_ema=small_generator(), training_set_kwargs=noted)
    return folder


def run(*args, capsys):
    """(exit status, what was printed, errors)."""
    with pytest.raises(SystemExit) as left:
        calc_metrics.main(['--device=cpu', *map(str, args)])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_same_seed_prints_the_same_digits_and_the_run_keeps_them(run_dir, monkeypatch, capsys):
    monkeypatch.chdir(run_dir)
    lines = []
    for seed in (0, 0, 1):
        status, out, _ = run('--network=net.pkl', '--metrics=swd', f'--seed={seed}', capsys=capsys)
        assert status == 0
        lines.append(json.loads(out.strip().splitlines()[-1]))
    assert lines[0]['results'] == lines[1]['results'] != lines[2]['results']
    kept = [json.loads(line) for line in (run_dir / 'metric-swd.jsonl').read_text().splitlines()]
    assert kept == lines and lines[0]['snapshot_pkl'] == 'net.pkl' and lines[2]['seed'] == 1


def test_a_cpu_keeps_the_memory_of_its_tensors(run_dir, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(evaluation, 'keep_freed_memory', asked.append)
    assert run(f'--network={run_dir / "net.pkl"}', '--metrics=swd', capsys=capsys)[0] == 0
    assert asked == [torch.device('cpu')]


def test_twice_the_same_seed_is_the_same_digits_with_a_feature_network_too(
        run_dir, tmp_path, monkeypatch, capsys):
    for function in (metric_main.fid, metric_main.kid):
        name = f'{function.__name__}5k_full'
        small = functools.partial(function, name=name, num_generated=200)
        monkeypatch.setitem(metric_main._METRICS, name, small)
    args = (f'--network={run_dir}/net.pkl', '--metrics=fid5k_full,kid5k_full', '--verbose=0', '--seed=3',
            f'--detector-dir={tmp_path}/detectors')
    results = []
    for _ in range(2):
        shutil.rmtree(tmp_path / 'cache', ignore_errors=True)  # the real images are looked at anew
        status, out, err = run(*args, capsys=capsys)
        assert status == 0, err
        results.append([json.loads(line)['results'] for line in out.splitlines()])
    assert results[0] == results[1] and [list(r) for r in results[0]] == [['fid5k_full'], ['kid5k_full']]


def test_processes_of_torchrun_find_the_number_that_one_process_finds(
        run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(metric_main._METRICS, 'fid5k_full', FEW)
    args = ['--device=cpu', f'--network={run_dir}/net.pkl', '--metrics=fid5k_full', '--verbose=0',
            f'--detector-dir={tmp_path}/detectors']
    alone = json.loads(run(*args, capsys=capsys)[1])
    shutil.rmtree(tmp_path / 'cache')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
               str(ROOT / 'tests' / 'launched_calc_metrics.py'), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    both = json.loads(line)
    assert (alone['num_gpus'], both['num_gpus']) == (1, 2)
    # Sums in another order.
    assert both['results'] == pytest.approx(alone['results'], rel=1e-6)
    assert len((run_dir / 'metric-fid5k_full.jsonl').read_text().splitlines()) == 2


def test_a_converted_network_finds_the_data_of_the_run_it_lies_in(run_dir, tmp_path, capsys):
    found = legacy.load_network(run_dir / 'net.pkl')
    convert.write(run_dir / 'net.safetensors', found, convert.Choices())
    convert.write(run_dir / 'net.pt', found, convert.Choices())
    for name, status in (('net.safetensors', 0), ('net.pt', 2)):
        assert run(f'--network={run_dir / name}', '--metrics=none', capsys=capsys)[0] == status
    noted = {'training_set_kwargs': {'path': str(tmp_path / 'data')}}
    (run_dir / 'training_options.json').write_text(json.dumps(noted))
    assert run(f'--network={run_dir}/net.pt', '--metrics=none', capsys=capsys)[0] == 0
    for text in ('no JSON', '[]', '{"training_set_kwargs": 7}', '{"training_set_kwargs": {"path": [1]}}'):
        (run_dir / 'training_options.json').write_text(text)
        status, _, err = run(f'--network={run_dir}/net.pt', '--metrics=none', capsys=capsys)
        assert status == 2 and '--data' in err and 'Traceback' not in err


def test_a_metric_with_a_feature_network_tells_what_it_depends_on(run_dir, tmp_path, capsys):
    status, out, err = run(f'--network={run_dir}/net.pkl', '--metrics=is_few', capsys=capsys)
    assert status == 2 and out == '' and "'is_few' is not a metric" in err and 'fid5k_full' in err
    status, out, err = run(
        f'--network={run_dir}/net.pkl', '--metrics=fid5k_full', '--verbose=0',
        f'--detector-dir={tmp_path}/detectors', capsys=capsys)
    assert status == 0, err
    result = json.loads(out)
    assert result['results']['fid5k_full'] > 0 and len(result['detector_sha256']) == 64
    assert len(result['data_key']) == 32 and result['num_gpus'] == 1 and 'torch' in result['versions']


def refuse(url, **_):
    raise UserError(f'{url}: cannot be downloaded')


def test_what_cannot_be_done_is_one_line_and_status_2(run_dir, tmp_path, monkeypatch, capsys):
    open_url = util.open_url
    monkeypatch.setattr(
        util, 'open_url', lambda url, **kw: refuse(url) if '//' in url else open_url(url, **kw))
    network, other = f'--network={run_dir}/net.pkl', write_images(tmp_path / 'other', 3, 1)
    pickled.save_network_snapshot(tmp_path / 'bare.pkl', G=None, D=None, G_ema=small_generator())
    for args, words in [
            ([], '--network is required'), (['--network=nothing.pkl'], 'no such file'),
            ([network], 'cannot be downloaded'),
            ([network, f'--data={other}', '--metrics=swd'], 'have 1 channels'),
            ([f'--network={tmp_path}/bare.pkl', '--metrics=swd'], '--data is required'),
            ([f'--offline-bundle={tmp_path}/bundle'], 'cannot be downloaded')]:
        status, _, err = run('--verbose=0', *args, capsys=capsys)
        errors = [line for line in err.splitlines() if line.startswith('Error: ')]
        assert status == 2 and len(errors) == 1 and words in errors[0], (args, err)
        assert 'Traceback' not in err


def test_metrics_whose_network_is_missing_are_named_at_the_start_and_the_others_computed(
        run_dir, tmp_path, monkeypatch, capsys):
    open_url = util.open_url
    monkeypatch.setattr(
        util, 'open_url', lambda url, **kw: refuse(url) if '//' in url else open_url(url, **kw))
    for name in ('vgg16.pt', 'vgg16.pt.sha256'):
        (tmp_path / 'detectors' / name).unlink(missing_ok=True)
    monkeypatch.setitem(metric_main._METRICS, 'fid5k_full', FEW)
    status, out, err = run(
        f'--network={run_dir}/net.pkl', f'--detector-dir={tmp_path}/detectors', '--verbose=0',
        '--metrics=pr50k3_full,swd,ppl2_wend,fid5k_full', capsys=capsys)
    assert status == 2 and [json.loads(line)['metric'] for line in out.splitlines()] == ['swd', 'fid5k_full']
    lines = [line for line in err.splitlines() if line.startswith(('Note', 'Error'))]
    assert len(lines) == 2 and lines[0].startswith('Note: --metrics: no pr50k3_full, ppl2_wend: vgg16.pt is ')
    # The option was given and does not help: it is not advised.
    assert f'copy its files to {tmp_path}/detectors' in lines[0] and 'use --detector-dir' not in lines[0]
    assert lines[1] == 'Error: --metrics: not computed: pr50k3_full, ppl2_wend, for the reason above'


def test_a_file_that_is_no_feature_network_and_a_folder_that_is_not_there_are_found_at_the_start(
        run_dir, tmp_path, capsys):
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'inception-2015-12-05.pt').write_text('<html>')
    for folder, words in (('bad', 'not a TorchScript network'), ('absent', "absent' does not exist")):
        detectors = f'--detector-dir={tmp_path / folder}'
        status, out, err = run(f'--network={run_dir}/net.pkl', detectors, capsys=capsys)
        assert status == 2 and out == '' and words in err
        assert 'Calculating' not in err and 'Traceback' not in err


def test_results_name_the_snapshot_inside_the_run_through_links_too(run_dir, tmp_path, capsys):
    (tmp_path / 'link').symlink_to(run_dir)
    (run_dir / 'latest.pkl').symlink_to('net.pkl')
    for path in (run_dir / 'net.pkl', tmp_path / 'link' / 'net.pkl', run_dir / 'latest.pkl'):
        status, out, err = run(f'--network={path}', '--metrics=swd', '--verbose=0', capsys=capsys)
        assert status == 0 and json.loads(out)['snapshot_pkl'] == 'net.pkl', err


def test_data_that_has_moved_is_said_to_be_recorded(run_dir, tmp_path, capsys):
    pickled.save_network_snapshot(tmp_path / 'moved.pkl', G=None, D=None, G_ema=small_generator(),
                                  training_set_kwargs={'path': '/content/drive/x.zip'})
    status, _, err = run(f'--network={tmp_path}/moved.pkl', '--metrics=swd', capsys=capsys)
    assert status == 2 and "--data is required: the network was trained on '/content/drive/x.zip'" in err


def test_no_metric_is_no_work_and_a_bundle_needs_no_network(run_dir, tmp_path, capsys):
    assert run(f'--network={run_dir}/net.pkl', '--metrics=none', '--verbose=0', capsys=capsys)[:2] == (0, '')
    status, out, _ = run(f'--offline-bundle={tmp_path}/b', f'--detector-dir={tmp_path}/detectors',
                         capsys=capsys)
    assert status == 0 and len(out.splitlines()) == 2 and len(list((tmp_path / 'b').iterdir())) == 4


def test_mirror_and_data_go_before_what_the_network_notes(run_dir, tmp_path, capsys):
    network = f'--network={run_dir}/net.pkl'
    counts = []
    for args in ([], ['--mirror=0'], [f'--data={tmp_path}/data'], [f'--data={tmp_path}/data', '--mirror=1']):
        counts.append(run(network, '--metrics=none', *args, capsys=capsys)[2].splitlines()[0].split()[0])
    assert counts == ['60', '30', '30', '60']


def test_processes_that_do_not_fit_together_are_refused(monkeypatch):
    evaluation.check_gpus(3, 1, 'cpu')
    with pytest.raises(UserError, match='torchrun started 2'):
        evaluation.check_gpus(3, 2, 'cpu')
    monkeypatch.setattr(evaluation.torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='--gpus=3: this machine has 2'):
        evaluation.check_gpus(3, 1, 'cuda')
