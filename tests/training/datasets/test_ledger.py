# SPDX-License-Identifier: Apache-2.0
"""What of a source is not used is said, wherever a source is read; --strict refuses it."""
import os

import numpy as np
import pytest
from dataset_cases import encode, make_image, run_tool, write_folder, write_zip
from PIL import Image

from dnnlib.util import UserError
from training.capacity.dry_run import open_dataset
from training.dataset import ImageFolderDataset
from training.datasets.ledger import Ledger, account_names
from training.datasets.writer import dataset_writer
from training.projection.files import target_ledger

PNG = encode(make_image())
HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(200)
PHONE = {'a.png': PNG, 'b.png': encode(make_image(1)), **{f'IMG_{i}.HEIC': HEIC for i in range(4)},
         'IMG_9': PNG, 'raw.CR2': b'II*\0' + bytes(100), 'p.jxl': b'\xff\x0a' + bytes(50),
         'a.txt': b'caption',
         'c.jpg_large': encode(make_image(2), 'jpeg'), '.DS_Store': b'x', 'more.zip': b'PK', 'x.mov': b'x'}
LINES = ['1 without suffix (first: IMG_9): an image under another name; call it .png',
         '1 .cr2 (first: raw.CR2)', '1 .jxl (first: p.jxl)', '1 .txt (first: a.txt): not an image format',
         '1 .mov (first: x.mov): video',
         '1 .jpg_large (first: c.jpg_large): an image under another name; call it .jpg',
         '1 hidden or system files (first: .DS_Store)', '1 .zip (first: more.zip): a nested archive']
HEIC_LINE = '4 .heic (first: IMG_0.HEIC): not readable here; pip install pillow-heif'


@pytest.fixture(autouse=True)
def without_heif(monkeypatch):
    from training.datasets import images
    known = images.image_suffixes() - {'.heic', '.heif', '.hif', '.jxl'}
    monkeypatch.setattr(images, 'image_suffixes', lambda: known)


@pytest.mark.parametrize('write', [write_folder, write_zip])
def test_every_entry_that_is_not_used_is_said(tmp_path, capsys, write):
    source = write(tmp_path / 'phone.zip', PHONE)
    for args in ([tmp_path / 'out'], [None, '--check']):
        status, output = run_tool(capsys, source, *args)
        assert status == 0
        for line in [HEIC_LINE, *LINES]:
            assert f'Not used: {line}' in output


def test_training_says_so_before_it_starts(tmp_path):
    _, text = open_dataset(write_folder(tmp_path / 'phone', PHONE), cond=False)
    assert HEIC_LINE in text and LINES[0] in text
    with pytest.raises(UserError, match=r'--data: --strict: not used: 4 \.heic'):
        open_dataset(str(tmp_path / 'phone'), cond=False, strict=True)


def test_frames_and_16_bits_are_said_at_the_start_of_training(tmp_path):
    frames = [Image.new('RGB', (8, 8), name) for name in ('red', 'green', 'blue')]
    files = {'a.gif': encode(frames[0], 'gif', save_all=True, append_images=frames[1:])}
    _, text = open_dataset(write_folder(tmp_path / 'gif', files), cond=False)
    assert '2 further frames of 1 animations or stacks (first: a.gif)' in text
    deep = encode(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)))
    _, text = open_dataset(write_folder(tmp_path / 'deep', {'a.png': deep}), cond=False)
    assert '--range=auto' in text


def test_projection_says_so(tmp_path):
    lines = target_ledger([write_folder(tmp_path / 'phone', PHONE)]).lines()
    assert any(HEIC_LINE in line for line in lines)
    frames = [Image.new('RGB', (8, 8), name) for name in ('red', 'green')]
    encode(frames[0])
    (tmp_path / 'a.gif').write_bytes(encode(frames[0], 'gif', save_all=True, append_images=frames[1:]))
    assert '1 further frames' in target_ledger([str(tmp_path / 'a.gif')]).lines()[0]


@pytest.mark.parametrize('name', ['IMG_0.HEIC', 'raw.CR2', 'x.mov', 'more.zip', 'IMG_9'])
def test_strict_refuses_a_loss_and_writes_nothing(tmp_path, capsys, name):
    source = write_folder(tmp_path / 's', {'a.png': PNG, name: PHONE[name]})
    assert run_tool(capsys, source, tmp_path / 'out')[0] == 0
    for args in ([tmp_path / 'strict'], [None, '--check']):
        status, output = run_tool(capsys, source, *args, '--strict')
        assert status == 2 and '--strict: not used: 1 ' in output and name in output
    assert not (tmp_path / 'strict').exists()


def test_strict_accepts_captions_and_system_files(tmp_path, capsys):
    files = {'a.png': PNG, 'a.txt': b'caption', 'Thumbs.db': b'x', '__MACOSX/._a.png': b'x'}
    status, output = run_tool(capsys, write_folder(tmp_path / 's', files), tmp_path / 'o', '--strict')
    assert status == 0 and '2 hidden or system files' in output


