# SPDX-License-Identifier: Apache-2.0
"""Target images of any kind, cropped as recorded; files with ws, good and bad."""
import numpy as np
import PIL.Image
import pytest
import torch
from golden_cases import arrays, cases
from small_networks import small_generator

from dnnlib.util import UserError
from training.projection.files import find_targets, fit_target, read_init_ws, read_target, save_projections


@pytest.mark.parametrize('case', cases('projector', 'targets'))
def test_recorded_target(case):
    recorded, side = arrays('projector.npz'), case['resolution']
    found = fit_target(recorded[case['input']], side, side).astype(int)
    assert np.abs(found - recorded[case['output']]).max() <= 1


@pytest.mark.parametrize('mode, size', [
    ('RGB', (40, 30)), ('RGBA', (17, 31)), ('P', (8, 90)), ('L', (16, 24)), ('I;16', (9, 9)), ('1', (2, 1))])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_images_of_any_kind_become_those_of_the_network(tmp_path, mode, size, channels):
    path = tmp_path / 'a.png'
    PIL.Image.new(mode, size, 1).save(path)
    pixels = read_target(path, channels, 16, 24)
    assert pixels.shape == (channels, 16, 24) and pixels.dtype == np.uint8


def test_the_middle_is_kept_in_the_right_proportions():
    columns = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 10, axis=0)
    assert fit_target(columns, 10, 20)[0, :, 0].tolist() == list(range(10, 30))
    rows = columns.transpose(1, 0, 2)
    assert fit_target(rows, 20, 10)[:, 0, 0].tolist() == list(range(10, 30))


def test_alpha_that_the_network_has_not_is_laid_over_white(tmp_path):
    PIL.Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    assert (read_target(tmp_path / 'a.png', 3, 8, 8) == 255).all()


def test_folders_stand_for_their_images(tmp_path):
    for name in ('b.png', 'a.png'):
        PIL.Image.new('L', (4, 4)).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('x')
    names = [path.name for path in find_targets([str(tmp_path / 'b.png'), str(tmp_path)])]
    assert names == ['b.png', 'a.png', 'b.png']


def test_targets_that_are_not_there_or_no_images_are_named(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.png').write_text('hello')
    for path in ('absent.png', 'empty'):
        with pytest.raises(UserError, match=rf'--target=.*{path}'):
            find_targets([str(tmp_path / path)])
    for path in ('text.png', 'empty'):
        with pytest.raises(UserError, match=rf'--target=.*{path}'):
            read_target(tmp_path / path, 3, 8, 8)


def test_saved_projections_can_be_read_again(tmp_path):
    G, path = small_generator(), tmp_path / 'w.npz'
    ws, noise = torch.randn([2, G.num_ws, 8]), [{'b4.conv1.noise_const': torch.randn(4, 4)} for _ in range(2)]
    save_projections(path, ws, noise)
    with np.load(path) as arrays:
        assert sorted(arrays) == ['b4.conv1.noise_const', 'w']
        assert np.array_equal(arrays['b4.conv1.noise_const'][1], noise[1]['b4.conv1.noise_const'])
    assert torch.equal(read_init_ws(str(path), G, 2, 'w+'), ws)
    with pytest.raises(UserError, match=r'use --space=w[+]'):
        read_init_ws(str(path), G, 2, 'w')
    with pytest.raises(UserError, match=r'number of targets take .1 or 3, 6, 8.'):
        read_init_ws(str(path), G, 3, 'w+')
    save_projections(path, ws[:1, :1].expand(1, G.num_ws, -1), [{}])
    assert torch.equal(read_init_ws(str(path), G, 3, 'w'), ws[:1, :1].expand(3, G.num_ws, -1))


@pytest.mark.parametrize('contents', [
    {'v': np.zeros(3)}, {'w': np.zeros([1, 2, 8])}, {'w': np.zeros(8)}, {'w': np.full([1, 6, 8], np.nan)},
    {'w': np.array(['a'])}, {'w': np.array([None])}, b'not an npz', b'PK\x03\x04 broken', b'', None])
def test_wrong_files_to_begin_with_are_named(tmp_path, contents):
    path = tmp_path / 'w.npz'
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        np.savez(path, **contents)
    G = small_generator()
    assert G.num_ws == 6
    with pytest.raises(UserError, match=r'--init-w=.*w\.npz'):
        read_init_ws(str(path), G, 1, 'w+')
