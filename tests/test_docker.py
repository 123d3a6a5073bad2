# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile and what lies beside it: linted, and every command run that needs neither Docker nor
root.
"""
import fnmatch
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.run
from source_tree import ROOT

import train
from torch_utils import custom_ops
from torch_utils.kernels import nvrtc
from torch_utils.kernels.cubin_cache import CubinCache
from torch_utils.ops import build
from torch_utils.ops.variants import all_variants

BIN = Path(sys.executable).parent
TOOLS = ('train', 'generate', 'style_mixing', 'calc_metrics', 'dataset_tool', 'legacy')
# What of the image only Docker can do, by the program that a command begins with, and why.
NOT_HERE = {'apt-get': 'changes the machine, and needs root and the packages of another system',
            'useradd': 'changes the machine, and needs root'}
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='shell scripts')


def instructions():
    """(instruction, argument) of the Dockerfile, continued lines joined."""
    text = (ROOT / 'Dockerfile').read_text().replace('\\\n', ' ')
    lines = [line for line in text.splitlines() if line and not line.startswith('#')]
    return [tuple(line.split(None, 1)) for line in lines]


def arguments(name):
    return [argument for instruction, argument in instructions() if instruction == name]


def defaults():
    """Build arguments that have a default."""
    return dict(pair.split('=', 1) for pair in arguments('ARG') if '=' in pair)


def command_of(program):
    """The one RUN that begins with a program, or contains it."""
    (found,) = [run for run in arguments('RUN') if program in run]
    return found


def shell(command, cwd, **environment):
    """A command as the image would run it, with this Python."""
    return subprocess.run(
        ['sh', '-ec', command], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, 'PATH': f'{BIN}:{os.environ["PATH"]}', **defaults(), **environment})


def is_sent(path):
    """Whether .dockerignore lets a path into the image."""
    sent = True
    for line in (ROOT / '.dockerignore').read_text().splitlines():
        pattern = line.removeprefix('!').removeprefix('**/')
        parts = [path, *path.parents] if '**' not in line else [Path(part) for part in path.parts]
        if line and line[0] != '#' and any(
                len(p.parts) == len(Path(pattern).parts) and fnmatch.fnmatch(str(p), pattern) for p in parts):
            sent = line.startswith('!')
    return sent


@pytest.fixture(scope='module')
def context(tmp_path_factory):
    """A copy of what docker build would be sent."""
    folder = tmp_path_factory.mktemp('context')
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True,
                            text=True, check=False).stdout.splitlines()
    paths = [Path(line) for line in listed] or [
        p.relative_to(ROOT) for p in ROOT.rglob('*') if '.venv' not in p.parts]
    for path in paths:
        if is_sent(path) and (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    return folder


def linter(name):
    return shutil.which(name, path=f'{BIN}:{os.environ["PATH"]}')


@pytest.mark.skipif(linter('hadolint') is None, reason='hadolint is not installed')
def test_hadolint_is_satisfied():
    done = subprocess.run(
        [linter('hadolint'), 'Dockerfile'], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, '')


@pytest.mark.skipif(linter('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck_is_satisfied():
    scripts = [*ROOT.glob('docker/*.sh'), *ROOT.glob('docker/*.sbatch')]
    done = subprocess.run([linter('shellcheck'), *scripts], capture_output=True, text=True, check=False)
    assert len(scripts) == 3 and (done.returncode, done.stdout) == (0, '')


def test_the_image_is_small_safe_and_starts_programs_directly():
    assert all(os.access(ROOT / 'docker' / f'{name}.sh', os.X_OK) for name in ('run', 'entrypoint'))
    assert re.fullmatch(r'[\w./-]+:[\w.-]*\d[\w.-]*', defaults()['BASE']), 'a base has a fixed version'
    for start, parts in {'apt-get': ('rm -rf /var/lib/apt/lists', '--no-install-recommends'),
                            'pip install': ('--no-cache-dir', '--constraint')}.items():
        assert all(part in command_of(start) for part in parts)
    assert arguments('USER')[-1].split(':')[0].isdigit() and arguments('USER')[-1] != '0:0'
    for name in ('ENTRYPOINT', 'CMD', 'VOLUME'):
        assert all(isinstance(part, str) for part in json.loads(arguments(name)[-1])), f'{name} in exec form'
    assert arguments('HEALTHCHECK') == ['NONE'] and not arguments('ADD')


def test_what_is_copied_exists_and_is_sent(context):
    sources = [part for copy in arguments('COPY') if '--from' not in copy for part in copy.split()[:-1]]
    assert len(sources) == 6 and all((context / source).exists() for source in sources)
    top = {path.name for path in context.iterdir()}
    assert {'train.py', 'LICENSE', 'NOTICE', 'training', 'docker'} <= top
    assert not top & {'tests', 'docs', '.git', '.venv', 'benchmarks', 'Dockerfile'}
    assert list((context / 'training' / 'datasets').glob('*.zip')), 'the images of the demo'


def test_every_command_of_the_image_is_run_here_or_cannot_be():
    run_below = ('-m venv', 'requirements.py', 'torch_utils.ops.build')
    for run in arguments('RUN'):
        assert any(part in run for part in run_below) != (run.split()[0] in NOT_HERE), run


def test_the_environment_is_made(tmp_path):
    command = command_of('-m venv').replace('/opt/venv', str(tmp_path / 'venv'))
    here = '.'.join(map(str, sys.version_info[:2]))
    # Without pip, which takes seconds to unpack.
    done = shell(command + ' --without-pip', tmp_path, PYTHON=here)
    assert done.returncode == 0 and (tmp_path / 'venv' / 'bin' / 'python').exists(), done.stderr


@pytest.fixture
def packages(tmp_path):
    """The folder in which the image's packages are chosen."""
    for source in ('pyproject.toml', 'requirements.lock', 'docker/requirements.py'):
        shutil.copy(ROOT / source, tmp_path)
    return tmp_path


needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason='tomllib came with Python 3.11')


@needs_tomllib
@pytest.mark.skipif(importlib.util.find_spec('pip') is None, reason='pip is not installed')
@pytest.mark.skipif(sys.platform == 'darwin', reason='CUDA is not there')
def test_the_locked_packages_satisfy_what_the_image_wants(packages):
    done = shell(command_of('pip install'), packages, PIP_DRY_RUN='1', PIP_NO_INDEX='1')
    assert done.returncode == 0, done.stderr
    assert 'Would install' not in done.stdout and 'Requirement already satisfied: torch' in done.stdout
    names = {re.match(r'[\w-]+', line)[0] for line in (packages / 'wanted.txt').read_text().splitlines()}
    assert {'torch', 'pyspng', 'lmdb', 'onnx', 'cuda-bindings'} <= names
    assert not names & {'pytest', 'ruff', 'mypy'}


@needs_tomllib
def test_another_pytorch_brings_its_own_cuda(packages):
    done = shell('python requirements.py --extras=cuda12 --torch=2.99.0+cu126 --out=.', packages)
    assert done.returncode == 0, done.stderr
    wanted, pinned = ((packages / name).read_text().splitlines() for name in ('wanted.txt', 'pinned.txt'))
    assert 'torch==2.99.0+cu126' in wanted and 'cuda-bindings==12.*' in wanted
    names = {re.match(r'[\w.-]+?(?===)', line)[0] for line in pinned}
    assert 'numpy' in names and not {n for n in names if n.split('-')[0] in ('torch', 'cuda', 'nvidia')}


@needs_tomllib
def test_an_unknown_extra_is_refused(packages):
    done = shell('python requirements.py --extras=cuda,nonsense --out=.', packages)
    assert done.returncode == 2 and 'nonsense' in done.stderr and not (packages / 'wanted.txt').exists()


@pytest.mark.skipif(nvrtc.problem() is not None, reason='NVRTC is not installed')
def test_kernels_are_compiled_from_the_operators_alone(context, tmp_path):
    cache = CubinCache(tmp_path / 'ops')
    plan = build.Plan(tuple((kernel, 'sm_80') for kernel in all_variants()), cache)
    # Two of two hundred show as much as all.
    for job in plan.jobs[2:]:
        cache.store(plan.key(job, nvrtc.release()), b'there already')
    for part in ('dnnlib', 'torch_utils'):
        shutil.copytree(context / part, tmp_path / part)
    command = command_of('ops.build').replace('/opt/cache/ops', str(cache.folder)) + ' --jobs=1'
    done = shell(command, tmp_path, ARCHS='sm_80')
    assert done.returncode == 0, done.stderr
    assert f'2 kernels built, {len(plan.jobs) - 2} already existed' in done.stdout
    assert all(cache.load(plan.key(job, nvrtc.release())).startswith(b'\x7fELF') for job in plan.jobs[:2])


@pytest.mark.skipif(nvrtc.problem() is not None, reason='NVRTC is not installed')
def test_the_compiler_knows_all_architectures_of_the_image():
    archs = build.parse_archs(defaults()['ARCHS'])
    assert {int(arch.removeprefix('sm_')) for arch in archs} <= set(nvrtc.architectures())


def test_every_tool_starts_from_what_the_image_holds(context):
    code = ('import runpy, sys\n'
            'for name in sys.argv[1:]:\n'
            '    sys.argv = [name, "--help"]\n'
            '    try:\n'
            '        runpy.run_path(name, run_name="__main__")\n'
            '    except SystemExit as end:\n'
            '        assert not end.code, name\n')
    done = subprocess.run([sys.executable, '-c', code, *(f'{tool}.py' for tool in TOOLS)], cwd=context,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, 'PYTHONPATH': str(context)})
    assert done.returncode == 0 and done.stdout.count('Usage:') == len(TOOLS), done.stderr


