# SPDX-License-Identifier: Apache-2.0
"""What --network may name, and in which forms networks are found in a file."""
import copy
import io
import os
import pickle

import hostile_files
import pytest
import torch
from local_server import local_server
from small_networks import save_small_network, small_discriminator, small_generator
from small_run import SmallRun, small_config

import legacy
from dnnlib import download
from dnnlib.util import UserError
from scripts.fuzz_pickles import BarePickler
from training import networks
from training.formats import safetensors_file
from training.formats.load import load_bytes, network_path
from training.run import snapshots

G, D = small_generator(), small_discriminator()
EMA = copy.deepcopy(G)
with torch.no_grad():
    EMA.mapping.fc0.bias.add_(1)


def pickled(value):
    stream = io.BytesIO()
    BarePickler(stream, protocol=4).dump(value)
    return stream.getvalue()


def saved(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def equal(net, other):
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


FORMS = {
    'a generator': (EMA, {'G_ema': EMA}), 'a discriminator': (D, {'D': D}),
    'a tuple as published': ((G, D, EMA), {'G': G, 'D': D, 'G_ema': EMA}),
    'a list of another order': ([D, EMA], {'D': D, 'G_ema': EMA}),
    'other letters': ({'g_ema': EMA, 'g': G, 'd': D}, {'G': G, 'D': D, 'G_ema': EMA}),
    'other names': ({'model': EMA, 'step': 3}, {'G_ema': EMA}),
    'the published dict': ({'G': G, 'D': None, 'G_ema': EMA}, {'G': G, 'G_ema': EMA})}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('write', [pickled, saved, lambda v: saved(v, _use_new_zipfile_serialization=False)],
                         ids=['pickle', 'torch.save', 'torch.save of old'])
def test_networks_are_found_in_every_form(form, write):
    value, expected = FORMS[form]
    data = write(value)
    found = load_bytes(data, 'x')
    assert {key for key in legacy.NETWORKS if found[key] is not None} == set(expected)
    assert all(equal(found[key], net) for key, net in expected.items())


def test_trust_executes_whole_modules_of_torch_save(monkeypatch):
    monkeypatch.setattr(networks.Generator, '_orig_module_src', 'raise RuntimeError("it ran")')
    data = saved(G)
    assert equal(load_bytes(data, 'x').G_ema, G)
    with pytest.raises(UserError, match='it ran'):
        load_bytes(data, 'x', trust_pickle=True)


def test_a_module_of_another_program_is_refused_with_its_name():
    with pytest.raises(UserError, match=r'asks for torch\.nn\.modules\.linear\.Linear, which is not among'):
        load_bytes(saved(torch.nn.Linear(1, 1)), 'x')


@pytest.mark.parametrize('value', [{}, [], {'a': 1}, 7, {'G': None}, {'a': torch.ones(1)}])
def test_files_without_networks_are_refused(value):
    for data in (pickle.dumps(value), saved(value)):
        with pytest.raises(UserError, match=r'^x: holds'):
            load_bytes(data, 'x')


@pytest.fixture(scope='module')
def state_file(tmp_path_factory):
    run = SmallRun(small_config())
    parts = run.state.state_dict()
    path = tmp_path_factory.mktemp('run') / 'training-state-000001.pt'
    payload = snapshots.make_payload(run.config.to_options(), **parts)
    with open(path, 'w+b') as file:
        snapshots.write_state(file, payload)
    return path, run.state, payload


def test_a_training_state_is_a_network_file(state_file):
    path, state, _ = state_file
    found = legacy.load_network(path)
    assert equal(found.G_ema, state.G_ema) and equal(found.G, state.G) and equal(found.D, state.D)
    assert found.G_ema.synthesis.b8.conv1.use_noise and found.training_set_kwargs['path'] == 'x'


@pytest.mark.parametrize('change', [
    lambda p: p['run'].pop('G'), lambda p: p['run'].update(D={}), lambda p: p.update(run=3),
    lambda p: p['config'].pop('G_kwargs'), lambda p: p.update(config=[1]),
    lambda p: p['run'].update(G_ema={'a': 1}), lambda p: p['config'].update(G_kwargs=7),
    lambda p: p['run']['G'].popitem(),
    lambda p: p['config']['training_set_kwargs'].update(resolution='x')])
def test_a_whole_training_state_without_some_parts_is_refused_in_one_line(change, state_file, tmp_path):
    payload = copy.deepcopy(state_file[2])
    change(payload)
    with open(tmp_path / 'a.pt', 'w+b') as file:
        snapshots.write_state(file, payload)
    with pytest.raises(UserError, match=r'a\.pt') as error:
        legacy.load_network(tmp_path / 'a.pt')
    assert str(error.value).isprintable()


def test_a_run_directory_stands_for_its_newest_snapshot(tmp_path):
    with pytest.raises(UserError, match=r'without network-snapshot-\*\.pkl'):
        legacy.load_network(tmp_path)
    for name in ('network-snapshot-000002.pkl', 'network-snapshot-000010.safetensors',
                 'training-state-000010.pt', 'fakes000020.png', 'best-network-snapshot-000030.pkl',
                 'network-snapshot-000040.txt'):
        (tmp_path / name).touch()
    assert network_path(str(tmp_path)).endswith('network-snapshot-000010.safetensors')
    save_small_network(tmp_path / 'network-snapshot-000010.pkl')
    assert legacy.load_network(tmp_path).G_ema.img_resolution == 16
    (tmp_path / 'training-state-000011.pt').touch()
    assert network_path(str(tmp_path)).endswith('training-state-000011.pt')


def test_the_folder_of_several_runs_names_one_of_them(tmp_path):
    for name in ('00000-a', '00001-b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'training_options.json').touch()
    with pytest.raises(UserError, match='holds runs, such as 00001-b'):
        legacy.load_network(tmp_path)


@pytest.mark.parametrize('write', ['pkl', 'safetensors'])
@pytest.mark.parametrize('side', [16384, 2 ** 20])
def test_images_that_a_small_file_cannot_have_learned_are_refused_at_once(write, side, tmp_path):
    net = hostile_files.huge_claim(side)
    path = tmp_path / f'a.{write}'
    if write == 'pkl':
        path.write_bytes(pickled({'G_ema': net}))
    else:
        safetensors_file.write(path, {'G_ema': net})
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match=f'{side}x{side} pixels, for which its .* too few'):
        legacy.load_network(path)


def test_pipes_and_folders_in_the_place_of_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for name in ('pipe', '/dev/zero', 'a\0b', 'a\ud800b'):
        with pytest.raises(UserError, match=r'not a file|not the path|cannot be read'):
            legacy.load_network(tmp_path / name)


# --- Downloads

@pytest.fixture
def server(monkeypatch, tmp_path):
    pytest.importorskip('requests')
    monkeypatch.setattr(download, 'MAX_PAUSE_SEC', 0.0)
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    with local_server() as server:
        yield server


def cached(tmp_path):
    return list((tmp_path / 'cache' / 'downloads').iterdir())


@pytest.mark.parametrize('body', [
    b'<!DOCTYPE html><html>' + b'x' * 10_000, b'some words of an error', pickle.dumps({'a': 1}),
    saved(G)[:-100], pickled(G)[:-100], b'\x80'])
def test_only_networks_stay_in_the_cache(body, server, tmp_path):
    server.answers['/net.pkl'] = [(200, {}, body), (200, {}, pickled(G))]
    with pytest.raises(UserError, match=r'downloads/.*net\.pkl, has been deleted') as error:
        legacy.load_network(server.url + '/net.pkl')
    assert cached(tmp_path) == [] and str(error.value).isprintable()
    assert equal(legacy.load_network(server.url + '/net.pkl').G_ema, G) and len(cached(tmp_path)) == 1


def test_a_network_of_an_unsupported_kind_is_kept_and_named(server, tmp_path):
    server.answers['/net.pkl'] = [(200, {}, pickle.dumps({'G': os.getcwd}))]
    with pytest.raises(UserError, match=r'asks for .*; the download is kept as .*downloads/'):
        legacy.load_network(server.url + '/net.pkl')
    assert len(cached(tmp_path)) == 1
