# SPDX-License-Identifier: Apache-2.0
"""The wheel: built from the checkout and from the source distribution, installed beside modules of our names,
and used.
"""
import io
import multiprocessing
import os
import pickle
import pickletools
import zipfile

import pytest
import torch
from golden_cases import ROOT
from resume_cases import write_images
from small_networks import last_snapshot
from wheel_cases import FOREIGN, Venv, build, copy_of_tree, foreign_wheels, python

import generate
import legacy
import train
from dnnlib import naming
from torch_utils import distributed

pytest.importorskip('build')
pytestmark = pytest.mark.filterwarnings('ignore:TypedStorage is deprecated')
SCRIPTS = ['sg2-train', 'sg2-generate', 'sg2-style-mixing', 'sg2-projector', 'sg2-dataset-tool',
           'sg2-calc-metrics', 'sg2-legacy', 'sg2-profile-step', 'stylegan2-ada-doctor']
DATA = ['training/datasets/*.zip', 'training/datasets/*.json', 'training/formats/*.safetensors',
        'training/report/page.[!p]*', 'torch_utils/ops/csrc/*']
MAX_WHEEL_BYTES = 15e6
# Two steps per kimg.
RUN = ['--data=images', '--cfg=demo', '--batch=500', '--batch-gpu=250', '--snap=1', '--cbase=32', '--cmax=4',
       '--device=cpu', '--metrics=none', '--workers=0', '--cache=off']
GENERATE = ['--seeds=0-2', '--noise-mode=const', '--device=cpu']


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return copy_of_tree(tmp_path_factory.mktemp('tree') / 'checkout')


@pytest.fixture(scope='module')
def built(tree, tmp_path_factory):
    """Source distribution, and a wheel that was built from it."""
    return build(tree, tmp_path_factory.mktemp('dist'))


@pytest.fixture(scope='module')
def plain(built, tmp_path_factory):
    """An environment that has the wheel."""
    return Venv.create(tmp_path_factory.mktemp('plain') / 'venv', built['.whl'])


