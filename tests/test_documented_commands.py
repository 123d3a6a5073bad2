# SPDX-License-Identifier: Apache-2.0
"""Every command line of README, docs and help runs as printed, in order, on files of the names it uses.

Only the length is cut: seeds, steps and metrics are few, and a training writes small networks under the names
that the real one would give them.
"""
import dataclasses
import gzip
import importlib
import itertools
import pickle
import re
import shlex
import shutil
import struct
import tarfile
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from dataset_cases import encode, make_image, write_folder, write_zip
from small_networks import save_small_network, small_generator
from source_tree import ROOT
from test_help import TOOLS

import train
from dnnlib.cli_options import NumberList
from metrics import evaluation, metric_main
from training.capacity import dry_run
from training.dataset import ImageFolderDataset
from training.formats import convert
from training.formats.pickled import save_network_snapshot
from training.profiling import job
from training.report.ticks import kimg_number, snapshot_due, tick_ends

DOCUMENTS = ['README.md', *(f'docs/{path.name}' for path in sorted((ROOT / 'docs').glob('*.md')))]
CLASSES = {'docs/generation.md': 10, 'generate': 10}  # of net.pkl, elsewhere unconditional
MAX_NUMBERS, MAX_SNAPSHOTS = 16, 60
SHORTER = {'projector': ['--num-steps=2', '--distance=pixel', '--tune=1'], 'dataset_tool': ['--workers=0']}
SHARED_OPTIONS = ('cfg', 'resolution', 'batch')  # of benchmarks/common.py
HUB = 'hf://'  # test_legacy_push.py has a server in its place
# What cannot run here: it installs, needs several machines, or is a test of its own.
ELSEWHERE = ('make ', 'pip ', 'docker', 'sbatch ', 'DATA=', 'python3 -m venv')


def code_blocks(text):
    """(language, lines) of the fenced blocks."""
    language, lines = None, []
    for line in text.splitlines():
        if not line.startswith('```'):
            lines.append(line)
        elif language is None:
            language, lines = line[3:], []
        else:
            yield language, lines
            language, lines = None, []


def commands_of(lines):
    """The command lines of a block or an epilog, joined where they are continued, without comments."""
    joined = re.sub(r' *\\\n *', ' ', '\n'.join(line.strip() for line in lines))
    words = ('python ', 'torchrun ', *ELSEWHERE)
    return [re.sub(r' +# .*', '', line).strip() for line in joined.splitlines() if line.startswith(words)]


def click_commands(name):
    values = vars(importlib.import_module(name)).values()
    return [value for value in values if isinstance(value, click.Command)]


def epilogs():
    """Tool -> the examples in its help."""
    found = {}
    for name in TOOLS:
        lines = [line for command in click_commands(name) for line in (command.epilog or '').splitlines()]
        found.update({name: commands_of(lines)} if lines else {})
    return found


def documented():
    """(where, command lines in order)."""
    found = {}
    for name in DOCUMENTS:
        blocks = code_blocks((ROOT / name).read_text(encoding='utf-8'))
        found[name] = [line for language, lines in blocks if not language for line in commands_of(lines)]
    return [pytest.param(where, lines, id=where) for where, lines in {**found, **epilogs()}.items() if lines]


def tool_and_arguments(line):
    """(name of the tool, its arguments); (None, []) for programs that are no tools."""
    words = shlex.split(line)
    start = next((i for i, word in enumerate(words) if word.removesuffix('.py') in TOOLS), None)
    return (None, []) if start is None else (words[start].removesuffix('.py'), words[start + 1:])


def write_inputs(where):
    """The files that the commands use, in the current folder."""
    images = {f'{i}.png': encode(make_image(i, 300, 280)) for i in range(4)}
    write_folder('my_images', images)
    write_folder('folder', images)
    write_folder('.', {'portrait.png': images['0.png'], 'photo.jpg': images['1.png']})
    small = {f'{i}.png': encode(make_image(i, 16, 16)) for i in range(8)}
    Path('shared').mkdir()
    for name in ('images.zip', 'shared/mine.zip'):
        write_zip(name, small)
    # CIFAR-10 and MNIST, of a few images.
    batch = {'data': np.zeros([10, 3072], np.uint8), 'labels': list(range(10))}
    with open('batch', 'wb') as file:
        pickle.dump(batch, file, protocol=2)
    with tarfile.open('cifar-10-python.tar.gz', 'w:gz') as archive:
        for i in range(1, 6):
            archive.add('batch', f'cifar-10-batches-py/data_batch_{i}')
    write_folder('mnist', {
        'train-images-idx3-ubyte.gz': gzip.compress(struct.pack('>4i', 2051, 10, 28, 28) + bytes(7840)),
        'train-labels-idx1-ubyte.gz': gzip.compress(struct.pack('>2i', 2049, 10) + bytes(range(10)))})
    G = small_generator(c_dim=CLASSES.get(where, 0), z_dim=16, w_dim=16)
    for name in ('net.pkl', 'unknown.pkl', 'network-snapshot-000500.pkl', 'stylegan2-tf.pkl',
                 'stylegan2-ffhq-config-f.pkl'):
        save_network_snapshot(name, G=None, D=None, G_ema=G, training_set_kwargs={'path': 'images.zip'})


