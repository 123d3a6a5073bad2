# SPDX-License-Identifier: Apache-2.0
"""Runs of version 0.1, made before modules got packages: they still open, and resume alike."""
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from elsewhere import HIDE

import legacy
from dnnlib.util import UserError
from training import training_loop
from training.config import TrainConfig
from training.report import sheet
from training.run.resume import find_state
from training.run.snapshots import read_state

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / 'tests' / 'data' / 'earlier'
SYSTEMS = {'sg2': 'stylegan2', 'sg1': 'stylegan1', 'dcgan': 'dcgan'}
every_run = pytest.mark.parametrize('name', SYSTEMS)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the images that the runs were trained on, as relative paths say."""
    for side in (8, 16):
        folder, rng = tmp_path / f'images{side}', np.random.default_rng(0)
        folder.mkdir()
        for i in range(12):
            pixels = rng.integers(0, 256, [side, side, 3], dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f'{i:02d}.png')
        labels = [[f'{i:02d}.png', i % 2] for i in range(12)]
        (folder / 'dataset.json').write_text(json.dumps({'labels': labels}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def extract(name, place):
    """The folder of a run."""
    with zipfile.ZipFile(RUNS / f'{name}.zip') as archive:
        archive.extractall(place / name / 'run')
    return place / name / 'run'


def options_of(run):
    return json.loads((run / 'training_options.json').read_text())


@every_run
def test_options_say_which_system_they_are_of(name, place):
    assert TrainConfig.from_options(options_of(extract(name, place))).system == SYSTEMS[name]


def test_an_unknown_class_is_an_error_and_not_the_default_system(place):
    options = options_of(extract('sg1', place))
    options['G_kwargs']['class_name'] = 'training.networks_stylegan9.Generator'
    with pytest.raises(UserError, match=r'unknown generator training\.networks_stylegan9\.Generator'):
        TrainConfig.from_options(options)


@every_run
def test_a_network_opens_with_the_weights_of_the_state(name, place):
    run = extract(name, place)
    G_ema = legacy.load_network(str(run / 'network-snapshot-000000-060.pkl')).G_ema
    state = read_state(run / 'training-state-000000.pt')['run']
    for key, value in G_ema.state_dict().items():
        assert torch.equal(value, state['G_ema'][key]), key


@every_run
def test_a_run_resumes_with_the_same_numbers(name, place, monkeypatch):
    run = extract(name, place)
    wanted = read_state(run / 'training-state-000000.pt')['run']
    state = run / 'training-state-000000-044.pt'
    config = TrainConfig.from_options(options_of(run))
    monkeypatch.setattr(sheet, 'CPU_GRID_IMAGES', 12)
    training_loop.train(config, find_state(str(state), None)[0])
    found = read_state(run / 'training-state-000000.pt')['run']
    assert found['cur_nimg'] == wanted['cur_nimg'] == 60
    for network in ('G', 'D', 'G_ema'):
        for key, value in wanted[network].items():
            # Another processor rounds differently, and Adam amplifies what is small.
            torch.testing.assert_close(found[network][key], value, rtol=1e-3, atol=1e-4)


@every_run
def test_the_source_inside_a_network_still_runs(name, place):
    # By pickle itself, where only torch_utils and dnnlib can be imported.
    path = extract(name, place) / 'network-snapshot-000000-060.pkl'
    code = HIDE + '''
G = pickle.load(open(sys.argv[1], 'rb'))['G_ema']
print(list(G(torch.zeros(2, G.z_dim), torch.zeros(2, G.c_dim)).shape))
'''
    done = subprocess.run([sys.executable, '-c', code, str(path)], cwd=ROOT, capture_output=True, text=True)
    side = 16 if name == 'dcgan' else 8
    assert done.stdout == f'[2, 3, {side}, {side}]\n', done.stderr