@pytest.fixture(scope='module')
def crowded(built, tmp_path_factory):
    """An environment that has the wheel and others' modules of our names."""
    folder = tmp_path_factory.mktemp('crowded')
    return Venv.create(folder / 'venv', *foreign_wheels(folder), built['.whl'])


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with images, and programs of the user that are no business of ours."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'images').mkdir()
    write_images(folder / 'images')
    (folder / 'training').mkdir()
    for name in ('training/__init__.py', 'metrics.py', 'legacy.py'):
        (folder / name).write_text(f'raise SystemExit({name!r})\n', encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def run_dir(crowded, work):
    """Of a training by two processes of the installed program."""
    crowded.run('sg2-train', *RUN, '--kimg=1', '--gpus=2', '--outdir=installed', cwd=work)
    (run_dir,) = (work / 'installed').iterdir()
    return run_dir


def test_the_wheel_is_one_small_package_with_all_modules_and_data(built, tree, tmp_path):
    direct = build(tree, tmp_path, '--wheel')
    with zipfile.ZipFile(built['.whl']) as wheel, zipfile.ZipFile(direct['.whl']) as other:
        held = {name.partition('/')[2]: wheel.read(name).decode('utf-8', errors='replace')
                for name in wheel.namelist() if name.startswith('stylegan2_ada/')}
        assert {name.partition('/')[0] for name in wheel.namelist()} == {
            'stylegan2_ada', built['.whl'].name.replace('-py3-none-any.whl', '.dist-info')}
        assert {f.filename: f.CRC for f in wheel.infolist()} == {f.filename: f.CRC for f in other.infolist()}
    assert built['.whl'].stat().st_size <= MAX_WHEEL_BYTES
    modules = {name for name in held if name.endswith('.py')}
    data = [path for pattern in DATA for path in tree.glob(pattern)]
    assert held.keys() - modules == {path.relative_to(tree).as_posix() for path in data}
    for name in modules:
        of_tree = tree / ('stylegan2_ada/__init__.py' if name == '__init__.py' else name)
        assert naming.source_in_checkout(held[name]) == of_tree.read_text(encoding='utf-8'), name


def test_the_metadata_are_complete(built, plain):
    python('-m', 'twine', 'check', '--strict', *built.values())
    assert 'No broken requirements' in python('-m', 'pip', '--python', plain.program('python'), 'check')


def test_every_console_script_explains_itself(crowded, work):
    assert {path.name for path in crowded.program('.').iterdir()} >= {*SCRIPTS}
    # In one process, which imports PyTorch once.
    told = crowded.run_code('''
        import runpy, sys
        for script in sys.argv[1:]:
            sys.argv = [script, '--help']
            try:
                runpy.run_path(script, run_name='__main__')
            except SystemExit as left:
                assert not left.code, script
        ''', *map(crowded.program, SCRIPTS), cwd=work)
    assert told.lower().count('usage:') == len(SCRIPTS)


def test_a_command_that_needs_no_pytorch_does_not_import_it(crowded):
    crowded.run_code('''
        import sys
        import stylegan2_ada.train, stylegan2_ada.dataset_tool
        assert stylegan2_ada.__version__
        assert 'torch' not in sys.modules
        ''')


def contents(path):
    """Everything in a pickle, in order: names, source code, the numbers of tensors, and so on."""
    remembered, value = [], None
    with open(path, 'rb') as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == 'MEMOIZE':
                remembered.append(value)
            elif opcode.name != 'FRAME':  # which of equal strings are one object depends on the process
                value = remembered[argument] if 'BINGET' in opcode.name else argument
                yield torch.load(io.BytesIO(value)).tolist() if isinstance(value, bytes) else value


def test_training_writes_the_same_files_as_a_checkout(run_dir, work):
    def train_in_checkout():
        distributed.START_METHOD = 'fork'  # without importing PyTorch again
        os.chdir(work)
        train.main([*RUN, '--kimg=1', '--gpus=2', '--outdir=checkout'])
    process = multiprocessing.get_context('fork').Process(target=train_in_checkout)
    process.start()
    process.join()
    (other,) = (work / 'checkout').iterdir()
    names = sorted(path.name for path in other.glob('network-snapshot-*.pkl'))
    assert len(names) == 2
    for name in names:
        assert [*contents(run_dir / name)] == [*contents(other / name)], name
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in other.iterdir()}


def test_images_are_those_of_a_checkout(run_dir, crowded, work):
    crowded.run('sg2-generate', f'--network={last_snapshot(run_dir)}', '--outdir=out', *GENERATE, cwd=work)
    with pytest.raises(SystemExit) as left:
        generate.main([f'--network={last_snapshot(run_dir)}', f'--outdir={work / "same"}', *GENERATE])
    assert not left.value.code
    images = sorted((work / 'out').glob('*.png'))
    assert len(images) == 3
    assert [p.read_bytes() for p in images] == [p.read_bytes() for p in sorted((work / 'same').glob('*.png'))]


def test_a_run_is_resumed(run_dir, crowded, work):
    # With -m the folder of the user's programs is on the path.
    crowded.run('python', '-m', 'stylegan2_ada.train', *RUN, '--kimg=2', '--outdir=installed', '--gpus=1',
                '--resume=latest', '--allow-changes=1', cwd=work)
    names = {path.name for path in run_dir.iterdir()}
    assert {'network-snapshot-000001.pkl', 'network-snapshot-000002.pkl'} <= names


@pytest.fixture(scope='module')
def snapshot(run_dir):
    return run_dir / 'network-snapshot-000001.pkl'


@pytest.fixture(scope='module')
def expected(snapshot):
    """Images of the snapshot in this process, where torch_utils is the checkout's."""
    with open(snapshot, 'rb') as file:
        G = pickle.load(file)['G_ema']
    z = torch.randn([2, G.z_dim], generator=torch.Generator().manual_seed(0))
    images = G(z, None, noise_mode='const')
    assert torch.equal(images, legacy.load_network(snapshot).G_ema(z, None, noise_mode='const'))
    return {'z': z, 'images': images}


