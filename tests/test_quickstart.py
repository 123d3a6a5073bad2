# SPDX-License-Identifier: Apache-2.0
"""docs/quickstart.ipynb, executed with a small network on a few small images."""
import copy

import numpy as np
import PIL.Image
import pytest
from source_tree import ROOT

import legacy
from training.run.manifest import read_manifest

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
NUM_IMAGES = 24


@pytest.fixture(scope='module')
def notebook():
    return nbformat.read(ROOT / 'docs' / 'quickstart.ipynb', as_version=4)


def test_it_is_stored_without_results(notebook):
    nbformat.validate(notebook)
    assert all(cell.execution_count is None and not cell.outputs for cell in notebook.cells
               if cell.cell_type == 'code')
    assert set(notebook.metadata) == {'kernelspec', 'language_info'}
    assert {tag for cell in notebook.cells for tag in cell.metadata.get('tags', ())} == {'parameters'}


def shortened(notebook, images, outdir):
    """The notebook with other parameters, and its training resumed once."""
    short = copy.deepcopy(notebook)
    train = '--cfg=demo --cbase=32 --cmax=4 --batch=64 --aug=noaug --metrics=none --workers=0 --kimg='
    values = {'IMAGES': str(images), 'SIZE': 8, 'OUTDIR': str(outdir), 'TRAIN': train + '1',
              'PROJECTION_STEPS': 3}
    parameters = next(i for i, cell in enumerate(short.cells) if cell.metadata.get('tags') == ['parameters'])
    assert all(f'\n{name} = ' in short.cells[parameters].source for name in values)
    code = '\n'.join(f'{name} = {value!r}' for name, value in values.items())
    short.cells.insert(parameters + 1, nbformat.v4.new_code_cell(code))
    training = next(i for i, cell in enumerate(short.cells) if 'train.py --outdir' in cell.source)
    more = nbformat.v4.new_code_cell(f'TRAIN = {train + "2"!r}\n{short.cells[training].source}')
    short.cells.insert(training + 1, more)
    return short


def printed(notebook):
    return ''.join(output.text for cell in notebook.cells if cell.cell_type == 'code'
                   for output in cell.outputs if output.output_type == 'stream')


@pytest.mark.slow
def test_it_runs_from_images_to_an_exported_network(notebook, tmp_path, monkeypatch):
    (tmp_path / 'images').mkdir()
    for i, pixels in enumerate(np.random.RandomState(0).randint(256, size=[NUM_IMAGES, 9, 12, 3])):
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'images' / f'{i}.png')
    outdir = tmp_path / 'with space'
    for name, value in {'OMP_NUM_THREADS': '1', 'IPYTHONDIR': str(tmp_path / 'ipython'),
                        'JUPYTER_RUNTIME_DIR': str(tmp_path / 'runtime')}.items():
        monkeypatch.setenv(name, value)
    short = shortened(notebook, tmp_path / 'images', outdir)
    nbclient.NotebookClient(short, timeout=300, kernel_name='python3',
                            resources={'metadata': {'path': str(ROOT / 'docs')}}).execute()
    text = printed(short)
    assert 'Error' not in text and 'Traceback' not in text, text
    run_dir, = (outdir / 'runs').iterdir()
    assert [entry.nimg for entry in read_manifest(run_dir)][-1] >= 2000
    assert sum('image/png' in output.data for cell in short.cells if cell.cell_type == 'code'
               for output in cell.outputs if output.output_type == 'display_data') == 6
    assert len(list((outdir / 'images').glob('seed*.png'))) == 36
    assert legacy.load_network(outdir / 'generator.safetensors').G_ema.img_resolution == 8
