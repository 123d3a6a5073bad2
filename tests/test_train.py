# SPDX-License-Identifier: Apache-2.0
"""train.py: the command line, from words to a run folder. The training itself is replaced."""
import json
import os
import re
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from golden_cases import ROOT, cases
from PIL import Image

import train
from dnnlib.util import UserError
from training import config as cfg
from training.capacity import dry_run, estimate
from training.run.folder import FLAGS_FILE

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
SUMMARY = ('Output directory', 'Training data', 'Training duration', 'Number of GPUs', 'Number of images',
           'Image resolution', 'Conditional model', 'Dataset x-flips')


def make_dataset(
    folder, name='pics', container='dir', resolution=32, width=None, channels=3, num_images=4, labels=None,
):
    """Build a dataset as the golden README describes it; the path that --data gets."""
    target = folder / (f'{name}.zip' if 'zip' in container else name)
    if container.startswith('absent'):
        return target
    source = folder / 'source' if container == 'zip' else target
    source.mkdir(parents=True)
    for i in range(num_images):
        Image.new(MODES[channels], (width or resolution, resolution)).save(source / f'img{i:05d}.png')
    if labels is not None:
        names = [f'img{i:05d}.png' for i in range(num_images)]
        table = None if labels == 'json-null' else list(zip(names, labels, strict=False))
        (source / 'dataset.json').write_text(json.dumps({'labels': table}), encoding='utf-8')
    if container == 'zip':
        with zipfile.ZipFile(target, 'w') as archive:
            for path in sorted(source.iterdir()):
                archive.write(path, path.name)
    return target


@pytest.fixture
def run(capsys):
    """Run the command in this process: (exit status, stdout, stderr)."""
    def run(*args):
        try:
            train.main([str(arg) for arg in args])
            status = 0
        except SystemExit as error:
            status = error.code or 0
        out, err = capsys.readouterr()
        return status, out, err
    return run


def parse_output(out):
    """(options, summary) as printed."""
    start = out.index('{')
    options, length = json.JSONDecoder().raw_decode(out[start:])
    pairs = re.findall(r'^(\w[\w -]+):\s*(.*)$', out[start + length:], re.MULTILINE)
    assert out[start + length:].startswith('\n\nOutput directory:   ')
    return options, {key: value for key, value in pairs if key in SUMMARY}


# --- Recorded command lines

def reason_to_differ(case):
    """Why this program does not do with a case what the published one does, or None."""
    height = case['dataset'].get('resolution', 32)
    size, args = (height, case['dataset'].get('width') or height), ' '.join(case['argv']).replace('=', ' ')
    if case['expected']['exit_code'] == 0:
        try:
            cfg.split_resolution(*size)
        except UserError:
            return 'refused: the published program would fail when it builds the networks'
        if '--seed -' in args:
            return 'refused: the published program would fail when it seeds'
        resume = re.search(r'--resume (\S+)', args)
        if resume and cfg.continues(resume[1]):
            return 'refused: a run to continue, which is not there'
    elif 'power of two' in case['expected'].get('must_mention', []):
        return 'either: any number of processes will do that divides the batch'
    elif '--workers 0' in args:
        return 'accepted: reads in the training process'
    elif case['expected'].get('kind') == 'uncaught' and size[0] != size[1]:
        return 'accepted: images need not be square'
    return None


def adapt(options):
    """Where the published program crashes in training: splits of the batch that do not divide."""
    share = options['batch_size'] // options['num_gpus']
    options['batch_gpu'] = min(options['batch_gpu'], share)
    epilogue = options['D_kwargs']['epilogue_kwargs']
    group = epilogue['mbstd_group_size']
    if options['batch_gpu'] > group:
        epilogue['mbstd_group_size'] = max(n for n in range(1, group + 1) if options['batch_gpu'] % n == 0)
    return options


def restore(expected, name, out, data):
    """Fill in the folders. A path with a trailing slash has a name here; the published program has none."""
    text = json.dumps(expected).replace('{out}', str(out)).replace('{data}', str(data))
    return json.loads(re.sub(r'(\d{5,})--', rf'\1-{name.split(".")[0]}-', text))