def enter(context, tmp_path, *args, cache):
    """docker/entrypoint.sh, with a kernel that the image has."""
    built = tmp_path / 'built'
    (built / 'ops').mkdir(parents=True, exist_ok=True)
    (built / 'ops' / 'a.cubin').write_bytes(b'code')
    script = (context / 'docker' / 'entrypoint.sh').read_text().replace('/opt/cache', str(built))
    (tmp_path / 'entrypoint.sh').write_text(script)
    command = f'sh {tmp_path}/entrypoint.sh "$ARGUMENT" "$REST"'
    return shell(command, context, DNNLIB_CACHE_DIR=str(cache), ARGUMENT=args[0], REST=args[1])


def test_without_arguments_the_doctor_runs_with_the_kernels_of_the_image(context, tmp_path):
    assert json.loads(arguments('ENTRYPOINT')[-1]) == ['tini', '--', '/app/docker/entrypoint.sh']
    done = enter(context, tmp_path, *json.loads(arguments('CMD')[-1]), cache=tmp_path / 'cache')
    assert done.returncode == 0 and 'Nothing is wrong.' in done.stdout, done.stdout + done.stderr
    assert f'{tmp_path}/cache/ops (1 kernels' in done.stdout


def test_a_cache_that_cannot_be_written_is_replaced_by_that_of_the_image(context, tmp_path):
    (tmp_path / 'file').write_text('')
    show = 'import os; print(os.environ["DNNLIB_CACHE_DIR"])'
    done = enter(context, tmp_path, '-c', show, cache=tmp_path / 'file')
    assert done.stdout.strip() == str(tmp_path / 'built') and 'is not writable' in done.stderr