@pytest.fixture
def use(snapshot, expected, tmp_path):
    """Run code after these lines in an environment."""
    torch.save(expected, tmp_path / 'expected.pt')
    code = f'''
import copy, io, pickle, sys
import torch
import stylegan2_ada
expected, path = torch.load({str(tmp_path / "expected.pt")!r}), {str(snapshot)!r}

def load():
    with open(path, 'rb') as file:
        return pickle.load(file)['G_ema']

def check_images(G):
    assert torch.equal(G(expected['z'], None, noise_mode='const'), expected['images'])

def message_of(function):
    try:
        function()
    except ImportError as error:
        return str(error)
'''
    return lambda venv, more: venv.run_code(code + more)


def test_pickles_open_after_the_import(plain, use):
    use(plain, '''
# Where the module of the same source code is, its classes are used.
from stylegan2_ada.training import networks
G = networks.Generator(16, 0, 16, 8, 3)
assert type(load()) is type(pickle.loads(pickle.dumps(G))) is networks.Generator
check_images(load())
check_images(stylegan2_ada.load_network(path).G_ema)
data = pickle.dumps(G)
assert b'ctorch_utils.persistence' in pickle.dumps(G, 0) and b'stylegan2_ada' not in data
check_images(copy.deepcopy(pickle.loads(pickle.dumps(load()))))
type(G)._orig_module_src += '\\n# Changed.\\n'
assert type(pickle.loads(pickle.dumps(G))) is not networks.Generator
import torch_utils.ops.bias_act, dnnlib
assert torch_utils.ops.bias_act is stylegan2_ada.torch_utils.ops.bias_act
assert dnnlib.EasyDict is stylegan2_ada.dnnlib.EasyDict
assert dnnlib.__spec__.name == 'stylegan2_ada.dnnlib'
from importlib import metadata
assert metadata.version('stylegan2-ada-clean') == stylegan2_ada.__version__
assert set(metadata.packages_distributions()['stylegan2_ada']) == {'stylegan2-ada-clean'}
''')


def test_modules_of_others_stay_theirs_and_are_named_where_a_pickle_needs_ours(crowded, use):
    use(crowded, f'''
for name in {list(FOREIGN)}:
    assert __import__(name).WHOSE == name
message = message_of(load)
assert 'torch_utils.persistence' in message and 'site-packages' in message and 'load_network' in message
message = message_of(lambda: pickle.loads(b'cdnnlib.util\\nEasyDict\\n.'))
assert 'dnnlib.util' in message and 'dnnlib.py' in message
G = stylegan2_ada.load_network(path).G_ema
check_images(G)
check_images(copy.deepcopy(G))
assert 'torch_utils.persistence' in message_of(lambda: pickle.dumps(G))
from stylegan2_ada.training.formats import load, pickled
check_images(load.load_network(path, trust_pickle=True).G_ema)
copied = pickled.save_network_snapshot(path + '.copy.pkl', G=None, D=None, G_ema=G)
path = str(copied)
check_images(stylegan2_ada.load_network(path).G_ema)
assert sys.modules['torch_utils'].WHOSE == 'torch_utils' and sys.modules['dnnlib'].WHOSE == 'dnnlib'
''')


def test_a_program_of_the_lineage_keeps_its_own_packages(plain, use, tmp_path):
    for package in ('torch_utils', 'dnnlib'):
        (tmp_path / package).symlink_to(ROOT / package)
    use(plain, f'''
sys.path.insert(0, {str(tmp_path)!r})
G = load()
check_images(G)
import torch_utils.ops.bias_act
assert torch_utils.__file__.startswith({str(tmp_path)!r})
ours = stylegan2_ada.load_network(path).G_ema
check_images(ours)
assert torch_utils is not stylegan2_ada.torch_utils
for network in (G, ours):
    check_images(pickle.loads(pickle.dumps(network)))
''')


def test_an_editable_installation_keeps_the_layout_of_the_checkout(tree, tmp_path):
    venv = Venv.create(tmp_path / 'venv', '--editable', tree)
    venv.run_code('''
        import training.config, stylegan2_ada.training.config, stylegan2_ada.train, train
        assert stylegan2_ada.training.config is training.config and stylegan2_ada.train is train
        assert train.__spec__.name == 'train' and 'torch' not in __import__('sys').modules
        ''')
    assert 'Usage: sg2-train' in venv.run('sg2-train', '--help')
