# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard and Weights & Biases get to see, with stand-ins for both programs."""
import json
import sys
import types

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.util import UserError
from training.run import sinks
from training.run.sinks import TensorBoardSink, WandbSink, open_sinks


class Events:
    """Stands in for TensorBoard's writer."""

    def __init__(self, folder=None):
        self.folder, self.scalars, self.is_closed = folder, [], False

    def add_scalar(self, name, value, global_step, walltime):
        self.scalars.append((name, value, global_step, walltime))

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


class FakeWandb(types.ModuleType):
    """Stands in for the module; inits, logs and failures can be looked at or asked for."""

    class Error(Exception):
        pass

    def __init__(self, api_key=None, fail_init=False, fail_log=False):
        super().__init__('wandb')
        self.api = types.SimpleNamespace(api_key=api_key)
        self.login = lambda: pytest.fail('asks for a login')  # as in older releases
        self.fail_init, self.fail_log = fail_init, fail_log
        self.inits, self.logs, self.is_finished = [], [], False

    def init(self, **settings):
        self.inits.append(settings)
        if self.fail_init and settings['mode'] != 'offline':
            raise self.Error('no\nanswer')
        return self

    def define_metric(self, name, step_metric):
        self.axis = name, step_metric

    def log(self, values):
        if self.fail_log:
            raise self.Error('gone')
        self.logs.append(values)

    def Image(self, image):
        return image.size

    def finish(self):
        self.is_finished = True


@pytest.fixture
def use(monkeypatch):
    """Function: put a stand-in in the place of the module."""
    monkeypatch.delenv('WANDB_MODE', raising=False)
    monkeypatch.delenv('WANDB_PROJECT', raising=False)

    def install(module):
        monkeypatch.setitem(sys.modules, 'wandb', module)
        return module
    return install


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / '00003-cats'
    folder.mkdir()
    return folder


def test_tensorboard_gets_scalars_in_time_since_the_start():
    events = Events()
    sink = TensorBoardSink(events, start_time=1000.0)
    sink.add_scalars({'a': 1.5}, 4999, 1007.0)
    sink.add_sheet('no such file', 4999)
    sink.close()
    assert events.scalars == [('a', 1.5, 4, 7.0)] and events.is_closed


def test_tensorboard_is_used_if_there_and_a_line_says_if_not(monkeypatch, tmp_path, capsys):
    module = types.ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = Events
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    monkeypatch.setattr(torch.utils, 'tensorboard', module, raising=False)
    (sink,) = open_sinks(tmp_path, 0.0, wandb=False)
    assert sink._writer.folder == str(tmp_path)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    monkeypatch.delattr(torch.utils, 'tensorboard')
    assert open_sinks(tmp_path, 0.0, wandb=False) == []
    assert 'pip install tensorboard' in capsys.readouterr().out


def test_wandb_is_not_touched_unless_asked_for(use, tmp_path, monkeypatch):
    module = use(FakeWandb())
    monkeypatch.setattr(sinks, '_import_tensorboard', lambda: None)
    assert open_sinks(tmp_path, 0.0, wandb=False) == [] and not module.inits
    (sink,) = open_sinks(tmp_path, 0.0, wandb=True)
    assert isinstance(sink, WandbSink)


def test_without_the_module_the_user_is_told_how_to_get_it(use, tmp_path):
    use(None)
    with pytest.raises(UserError, match=r'--wandb=1: .*pip install wandb'):
        open_sinks(tmp_path, 0.0, wandb=True)


def test_a_run_is_named_as_its_folder_and_has_its_options(use, run_dir, capsys):
    (run_dir / 'training_options.json').write_text(json.dumps({'batch_size': 8}))
    module = use(FakeWandb(api_key='key'))
    WandbSink(run_dir)
    (settings,) = module.inits
    assert settings['name'] == '00003-cats' and settings['config'] == {'batch_size': 8}
    assert settings['mode'] is None and settings['resume'] == 'allow' and settings['dir'] == str(run_dir)
    assert settings['project'] and module.axis == ('*', 'kimg') and capsys.readouterr().out == ''


@pytest.mark.parametrize('text', [None, '{"broken', '[1]'])
def test_options_that_cannot_be_read_do_not_matter(use, run_dir, text):
    if text is not None:
        (run_dir / 'training_options.json').write_text(text)
    module = use(FakeWandb())
    WandbSink(run_dir)
    assert module.inits[0]['config'] == {}


def test_without_a_login_nobody_is_asked_and_the_run_is_recorded_offline(use, run_dir, capsys):
    module = use(FakeWandb())
    WandbSink(run_dir)
    assert module.inits[0]['mode'] == 'offline' and 'resume' not in module.inits[0]
    assert 'not logged in' in capsys.readouterr().out


@pytest.mark.parametrize('known', [False, True])
def test_newer_releases_are_asked_for_a_login_without_a_prompt(use, run_dir, known):
    module = use(FakeWandb())
    module.login = lambda prompt, verify: known and not prompt and not verify
    WandbSink(run_dir)
    assert module.inits[0]['mode'] == (None if known else 'offline')


@pytest.mark.parametrize('mode, passed', [('offline', 'offline'), ('disabled', None), ('online', None)])
def test_the_mode_in_the_environment_is_honoured(use, run_dir, monkeypatch, capsys, mode, passed):
    monkeypatch.setenv('WANDB_MODE', mode)
    monkeypatch.setenv('WANDB_PROJECT', 'mine')
    module = use(FakeWandb())
    WandbSink(run_dir)
    assert module.inits[0]['mode'] == passed and module.inits[0]['project'] is None
    assert capsys.readouterr().out == ''


def test_a_server_that_does_not_answer_means_offline(use, run_dir, capsys):
    module = use(FakeWandb(api_key='key', fail_init=True))
    WandbSink(run_dir)
    assert [settings['mode'] for settings in module.inits] == [None, 'offline']
    assert 'cannot be reached (no answer)' in capsys.readouterr().out


def test_a_continued_run_goes_on_in_the_same_place(use, run_dir, tmp_path):
    module = use(FakeWandb())
    WandbSink(run_dir)
    WandbSink(run_dir)
    WandbSink(tmp_path)
    first, second, other = [settings['id'] for settings in module.inits]
    assert first == second != other and first.isalnum()


def test_scalars_and_small_sheets_are_logged_over_kimg(use, run_dir):
    module = use(FakeWandb())
    sink = WandbSink(run_dir)
    sink.add_scalars({'a': 1.0}, 1500, 0.0)
    PIL.Image.fromarray(np.zeros([1000, 4000], dtype=np.uint8)).save(run_dir / 'fakes.png')
    sink.add_sheet(run_dir / 'fakes.png', 2000)
    sink.close()
    assert module.logs == [{'a': 1.0, 'kimg': 1.5}, {'fakes': (1280, 320), 'kimg': 2.0}]
    assert module.is_finished


def test_failures_cost_one_line_and_not_the_run(use, run_dir, capsys):
    sink = WandbSink(run_dir) if use(FakeWandb(fail_log=True)) else None
    capsys.readouterr()
    for _ in range(3):
        sink.add_scalars({'a': 1.0}, 0, 0.0)
    sink.add_sheet(run_dir / 'missing.png', 0)
    sink.close()
    assert capsys.readouterr().out.count('training continues') == 1