def close(actual, expected):
    """Equality with floats to 1e-9 relative, key order free."""
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(close(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(close, actual, expected))
    if isinstance(expected, float | int) and not isinstance(expected, bool):
        return not isinstance(actual, bool) and actual == pytest.approx(expected, rel=1e-9)
    return actual == expected


@pytest.mark.parametrize('case', cases('train_configs'))
def test_a_recorded_command_line_gives_the_recorded_options(case, run, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, 'summarise_needs', lambda *_: '')  # tested below; slow at 1024 pixels
    data, out = make_dataset(tmp_path, **case['dataset']), tmp_path / 'out'
    for name in case.get('existing_run_dirs') or []:
        (out / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob('*'))
    status, stdout, stderr = run(*(arg.format(out=out, data=data) for arg in case['argv']))
    expected = case['expected']
    assert sorted(tmp_path.rglob('*')) == before, 'a dry run created something'
    reason = reason_to_differ(case)
    if reason is not None:
        if reason.startswith('either'):
            assert status == 0 or '--gpus' in stderr
        else:
            assert (status == 0) == reason.startswith('accepted'), stderr
    elif expected['exit_code'] == 0:
        assert status == 0, stderr
        options, summary = parse_output(stdout)
        restored = restore(expected, case['dataset']['name'], out, data)
        assert close(options, adapt(restored['options'])), options
        assert summary == restored['summary']
        assert Path(options['run_dir']).name == restored['run_name']
        assert stdout.rstrip().endswith('Dry run; exiting.')
    elif expected.get('kind') == 'uncaught':
        # Where the published program crashes, we may do better, or say why not.
        assert status in (0, 2) and 'Traceback' not in stderr
    else:
        assert status == 2 and 'Traceback' not in stderr
        assert all(text in stderr for text in expected.get('must_mention', [])), stderr


# --- Errors of the command line and of the dataset

@pytest.mark.parametrize('args, message', [
    (['--nonsense=1'], '--nonsense'), (['--kimg=2.5'], '--kimg'), (['--mirror=maybe'], '--mirror'),
    (['--cfg=x'], '--cfg'), (['--aug=x'], '--aug'), (['--gamma=abc'], '--gamma'),
    (['--gamma=nan'], '--gamma'), (['--seed=-1'], '--seed'), (['--precision=fp8'], '--precision'),
    (['--subset=5'], '--subset'), (['--gpus=2', '--batch=3'], '--batch'),
])
def test_a_wrong_option_ends_with_status_2_and_its_name(args, message, run, tmp_path):
    status, _, stderr = run(f'--outdir={tmp_path / "out"}', f'--data={make_dataset(tmp_path)}', *args, '-n')
    last = stderr.splitlines()[-1]
    assert status == 2 and last.startswith('Error: ') and message in last


@pytest.mark.parametrize('given, missing', [('--outdir=a', '--data'), ('--data=b', '--outdir')])
def test_folder_and_data_are_required(given, missing, run):
    status, _, stderr = run(given)
    assert status == 2 and missing in stderr


@pytest.mark.parametrize('word', ['1', 'TRUE', 't', 'Yes', 'y', 'on'])
def test_switches_take_words(word, run, tmp_path):
    args = ['--outdir=o', f'--data={make_dataset(tmp_path)}', '--cfg=demo', '-n']
    _, stdout, _ = run(*args, f'--mirror={word}', '--nobench=off')
    options, _ = parse_output(stdout)
    assert options['training_set_kwargs']['xflip'] is True and 'cudnn_benchmark' not in options


def test_unusable_data_is_explained_in_one_line(run, tmp_path):
    empty, text, corrupt = tmp_path / 'empty', tmp_path / 'a.txt', tmp_path / 'corrupt.zip'
    empty.mkdir()
    text.write_text('x')
    corrupt.write_bytes(b'PK\x03\x04 and no more')
    unlabelled = make_dataset(tmp_path, 'unlabelled')
    (unlabelled / 'dataset.json').write_text('{}')
    odd = make_dataset(tmp_path, 'odd', resolution=100, width=90)
    nested = make_dataset(tmp_path, 'nested', labels=[[[1.0, 2.0]]] * 4)
    for path in (tmp_path / 'none', empty, text, corrupt, unlabelled, odd, nested):
        status, stdout, stderr = run('--outdir=o', f'--data={path}', '-n', '--cond=1')
        assert (status, stdout) == (2, ''), path
        assert re.fullmatch(r'Error: --data[^\n]+\n', stderr), stderr


# --- What a dry run prints

def test_a_dry_run_counts_parameters_and_says_what_is_unexpected(run, tmp_path):
    data = make_dataset(tmp_path, resolution=32, width=48, labels=[0, 1, 2, 1])
    status, stdout, stderr = run(f'--outdir={tmp_path}/o', f'--data={data}', '--cfg=demo', '-n')
    assert status == 0, stderr
    assert parse_output(stdout)[1]['Image resolution'] == '48x32'
    counts = dict(re.findall(r'^(Generator|Discriminator): +([\d,]+) parameters$', stdout, re.MULTILINE))
    assert 100_000 < int(counts['Generator'].replace(',', '')) < 1_000_000
    assert 'THE LABELS OF THIS DATASET ARE NOT USED' in stdout
    assert 'Images per class: 0: 1, 1: 2' in stdout
    assert re.search(r'^Estimated memory: .* GB', stdout, re.MULTILINE)


def test_the_layout_of_labels_is_told(run, tmp_path):
    data = make_dataset(tmp_path, labels=[0, 1, 2, 1])
    status, stdout, _ = run(f'--outdir={tmp_path}/o', f'--data={data}', '--cfg=demo', '--cond=1', '-n')
    assert status == 0 and 'Labels: 3 classes, given as class numbers' in stdout and 'NOT USED' not in stdout


def test_labels_that_nobody_asks_for_need_not_be_complete(run, tmp_path):
    data = make_dataset(tmp_path, labels=[0, 1, 2, 1])
    table = json.loads((data / 'dataset.json').read_text())
    (data / 'dataset.json').write_text(json.dumps({'labels': table['labels'][1:]}))
    args = [f'--outdir={tmp_path}/o', f'--data={data}', '--cfg=demo', '-n']
    assert run(*args)[0] == 0
    status, _, stderr = run(*args, '--cond=1')
    assert status == 2 and '1 of 4 images have no label' in stderr


def test_the_bundled_dataset_is_found_by_name(run, tmp_path):
    if not (ROOT / 'training/datasets/emoji32.zip').is_file():
        pytest.skip('the bundled dataset is not built')
    status, stdout, stderr = run(f'--outdir={tmp_path}/o', '--data=emoji32', '--cfg=demo', '--cond=1', '-n')
    assert status == 0, stderr
    assert parse_output(stdout)[1]['Number of images'] == '1906' and '00000-emoji32-cond-demo' in stdout


# --- Starting a run

@pytest.fixture
def trained(monkeypatch):
    """The configurations that reached the training loop."""
    configs = []
    loop = types.ModuleType('training.training_loop')
    loop.train = configs.append
    monkeypatch.setitem(sys.modules, 'training.training_loop', loop)
    return configs


def test_a_run_gets_a_folder_with_its_options_and_then_trains(run, trained, tmp_path):
    args = [f'--outdir={tmp_path}/deep/out', f'--data={make_dataset(tmp_path)}', '--cfg=demo', '--desc=first']
    for i in range(2):
        status, stdout, stderr = run(*args)
        assert status == 0, stderr
        folder = tmp_path / 'deep/out' / f'0000{i}-pics-demo-first'
        options = json.loads((folder / 'training_options.json').read_text(encoding='utf-8'))
        assert {path.name for path in folder.iterdir()} == {'training_options.json', FLAGS_FILE}
        assert f'Output directory:   {folder}\n' in stdout and options['run_dir'] == str(folder)
        assert '{' not in stdout and len(stdout.splitlines()) <= 15
        assert cfg.TrainConfig.from_options(options) == trained[i]
    assert 'Dry run' not in stdout


@pytest.mark.parametrize('args, message', [
    (['--gpus=64', '--batch=64', '--device=cuda'],
     '--gpus=64: this machine has' if torch.cuda.is_available() else '--device=cuda: '),
    (['--resume=nowhere.pkl'], '--resume=nowhere.pkl'),
])
def test_what_cannot_start_creates_nothing(args, message, run, trained, tmp_path):
    args = ['--cfg=demo', '--batch=4', *args]
    status, _, stderr = run(f'--outdir={tmp_path}/o', f'--data={make_dataset(tmp_path)}', *args)
    assert status == 2 and message in stderr
    assert not trained and not (tmp_path / 'o').exists()


def test_a_run_that_is_refused_at_its_start_leaves_no_folder(run, tmp_path, monkeypatch):
    def refuse(config, _):
        assert Path(config.run_dir, 'training_options.json').is_file()
        raise UserError('--resume=a.pkl: no network file')
    monkeypatch.setattr(train, 'start_training', refuse)
    status, _, stderr = run(f'--outdir={tmp_path}/o', f'--data={make_dataset(tmp_path)}', '--cfg=demo')
    assert status == 2 and 'a.pkl' in stderr and list((tmp_path / 'o').iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_named(run, trained, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    status, _, stderr = run(f'--outdir={tmp_path}/file/o', f'--data={make_dataset(tmp_path)}', '--cfg=demo')
    assert status == 2 and not trained
    assert re.fullmatch(r'Error: --outdir=\S+/file/o: cannot create a run folder \([^\n]+\n', stderr), stderr


# --- Help

def test_help_needs_no_torch_and_the_copy_in_the_docs_is_current():
    code = 'import sys, train\ntry: train.main(["--help"])\nfinally: assert "torch" not in sys.modules'
    command = [sys.executable, '-c', code]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for option in cfg.OPTIONS:
        assert f'--{option.name} ' in result.stdout
    documented = (ROOT / 'docs/train-help.txt').read_text(encoding='utf-8')
    # Spacing is click's affair and differs between its releases.
    assert result.stdout.split()[2:] == documented.split()[2:]


# --- What an attacker or a slip of the pen may give

@pytest.mark.parametrize('args, option', [
    (['--batch=100000000'], '--batch'), (['--map-depth=1000000'], '--map-depth'),
    (['--cmax=99999999999', '--cbase=99999999999'], '--cbase, --cmax'),
    (['--batch=40000', '--batch-gpu=40000', '--cmax=512', '--cbase=99999'], '--batch-gpu')])
@pytest.mark.parametrize('dry', [True, False])
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_built(
        args, option, dry, run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, 'free_memory', lambda device: 16e9)
    args = [f'--outdir={tmp_path}/o', f'--data={make_dataset(tmp_path)}', '--cfg=demo', '--device=cpu', *args]
    status, _, stderr = run(*args, *(['-n'] if dry else []))
    assert status == 2 and re.fullmatch(r'Error: [^\n]* GB of memory, but 16.0 GB are free[^\n]*\n', stderr)
    assert option in stderr and not trained and not (tmp_path / 'o').exists()


def test_a_network_that_is_counted_to_be_too_large_for_a_cpu_is_refused(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, 'free_memory', lambda device: 1e9)
    args = [f'--outdir={tmp_path}/o', f'--data={make_dataset(tmp_path)}', '--cfg=demo', '--device=cpu']
    assert run(*args)[0] == 0 and len(trained) == 1
    status, _, stderr = run(*args, '--batch=2048', '--batch-gpu=2048')
    assert status == 2 and stderr.startswith('Error: --batch-gpu=2048: training needs about ')
    assert len(trained) == 1


@pytest.mark.parametrize('arg', [
    '--metrics=', '--resume=', '--desc=.', '--desc=..', '--snapshot-format=pkl,pkl', '--detector-dir=none'])
def test_values_without_a_meaning_are_refused(arg, run, trained, tmp_path):
    status, _, stderr = run(f'--outdir={tmp_path}/o', f'--data={make_dataset(tmp_path)}', arg)
    assert status == 2 and arg.split('=')[0] in stderr and stderr.count('\n') == 1 and not trained


def test_a_path_that_is_no_text_and_labels_beyond_any_number_are_no_obstacle(run, trained, tmp_path):
    data = make_dataset(tmp_path, name=os.fsdecode(b'pi\xffcs'), labels=[10 ** 400] * 4)
    args = [f'--outdir={tmp_path}/o', f'--data={data}', '--cfg=demo']
    status, stdout, stderr = run(*args)
    assert status == 0, stderr
    assert 'pi\\udcffcs' in stdout and trained[0].data.path == str(data)
    status, _, stderr = run(*args, '--cond=1')
    assert status == 2 and stderr.startswith('Error: --data: ') and stderr.count('\n') == 1


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='no such signal')
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR1'])
def test_a_signal_before_the_training_begins_ends_with_status_75_and_leaves_nothing(
        name, run, tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(train, 'start_training', lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    try:
        status, _, _ = run(f'--outdir={tmp_path}/o', f'--data={make_dataset(tmp_path)}', '--cfg=demo')
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert status == 75 and list((tmp_path / 'o').iterdir()) == []
