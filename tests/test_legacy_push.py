# SPDX-License-Identifier: Apache-2.0
"""Networks on the Hugging Face Hub: publishing them, and opening them by their hf:// names."""
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from hub_stand_in import TOKEN, Repository, hub_stand_in
from small_networks import SYNTHESIS, save_small_network, small_generator
from source_tree import ROOT

import generate
import legacy
from dnnlib.util import UserError, file_sha256
from training import networks
from training.config.options import continues
from training.formats import hub
from training.run import publish
from training.transfer.weights import transfer

constants = pytest.importorskip('huggingface_hub.constants')
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:httpx2.*')
NAMES = ['README.md', 'config.json', 'model.safetensors', 'samples.png']


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stand-in for the Hub, to which this process is logged in, with an empty cache."""
    with hub_stand_in() as running:
        # huggingface_hub has read the environment when it was imported.
        monkeypatch.setattr(constants, 'ENDPOINT', running.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            running.url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield running


def make_run(folder):
    """A run directory with a snapshot; returns the path of its network."""
    folder.mkdir()
    data = {'path': '/home/ada/private/moths.zip', 'max_size': 120, 'resolution': 16}
    options = {'training_set_kwargs': data, 'run_dir': str(folder), 'batch_size': 8, 'num_gpus': 1,
               'batch_gpu': 8, 'loss_kwargs': {'r1_gamma': 0.5}, 'resume_pkl': r'C:\nets\before|after.pkl'}
    (folder / 'training_options.json').write_text(json.dumps(options))
    rows = [{'results': {'fid50k_full': value}, 'snapshot_pkl': f'network-snapshot-{kimg:06d}.pkl'}
            for kimg, value in ((8, 99.5), (12, 12.3456), (16, 77.5))]
    (folder / 'metric-fid50k_full.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(save_small_network(folder / 'network-snapshot-000012.pkl'))


def images(network):
    with torch.no_grad():
        return legacy.load_network(network).G_ema(torch.ones(2, 8), None, noise_mode='const')


def refusal(call, *args, **kwargs):
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert str(error.value).isprintable()
    return str(error.value)


def run(*args):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        with pytest.raises(SystemExit) as ended:
            legacy.main([str(arg) for arg in args])
    return ended.value.code, output.getvalue()


def test_a_folder_gets_weights_config_samples_and_a_card_of_the_run(tmp_path):
    network = make_run(tmp_path / 'run')
    status, text = run('push', '--source', network, '--dest', tmp_path / 'out', '--license=cc-by-4.0')
    assert status == 0 and f'Written to {tmp_path / "out"}' in text
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == NAMES
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert card.startswith('---\nlicense: cc-by-4.0\nlibrary_name: stylegan2-ada-clean\n')
    for text in ('16x16 pixels, 3 channels.', '| Images shown | 12 kimg |', '| Data | moths.zip |',
                 '| R1 gamma | 0.5 |', r'| Fine-tuned from | before\|after.pkl |', '| fid50k_full | 12.35 |',
                 '![Seeds 0 to 15, without truncation](samples.png)', '--network=model.safetensors'):
        assert text in card
    assert '99.5' not in card and '77.5' not in card
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['networks']['G_ema']['init_kwargs']['img_resolution'] == 16
    assert config['training_options']['batch_size'] == 8
    assert torch.equal(images(tmp_path / 'out' / 'model.safetensors'), images(network))


def test_nothing_that_is_written_names_the_folders_of_this_machine(tmp_path):
    contents = {'G_ema': small_generator(), 'training_set_kwargs': {'path': '/home/ada/private/moths.zip'}}
    (tmp_path / 'run').mkdir()
    network = make_run(tmp_path / 'run2')
    Path(network).write_bytes(pickle.dumps(contents))
    publish.push_to_hub(network, tmp_path / 'out')
    for path in (tmp_path / 'out').iterdir():
        data = path.read_bytes()
        assert b'private' not in data and str(tmp_path).encode() not in data, path.name
    assert legacy.load_network(tmp_path / 'out' / 'model.safetensors').training_set_kwargs == {
        'path': 'moths.zip'}


def test_a_lone_conditional_network_gets_a_card_too(tmp_path):
    network = save_small_network(tmp_path / 'net.pkl', c_dim=2)
    publish.push_to_hub(network, tmp_path / 'out')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '2 classes' in card and '--class=0' in card and 'Not stated' in card
    assert 'license' not in card and '## Training' not in card and '## Metrics' not in card


def test_a_network_whose_images_are_no_png_has_no_sheet(tmp_path):
    publish.push_to_hub(save_small_network(tmp_path / 'net.pkl', img_channels=5), tmp_path / 'out')
    assert not (tmp_path / 'out' / 'samples.png').exists()
    assert 'samples.png' not in (tmp_path / 'out' / 'README.md').read_text()


def test_what_cannot_be_published_is_refused_and_leaves_nothing(tmp_path):
    network = save_small_network(tmp_path / 'net.pkl')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine.txt').touch()
    (tmp_path / 'empty.pkl').write_bytes(pickle.dumps({'G': small_generator()}))
    before = sorted(tmp_path.rglob('*'))
    push = publish.push_to_hub
    assert 'exists' in refusal(push, network, tmp_path / 'full')
    assert 'exists' in refusal(push, network, network)
    assert 'no G_ema' in refusal(push, tmp_path / 'empty.pkl', tmp_path / 'out')
    assert '--license=CC BY' in refusal(push, network, tmp_path / 'out', license='CC BY')
    assert 'without model.safetensors' in refusal(push, tmp_path / 'full', 'hf://me/x')
    assert 'cannot be written' in refusal(push, network, network / 'below')
    assert sorted(tmp_path.rglob('*')) == before


def test_a_network_comes_back_from_the_hub_to_the_bit(server, tmp_path):
    network = make_run(tmp_path / 'run')
    status, text = run('push', '--source', network, '--dest=hf://me/moths', '--private')
    assert status == 0 and f'Uploaded to {server.url}/me/moths' in text
    repository = server.repositories['me/moths']
    assert sorted(repository.revisions['main']) == NAMES and repository.private
    assert repository.revisions['main']['model.safetensors'][1]
    assert '--network=hf://me/moths ' in repository.revisions['main']['README.md'][0].decode()
    assert torch.equal(images('hf://me/moths'), images(network))
    assert torch.equal(images('hf://me/moths@main/model.safetensors'), images(network))
    assert 'Generator of 16x16' in run('inspect', 'hf://me/moths')[1]


def test_a_prepared_folder_is_uploaded_as_it_is(server, tmp_path):
    publish.push_to_hub(save_small_network(tmp_path / 'net.pkl'), tmp_path / 'out')
    (tmp_path / 'out' / 'README.md').write_text('# Mine\n')
    publish.push_to_hub(tmp_path / 'out', 'hf://me/moths')
    publish.push_to_hub(tmp_path / 'out', 'hf://me/moths')  # again: nothing has changed
    assert server.repositories['me/moths'].revisions['main']['README.md'][0] == b'# Mine\n'
    assert 'give hf://' in refusal(publish.push_to_hub, tmp_path / 'out', tmp_path / 'again')
    assert 'edit' in refusal(publish.push_to_hub, tmp_path / 'out', 'hf://me/moths', license='mit')


def test_a_second_download_only_asks_whether_the_file_has_changed(server, tmp_path):
    publish.push_to_hub(save_small_network(tmp_path / 'net.pkl'), 'hf://me/moths')
    for downloads in (1, 0):
        server.requests.clear()
        images('hf://me/moths')
        assert sum(line.startswith('GET') for line in server.requests) == downloads


def put_pickle(server, name='net__pkl', revision='main', **changes):
    repository = server.repositories.setdefault('me/moths', Repository())
    repository.put(revision, **{name: pickle.dumps({'G_ema': small_generator(**changes)})})


def test_a_repository_with_one_network_of_another_name_opens(server):
    put_pickle(server)
    server.repositories['me/moths'].put(README__md=b'# Moths')
    assert legacy.load_network('hf://me/moths').G_ema.img_resolution == 16
    put_pickle(server, 'other__pkl')
    assert '(net.pkl, other.pkl)' in refusal(legacy.load_network, 'hf://me/moths')
    assert legacy.load_network('hf://me/moths/other.pkl').G_ema.img_resolution == 16
    server.repositories['me/moths'] = Repository()
    assert 'no network file' in refusal(legacy.load_network, 'hf://me/moths')


@pytest.mark.parametrize('revision', ['v2', 'refs/pr/1', 'feature/x'])
def test_a_revision_is_found(server, revision):
    put_pickle(server)
    put_pickle(server, revision=revision, img_resolution=8)
    written = revision.replace('/x', '%2Fx')
    for name in (f'hf://me/moths@{written}', f'hf://me/moths@{written}/net.pkl'):
        assert legacy.load_network(name).G_ema.img_resolution == 8
    assert legacy.load_network('hf://me/moths').G_ema.img_resolution == 16


def test_weights_to_fine_tune_from_may_be_on_the_hub(server, tmp_path):
    publish.push_to_hub(save_small_network(tmp_path / 'net.pkl'), 'hf://me/moths')
    fresh = networks.Generator(8, 0, 8, 16, 3, mapping_kwargs={'num_layers': 2}, synthesis_kwargs=SYNTHESIS)
    transfer('hf://me/moths', {'G_ema': fresh})
    assert torch.equal(fresh.mapping.fc0.weight, small_generator().mapping.fc0.weight)
    assert not continues('hf://me/moths')


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_of_the_hub_is_executed(server, tmp_path):
    repository = server.repositories.setdefault('me/moths', Repository())
    repository.put(net__pkl=pickle.dumps({'G_ema': Attack(tmp_path / 'ran')}))
    refusal(legacy.load_network, 'hf://me/moths')
    assert '--trust-pickle' in refusal(legacy.load_network, 'hf://me/moths', trust_pickle=True)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['hf://', 'hf://moths', 'hf://me/moths@', 'hf://me/moths/', 'hf://me/../x/y'
                                  '@a@b', 'hf://datasets//x', 'hf://me/mo ths'])
def test_a_name_of_another_form_is_refused(name):
    assert refusal(legacy.load_network, name).startswith(name)


def test_what_the_hub_does_not_have_is_named(server):
    put_pickle(server)
    load = legacy.load_network
    assert 'no such repository' in refusal(load, 'hf://me/butterflies')
    assert 'no revision v9' in refusal(load, 'hf://me/moths@v9')
    assert 'no file x.pkl' in refusal(load, 'hf://me/moths/x.pkl')


@pytest.mark.parametrize('name', ['hf://me/..', 'hf://me/moths/../../net.pkl', 'hf://me/moths@../x.pkl'])
def test_no_name_leads_out_of_the_cache(server, name):
    put_pickle(server)
    assert refusal(legacy.load_network, name).startswith(name)


def test_a_private_repository_needs_the_token(server, monkeypatch):
    put_pickle(server)
    server.repositories['me/moths'].private = True
    assert legacy.load_network('hf://me/moths/net.pkl').G_ema is not None
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', constants.HF_HUB_CACHE + '2')
    assert 'needs a token' in refusal(legacy.load_network, 'hf://me/moths/net.pkl')
    assert 'token' in refusal(hub.upload, '.', 'hf://me/other')
    monkeypatch.delenv('HF_TOKEN')
    assert 'needs a token; run `hf auth login`' in refusal(publish.push_to_hub, 'absent.pkl', 'hf://me/moths')


def test_offline_the_cache_serves_and_the_rest_is_named(server, tmp_path, monkeypatch):
    publish.push_to_hub(save_small_network(tmp_path / 'net.pkl'), 'hf://me/moths')
    before = images('hf://me/moths')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    server.requests.clear()
    assert torch.equal(images('hf://me/moths'), before) and not server.requests
    assert 'not in the cache' in refusal(legacy.load_network, 'hf://me/other')
    assert 'HF_HUB_OFFLINE' in refusal(publish.push_to_hub, tmp_path / 'net.pkl', 'hf://me/moths')


def test_an_upload_to_an_unknown_branch_or_file_is_refused(server, tmp_path):
    network = save_small_network(tmp_path / 'net.pkl')
    assert 'no revision v9' in refusal(publish.push_to_hub, network, 'hf://me/moths@v9')
    assert 'fixed file names' in refusal(publish.push_to_hub, network, 'hf://me/moths/net.pkl')


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert 'extra `hub`' in refusal(legacy.load_network, 'hf://me/moths')


def test_a_program_takes_endpoint_cache_and_token_from_the_environment(tmp_path):
    network = make_run(tmp_path / 'run')
    code = (f'import legacy, generate\nlegacy.push_to_hub({network!r}, "hf://me/moths", private=True)\n'
            f'generate.main(["--network=hf://me/moths", "--seeds=1", "--outdir={tmp_path}/hub"])\n')
    with hub_stand_in() as running:
        env = {**os.environ, 'HF_ENDPOINT': running.url, 'HF_HOME': str(tmp_path / 'hf'), 'HF_TOKEN': TOKEN,
               'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1'}
        subprocess.run([sys.executable, '-c', code], env=env, cwd=ROOT, check=True)
    assert (tmp_path / 'hf' / 'hub' / 'models--me--moths').is_dir()
    with pytest.raises(SystemExit):
        generate.main([f'--network={network}', '--seeds=1', f'--outdir={tmp_path}/local'])
    # Their texts differ, which name the network and its hash.
    images = [PIL.Image.open(tmp_path / name / 'seed0001.png') for name in ('hub', 'local')]
    assert images[0].tobytes() == images[1].tobytes()
    weights, = (tmp_path / 'hf').rglob('model.safetensors')
    assert file_sha256(weights) in str(images[0].info)
