# SPDX-License-Identifier: Apache-2.0
"""The script that makes the images of README and docs: its commands are those that the docs show."""
import re

import numpy as np
import pytest
from PIL import Image
from source_tree import ROOT

from dnnlib.util import UserError
from scripts import make_gallery


def test_the_docs_show_the_commands_of_their_images():
    text = re.sub(r' *\\\n *', ' ', (ROOT / 'docs' / 'generation.md').read_text(encoding='utf-8'))
    for entry in make_gallery.DOCS:
        assert f'\npython {entry.command}\n' in text, entry.name
        assert f'](images/{entry.name})' in text and (ROOT / 'docs' / 'images' / entry.name).is_file()


def test_readme_and_docs_show_images_that_are_there():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    shown = [(page, path) for page in pages
             for path in re.findall(r'!\[[^\]]*\]\(([^)]+)\)', page.read_text(encoding='utf-8'))]
    assert len(shown) > 12
    for page, path in shown:
        assert (page.parent / path).is_file(), f'{page.name}: {path}'
    files = {path.resolve() for path in (ROOT / 'docs' / 'images').iterdir()}
    assert files == {(page.parent / path).resolve() for page, path in shown}
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) <= 150


def produce_blank(calls):
    """In place of produce(): a small image, whose red value is the number of the call."""
    def produce(command, made, folder):
        calls.append(command)
        path = folder / made
        Image.new('RGB', (4, 2), (len(calls), 0, 0)).save(path)
        return path
    return produce


def test_every_image_is_made_and_enlarged(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(make_gallery, 'produce', produce_blank(calls))
    make_gallery.main(['--outdir', str(tmp_path / 'out')], standalone_mode=False)
    names = {'hero.png', *(entry.name for entry in make_gallery.DOCS)}
    assert {path.name for path in (tmp_path / 'out').iterdir()} == names
    assert len(calls) == len(make_gallery.DOCS) + len(make_gallery.HERO)
    assert all(make_gallery.NETWORK in call and '--outdir=out' in call for call in calls)
    grid = np.asarray(Image.open(tmp_path / 'out' / 'generation_grid.png'))
    assert grid.shape == (4, 8, 3) and (grid[:, :, 0] == 4).all()


def test_a_run_adds_its_samples_and_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(make_gallery, 'produce', produce_blank([]))
    for name, size in (('fakes000020.png', (320, 480)), ('training_curves.png', (6, 3))):
        Image.new('RGB', size).save(tmp_path / name)
    make_gallery.main(['--outdir', str(tmp_path / 'out'), '--run', str(tmp_path)], standalone_mode=False)
    assert Image.open(tmp_path / 'out' / 'emoji32_curves.png').size == (6, 3)
    assert (tmp_path / 'out' / 'first_hour.png').is_file()


def test_images_are_joined_in_order():
    red, blue = Image.new('RGB', (2, 3), 'red'), Image.new('RGB', (4, 1), 'blue')
    row = make_gallery.joined([red, blue], is_row=True)
    column = make_gallery.joined([red, blue], is_row=False)
    assert row.size == (2 + make_gallery.GAP_PX + 4, 3) and row.getpixel((row.width - 1, 0)) == (0, 0, 255)
    assert column.size == (4, 3 + make_gallery.GAP_PX + 1) and column.getpixel((0, 0)) == (255, 0, 0)


def test_samples_over_training_are_those_closest_to_the_milestones(tmp_path):
    for kimg in (0, 20, 40, 120, 200):
        Image.new('RGB', (320, 480), (kimg, 0, 0)).save(tmp_path / f'fakes{kimg:06d}.png')
    result = make_gallery.over_training(tmp_path)
    middle = np.asarray(result)[result.height // 2, :, :]
    reds = middle[(middle[:, 0] != 255), 0]
    assert sorted(set(reds.tolist())) == [20, 120, 200]
    with pytest.raises(UserError, match='no run directory'):
        make_gallery.over_training(tmp_path / 'none')