def test_strict_refuses_frames_that_only_decoding_finds(tmp_path, capsys):
    frames = [Image.new('RGB', (8, 8), name) for name in ('red', 'green')]
    files = {'a.gif': encode(frames[0], 'gif', save_all=True, append_images=frames)}
    source = write_folder(tmp_path / 's', files)
    status, output = run_tool(capsys, source, tmp_path / 'o.zip', '--strict')
    assert status == 2 and 'further frames' in output and sorted(os.listdir(tmp_path)) == ['s']
    assert run_tool(capsys, source, tmp_path / 'o.zip', '--strict', '--frames=all')[0] == 0


def test_a_folder_of_unreadable_images_alone_is_explained(tmp_path, capsys):
    for files, text in (({'a.HEIC': HEIC, 'b.heic': HEIC}, '2 .heic (first: a.HEIC)'),
                        ({'inner.zip': b'PK'}, '1 .zip (first: inner.zip): a nested archive; unpack it')):
        source = write_folder(tmp_path / text[2:6], files)
        status, output = run_tool(capsys, source, tmp_path / 'out')
        assert status == 2 and text in output and 'no images' in output
        assert len([line for line in output.splitlines() if line.startswith('Error')]) == 1


def test_two_entries_of_one_name_are_said(tmp_path, capsys):
    import zipfile
    with zipfile.ZipFile(tmp_path / 's.zip', 'w') as archive, pytest.warns(UserWarning, match='Duplicate'):
        for i in range(2):
            archive.writestr('a.png', encode(make_image(i)))
    status, output = run_tool(capsys, tmp_path / 's.zip', tmp_path / 'o')
    assert status == 0 and 'Not used: 1 names that occur twice: the last of each is used' in output
    pixels = ImageFolderDataset(str(tmp_path / 'o'))[0][0]
    np.testing.assert_array_equal(pixels, make_image(1).transpose(2, 0, 1))


def test_a_label_table_that_is_replaced_is_said(tmp_path, capsys):
    files = {'x/a.png': PNG, 'x/dataset.json': {'labels': [['a.png', 0]]}}
    status, output = run_tool(capsys, write_folder(tmp_path / 's', files), tmp_path / 'o', '--labels=folders')
    assert status == 0 and '(first: x/dataset.json): --labels=folders replaces it' in output


def test_labels_without_image_are_said(tmp_path, capsys):
    files = {'a.png': PNG, 'dataset.json': {'labels': [['a.png', 0], ['gone.png', 1]]},
             'l.csv': b'a.png,0\nb.png,1\n'}
    source = write_folder(tmp_path / 's', files)
    line = 'Not used: 1 labels (first: gone.png): no image has this name'
    status, output = run_tool(capsys, source, tmp_path / 'o')
    assert status == 0 and line in output
    assert line in open_dataset(source, cond=True)[1] and line not in open_dataset(source, cond=False)[1]
    assert line.replace('gone', 'b') in run_tool(
        capsys, source, tmp_path / 'p', '--labels', os.path.join(source, 'l.csv'))[1]


def test_names_cannot_act_on_the_terminal():
    ledger = account_names(['a\x1b[2J\nError: fake.cr2'], lambda name: b'')
    assert ledger.lines() == ['Not used: 1 .cr2 (first: a\\x1b[2J\\nError: fake.cr2): camera raw; develop to '
                              'PNG or TIFF']


def test_ledgers_can_be_joined():
    first, second = Ledger(), Ledger()
    first.add('.x', 'why', 'a.x')
    second.add('.x', 'why', 'b.x')
    second.add('.y', 'why', 'c.y', is_loss=False)
    first.join(second)
    assert first.lines() == ['Not used: 2 .x (first: a.x): why', 'Not used: 1 .y (first: c.y): why']


@pytest.mark.parametrize('name', ['x.rar', 'x.tar', 'x.tar.gz', 'x.7z'])
def test_other_archives_are_no_destination(tmp_path, capsys, name):
    source = write_folder(tmp_path / 's', {'a.png': PNG})
    status, output = run_tool(capsys, source, tmp_path / name)
    assert status == 2 and 'a dataset is a folder or a .zip' in output and not (tmp_path / name).exists()


def test_a_zip_may_be_spelt_in_capitals(tmp_path, capsys):
    source = write_folder(tmp_path / 's', {'a.png': PNG})
    assert run_tool(capsys, source, tmp_path / 'X.ZIP')[0] == 0
    assert (tmp_path / 'X.ZIP').is_file() and len(ImageFolderDataset(str(tmp_path / 'X.ZIP'))) == 1


def test_two_writers_with_one_process_id_do_not_meet(tmp_path):
    with dataset_writer(str(tmp_path / 'x.zip')) as first:
        first('a.png', PNG)
        with dataset_writer(str(tmp_path / 'x.zip')) as second:
            second('b.png', PNG)
        first('c.png', PNG)
    assert ImageFolderDataset(str(tmp_path / 'x.zip'))._files.names == ['a.png', 'c.png']
    assert os.listdir(tmp_path) == ['x.zip']


def test_the_home_folder_is_found_after_an_equals_sign(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 's', {'a.png': PNG})
    import dataset_tool
    from dnnlib.cli import run_command
    with pytest.raises(SystemExit) as caught:
        run_command(dataset_tool.convert_command, ['--source=~/s', '--dest', '~/d/x.zip'])
    assert not caught.value.code and sorted(os.listdir(tmp_path)) == ['d', 's']