def program(folder, name, body):
    """A stand-in for a program that is not here; returns the environment that finds it first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text('#!/bin/sh\n' + body)
    (folder / name).chmod(0o755)
    return {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}'}


def docker_run(tmp_path, *args, **settings):
    """(exit status, what docker gets, line by line, stderr) of docker/run.sh."""
    environment = program(tmp_path / 'bin', 'docker', 'for a in "$@"; do echo "$a"; done; exit 75\n')
    (tmp_path / 'data').mkdir(exist_ok=True)
    done = subprocess.run(
        [ROOT / 'docker' / 'run.sh', *args], cwd=tmp_path, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, env={**environment, 'HOME': str(tmp_path), **settings})
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_run_sh_gives_a_program_folders_rights_memory_and_gpus(tmp_path):
    status, got, _ = docker_run(tmp_path, 'train.py', '--data=/data/a b.zip')
    assert status == 75, 'the status of the run comes through'
    assert got[-3:] == ['stylegan2-ada-clean', 'train.py', '--data=/data/a b.zip'] and got[0] == 'run'
    pairs = dict(itertools.pairwise(got))
    assert pairs['--user'] == f'{os.getuid()}:{os.getgid()}' and pairs['--shm-size'] == '8g'
    assert pairs['--gpus'] == 'all' and '--tty' not in got
    real = tmp_path.resolve()
    for mount in (f'{real}/data:/data:ro', f'{real}/runs:/runs', f'{real}/.cache/dnnlib:/cache'):
        assert mount in got and Path(mount.split(':')[0]).is_dir()


def test_run_sh_passes_options_on_to_docker_and_takes_settings(tmp_path):
    options = ('--network=host', '--env', 'A=b c')
    _, got, _ = docker_run(tmp_path, *options, '--', '-m', 'x', GPUS='none', IMAGE='mine')
    assert got[-6:] == ['--network=host', '--env', 'A=b c', 'mine', '-m', 'x'] and '--gpus' not in got


def test_run_sh_without_arguments_explains_itself(tmp_path):
    status, got, _ = docker_run(tmp_path)
    assert status == 0 and got[0].startswith('Runs a program') and any('GPUS' in line for line in got)
    assert not any(line.startswith('#') for line in got) and not (tmp_path / 'runs').exists()


def test_run_sh_refuses_a_missing_dataset_in_one_line(tmp_path):
    status, got, error = docker_run(tmp_path, 'train.py', DATA='/nowhere')
    assert status == 2 and got == [] and error.count('\n') == 1 and 'DATA=/nowhere' in error


class Slurm:
    """docker/train.sbatch among stand-ins: `step` is what srun does."""

    def __init__(self, tmp_path, step, nodes=1):
        self.log = tmp_path / 'log'
        bin_ = tmp_path / 'bin'
        program(bin_, 'scontrol',
                'if [ "$1" = show ]; then printf "m1\\nm2\\n"; else echo "$@" >> "$LOG"; fi\n')
        environment = program(
            bin_, 'srun', 'for a in "$@"; do echo "$a"; done >"$LOG.args"\n' + step)
        environment |= {'LOG': str(self.log), 'SLURM_JOB_ID': '7', 'SLURM_NNODES': str(nodes),
                        'SLURM_GPUS_ON_NODE': '8', 'SLURM_JOB_NODELIST': 'm[1-2]'}
        self.args_path = tmp_path / 'log.args'
        self.process = subprocess.Popen(
            ['bash', ROOT / 'docker' / 'train.sbatch', '--data=/shared/a b.zip', '--batch=64'],
            env=environment, stdout=subprocess.DEVNULL)

    def finish(self):
        """(exit status, whether the job was queued again)."""
        status = self.process.wait(timeout=20)
        return status, self.log.exists() and self.log.read_text() == 'requeue 7\n'

    def args(self):
        return self.args_path.read_text().splitlines()


def parse_train(args):
    """What train.py understands of its arguments."""
    assert args[0] == 'train.py'
    return train.command.make_context('train', args[1:], resilient_parsing=False).params


def parse_torchrun(args):
    """(torchrun's options, those of train.py)."""
    assert args[:2] == ['-m', 'torch.distributed.run']
    options = torch.distributed.run.parse_args(args[2:])
    return options, parse_train([options.training_script, *options.training_script_args])


@pytest.mark.parametrize(
    ('status', 'again'), [(0, False), (75, True), (1, False)], ids=['done', 'stopped', 'failed'])
def test_a_slurm_job_is_queued_again_if_the_run_was_stopped(tmp_path, status, again):
    slurm = Slurm(tmp_path, f'exit {status}\n')
    assert slurm.finish() == (status, again)
    args = slurm.args()
    assert args[1] == 'python'
    flags = parse_train(args[2:])
    assert flags['gpus'] == 8 and flags['resume'] == 'latest' and flags['data'] == '/shared/a b.zip'


@pytest.mark.parametrize(('status', 'again'), [(1, True), (0, False)], ids=['stopped', 'was_done'])
def test_a_warning_of_slurm_reaches_torchrun_whose_status_says_little(tmp_path, status, again):
    slurm = Slurm(
        tmp_path, f'trap "exit {status}" TERM\ntouch "$LOG.ready"\nwhile :; do sleep 0.05; done\n', nodes=2)
    deadline = time.monotonic() + 20
    while not (tmp_path / 'log.ready').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    slurm.process.send_signal(signal.SIGTERM)
    assert slurm.finish() == (status, again)
    options, flags = parse_torchrun(slurm.args()[2:])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ('2', '8', 'c10d')
    assert options.rdzv_endpoint == 'm1:29500' and options.rdzv_id == '7'
    assert flags['gpus'] is None and flags['batch'] == 64


def test_the_jobs_of_kubernetes_start_what_is_there():
    yaml = pytest.importorskip('yaml')
    one, service, many = yaml.safe_load_all((ROOT / 'docker' / 'kubernetes.yaml').read_text())
    pods = [job['spec']['template']['spec'] for job in (one, many)]
    for job, pod in zip((one, many), pods, strict=True):
        (container,) = pod['containers']
        # Kubernetes refuses that policy with any other restartPolicy.
        assert pod['securityContext']['runAsNonRoot'] and pod['restartPolicy'] == 'Never'
        rules = [rule.get('onExitCodes') for rule in job['spec']['podFailurePolicy']['rules']]
        assert all(rule['containerName'] == container['name'] for rule in rules if rule)
        assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
        assert '/dev/shm' in {m['mountPath'] for m in container['volumeMounts']}
    gpus = [pod['containers'][0]['resources']['limits']['nvidia.com/gpu'] for pod in pods]
    assert parse_train(pods[0]['containers'][0]['args'])['gpus'] == gpus[0]
    (container,) = pods[1]['containers']
    options, flags = parse_torchrun(container['args'])
    assert int(options.nproc_per_node) == gpus[1] and int(options.nnodes) == many['spec']['completions']
    name = many['metadata']['name']
    assert options.rdzv_endpoint == f'{name}-0.{pods[1]["subdomain"]}:29500' and flags['resume'] == 'latest'
    assert service['metadata']['name'] == pods[1]['subdomain']
    assert service['spec']['selector'] == {'job-name': name}


def test_the_default_cache_of_kernels_is_where_the_image_puts_them(monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', '/cache')
    assert custom_ops.default_cache().folder == Path('/cache/ops')
    assert 'DNNLIB_CACHE_DIR=/cache' in arguments('ENV')[-1]
