# SPDX-License-Identifier: Apache-2.0
"""fakes_over_time.png: a row for each moment, with its images and times."""
import json

import numpy as np
import PIL.Image
import pytest

from dnnlib.util import UserError
from training.report.fakes_over_time import COLUMNS, LABEL_PX, MARGIN_PX, MAX_ROWS, write_fakes_over_time
from training.run.log import RunLog


def save_sheet(folder, name, value, tile=(16, 16), columns=12, channels=3):
    shape = (2 * tile[0], columns * tile[1], channels)
    pixels = np.full(shape, value, dtype=np.uint8)
    # The second row differs: only the first is shown.
    pixels[tile[0]:] = 255 - value
    PIL.Image.fromarray(pixels).save(folder / name)


def run_folder(folder, tile=(16, 16), kimg=(1, 2, 3)):
    resolution = tile[0] if tile[0] == tile[1] else list(tile)
    options = {'training_set_kwargs': {'resolution': resolution}}
    (folder / 'training_options.json').write_text(json.dumps(options))
    means = [{'Progress/tick': i, 'Progress/kimg': k, 'Timing/total_sec': 100 * k}
             for i, k in enumerate(kimg)]
    rows = [{name: {'num': 1, 'mean': mean, 'std': 0} for name, mean in row.items()} for row in means]
    (folder / 'stats.jsonl').write_text('\n'.join(json.dumps(row) for row in rows) + '\n')
    save_sheet(folder, 'fakes_init.png', 10, tile)
    for k in kimg:
        save_sheet(folder, f'fakes{k:06d}.png', 20 + k, tile)
    return folder


def rows_of(path, pitch):
    """The gray value of the first image of each row."""
    pixels = np.asarray(PIL.Image.open(path))
    return [int(v) for v in pixels[MARGIN_PX + 2:-MARGIN_PX:pitch, LABEL_PX + 2, 0]]


def test_each_moment_is_a_row_of_the_first_images(tmp_path):
    path = write_fakes_over_time(run_folder(tmp_path))
    assert path == tmp_path / 'fakes_over_time.png'
    # Tiles of 16 pixels grow by 3.
    assert rows_of(path, 48 + 2) == [10, 21, 22, 23]
    assert PIL.Image.open(path).width == LABEL_PX + COLUMNS * 48 + MARGIN_PX


def test_the_start_is_shown_once(tmp_path):
    save_sheet(run_folder(tmp_path), 'fakes000000.png', 15)
    assert rows_of(write_fakes_over_time(tmp_path), 50) == [10, 21, 22, 23]


def test_each_row_says_when(tmp_path):
    pixels = np.asarray(PIL.Image.open(write_fakes_over_time(run_folder(tmp_path)))).astype(int)
    labels = [pixels[MARGIN_PX + i * 50:MARGIN_PX + (i + 1) * 50, :LABEL_PX] for i in range(4)]
    assert all((label < 128).any() for label in labels)
    assert not np.array_equal(labels[1], labels[2])


def test_long_runs_are_thinned_and_keep_both_ends(tmp_path):
    path = write_fakes_over_time(run_folder(tmp_path, kimg=tuple(range(1, 40))))
    values = rows_of(path, 50)
    assert len(values) == MAX_ROWS and values[0] == 10 and values[-1] == 59 and values == sorted(values)


def test_large_and_oblong_images_are_reduced(tmp_path):
    path = write_fakes_over_time(run_folder(tmp_path, tile=(128, 256), kimg=(1,)))
    assert PIL.Image.open(path).size == (LABEL_PX + COLUMNS * 128 + MARGIN_PX, 2 * (64 + 2) + 2 * MARGIN_PX)


def test_damaged_sheets_are_left_out(tmp_path):
    run_folder(tmp_path)
    (tmp_path / 'fakes000002.png').write_bytes(b'no image')
    assert rows_of(write_fakes_over_time(tmp_path), 50) == [10, 21, 23]


def test_without_statistics_there_are_only_numbers_of_images(tmp_path):
    run_folder(tmp_path)
    (tmp_path / 'stats.jsonl').unlink()
    assert rows_of(write_fakes_over_time(tmp_path), 50) == [10, 21, 22, 23]


def test_without_sheets_or_options_there_is_no_file(tmp_path):
    assert write_fakes_over_time(tmp_path) is None
    save_sheet(tmp_path, 'fakes_init.png', 10)
    assert write_fakes_over_time(tmp_path) is None and not (tmp_path / 'fakes_over_time.png').exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    run_folder(tmp_path)
    (tmp_path / 'fakes_over_time.png').mkdir()
    with pytest.raises((UserError, OSError), match='fakes_over_time'):
        write_fakes_over_time(tmp_path)


def test_every_run_writes_it_with_its_curves(tmp_path):
    run_folder(tmp_path)
    with RunLog(tmp_path) as log:
        log.plot()
    assert (tmp_path / 'fakes_over_time.png').is_file()