def snapshot_numbers(config):
    """The numbers in the names of the first snapshots of a run."""
    found, nimg, start = [], 0, 0
    for tick in itertools.count():
        nimg += config.batch_size
        while not tick_ends(nimg, tick, start, config.total_kimg, config.kimg_per_tick):
            nimg += config.batch_size
        start, done = nimg, nimg >= config.total_kimg * 1000
        if snapshot_due(tick, done, config.network_snapshot_ticks):
            found.append(kimg_number(nimg))
        if done or len(found) == MAX_SNAPSHOTS:
            return found


def train_shortly(config, request=None):
    """In place of a training: networks of its form under its names."""
    dataset = ImageFolderDataset(**config.data.kwargs())
    first, *others = [
        f'{config.run_dir}/network-snapshot-{number}.pkl' for number in snapshot_numbers(config)]
    save_small_network(first, img_resolution=config.data.resolution, img_channels=dataset.num_channels,
                       c_dim=dataset.label_dim,
                       synthesis_kwargs={'channel_base': 4 * max(config.data.size), 'channel_max': 8})
    for other in others:
        shutil.copyfile(first, other)


@pytest.fixture
def shortened(monkeypatch):
    """The tools with little to do: few numbers in lists, no training, metrics, exports and profiles."""
    convert_list, writers = NumberList.convert, dict.fromkeys(['.onnx', '.pt2'], lambda *_: [])
    monkeypatch.setattr(NumberList, 'convert', lambda *args: convert_list(*args)[:MAX_NUMBERS])
    monkeypatch.setattr(train, 'start_training', train_shortly)
    monkeypatch.setattr(evaluation, 'missing_detectors', lambda *_: {})
    for name in metric_main.list_valid_metrics():
        monkeypatch.setitem(metric_main._METRICS, name, lambda options: {'value': 1})
    monkeypatch.setattr(evaluation, 'write_bundle', lambda *_: [])
    monkeypatch.setitem(convert.WRITERS, '.onnx', writers['.onnx'])
    monkeypatch.setitem(convert.WRITERS, '.pt2', writers['.pt2'])
    monkeypatch.setattr(job, 'print_profile', lambda *_: None)
    monkeypatch.setattr(job, 'print_timeline', lambda *_: None)


def run(name, arguments):
    with pytest.raises(SystemExit) as left:
        shorter = [word for word in SHORTER.get(name, []) if word != '--tune=1' or '--tune' in str(arguments)]
        importlib.import_module(name).main([*arguments, *shorter])
    return left.value.code or 0


@pytest.mark.parametrize(('where', 'lines'), documented())
def test_commands_run_as_printed(shortened, tmp_path, monkeypatch, capsys, where, lines):
    monkeypatch.chdir(tmp_path)
    write_inputs(where)
    if where == 'docs/dcgan.md':  # whose ticks depend on the number of images
        opened = dry_run.open_dataset
        monkeypatch.setattr(dry_run, 'open_dataset', lambda *args, **kwargs: (
            dataclasses.replace(opened(*args, **kwargs)[0], num_images=60_000), None))
    for line in lines:
        name, arguments = tool_and_arguments(line.replace('=/shared/', '=shared/'))
        if name is None:
            assert line.startswith(ELSEWHERE) or known_options(line), line
        elif not line.startswith(ELSEWHERE) and HUB not in line:
            assert run(name, arguments) == 0, f'{line}: {capsys.readouterr().err}'
    if where in DOCUMENTS:
        blocks = code_blocks((ROOT / where).read_text(encoding='utf-8'))
        for block in [block for language, block in blocks if language == 'python']:
            run_python('\n'.join(block))


def run_python(code):
    """Run a block of Python; where it loads a network, with a conditional one under that name, too."""
    G = small_generator(w_dim=16)
    names = {'G': G, 'np': np, 'torch': torch}
    exec(code, dict(names))
    for path in re.findall(r"load_network\('([^']+)'\)", code):
        save_small_network(path, c_dim=9)
        exec(code, dict(names))


def known_options(line):
    """Whether a program that is no tool is there, and mentions each option of a command line."""
    words = shlex.split(line)
    path = ROOT / (words[2].replace('.', '/') + '.py' if words[1] == '-m' else words[1])
    options = [word.split('=')[0].removeprefix('--') for word in words if word.startswith('--')]
    return path.is_file() and all(option in path.read_text(encoding='utf-8') or option in SHARED_OPTIONS
                                  for option in options)


@pytest.mark.parametrize('where', DOCUMENTS)
def test_options_in_running_text_exist(where):
    text = (ROOT / where).read_text(encoding='utf-8')
    text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r'`([^`\n]+)`', text):
        if span.startswith('make '):
            target = rf'^{span.split()[1]}:'
            assert re.search(target, (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE), span
        name, arguments = tool_and_arguments(span.replace('...', ''))
        if name is not None:
            known = {option for command in click_commands(name) for param in command.params
                     for option in param.opts}
            given = {word.split('=')[0] for word in arguments if word.startswith('--')}
            assert given <= known | {'--help'}, f'{where}: {span}'
