# SPDX-License-Identifier: Apache-2.0
"""Wheels built from a copy of the tree, and virtual environments that they are installed into."""
import shutil
import site
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

from golden_cases import ROOT

NOT_COPIED = shutil.ignore_patterns('.*', 'tests', 'build', 'dist', '*.egg-info', '__pycache__', 'images')
# Owners of our names on PyPI and elsewhere: a package and plain modules.
FOREIGN = {
    'train': 'train.py', 'metrics': 'metrics.py', 'legacy': 'legacy.py', 'projector': 'projector.py',
    'training': 'training/__init__.py', 'torch_utils': 'torch_utils/__init__.py', 'dnnlib': 'dnnlib.py'}


def python(*arguments, **options):
    """What a program prints, run by the Python of the tests; a failure of it is one of the test."""
    return checked([sys.executable, *arguments], **options)


def checked(command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def copy_of_tree(folder):
    """Everything that a wheel may need, so that building leaves nothing behind in the checkout."""
    return Path(shutil.copytree(ROOT, folder, ignore=NOT_COPIED))


def build(source, folder, *options):
    """The files that `python -m build` writes into a folder, by suffix."""
    python('-m', 'build', '--no-isolation', '--outdir', folder, *options, source)
    return {path.suffix: path for path in folder.iterdir()}


def foreign_wheels(folder):
    """A distribution per name of FOREIGN, whose module knows whose it is."""
    for name, path in FOREIGN.items():
        info = f'foreign_{name}-1.0.dist-info'
        files = {path: f'WHOSE = {name!r}\n',
                 f'{info}/METADATA': f'Metadata-Version: 2.1\nName: foreign-{name}\nVersion: 1.0\n',
                 f'{info}/WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
        with zipfile.ZipFile(folder / f'foreign_{name}-1.0-py3-none-any.whl', 'w') as wheel:
            for file, text in {**files, f'{info}/RECORD': ''.join(f'{f},,\n' for f in files)}.items():
                wheel.writestr(file, text)
            yield Path(wheel.filename)


@dataclass(frozen=True)
class Venv:
    """A virtual environment in `folder`."""

    folder: Path

    @classmethod
    def create(cls, folder, *what):
        """One with PyTorch and all else that the tests have, and `what` as given to pip.

        What is installed in editable form for the tests is not there: it has .pth files of its own, which
        are ignored in folders that a .pth file names.
        """
        # Without pip, which takes seconds to unpack.
        python('-m', 'venv', '--without-pip', folder)
        venv = cls(folder)
        packages = [path for path in {*site.getsitepackages(), *sys.path} if path.endswith('-packages')]
        (site_packages,) = folder.glob('lib/python*/site-packages')
        (site_packages / 'of_the_tests.pth').write_text('\n'.join(packages), encoding='utf-8')
        python('-m', 'pip', '--python', venv.program('python'), 'install', '--quiet', '--no-index',
               '--no-deps', '--no-build-isolation', '--ignore-installed', *what)
        return venv

    def program(self, name):
        return self.folder / 'bin' / name

    def run(self, name, *arguments, **options):
        """What a program prints."""
        return checked([self.program(name), *arguments], **{'cwd': self.folder, **options})

    def run_code(self, code, *arguments, **options):
        """What Python code prints; the current folder is not on its path."""
        script = self.folder / 'script.py'
        script.write_text(textwrap.dedent(code), encoding='utf-8')
        return self.run('python', '-I', script, *arguments, **options)
