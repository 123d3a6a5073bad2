# SPDX-License-Identifier: Apache-2.0
"""Videos decode with what was announced, appear whole or not at all, and survive a missing ffmpeg."""
import imageio
import numpy as np
import PIL.Image
import pytest

from dnnlib import video
from dnnlib.util import UserError


def frames(count, height, width, channels):
    """Frames whose brightness tells their number."""
    return [np.full([height, width, channels], (20 + 30 * i) % 256, np.uint8) for i in range(count)]


def write(path, images, **options):
    height, width, _ = images[0].shape
    with video.open_video(path, width, height, **options) as film:
        for image in images:
            film.append(image)
    return film.num_frames


def decode(path):
    with imageio.get_reader(path) as reader:
        return reader.get_meta_data(), [np.asarray(frame) for frame in reader]


@pytest.mark.parametrize('name', ['a.mp4', 'a.webm'])
@pytest.mark.parametrize('size, even', [((16, 32), (16, 32)), ((17, 33), (18, 34))])
def test_a_video_decodes_with_its_frames_size_and_rate(tmp_path, name, size, even):
    assert write(tmp_path / name, frames(6, *size, 3), fps=24) == 6
    meta, decoded = decode(tmp_path / name)
    assert len(decoded) == 6 and meta['fps'] == 24 and decoded[0].shape == (*even, 3)
    for i, frame in enumerate(decoded):
        assert np.abs(frame.astype(int) - (20 + 30 * i)).max() <= 4
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_colors_survive_the_way_through_a_video(tmp_path):
    color = np.array([200, 40, 120], np.uint8)
    write(tmp_path / 'a.mp4', [np.broadcast_to(color, [16, 16, 3])] * 2)
    assert np.abs(decode(tmp_path / 'a.mp4')[1][0][8, 8].astype(int) - color).max() <= 6


def test_a_gif_has_its_frames_and_its_rate_on_average(tmp_path):
    write(tmp_path / 'a.gif', frames(6, 9, 7, 3), fps=30)
    with PIL.Image.open(tmp_path / 'a.gif') as image:
        assert image.n_frames == 6 and image.size == (7, 9) and image.info['loop'] == 0
        durations = []
        for i in range(6):
            image.seek(i)
            durations.append(image.info['duration'])
    assert sum(durations) == 200 and set(durations) <= {30, 40}
    assert video.gif_durations(6, 30) == durations


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA')])
def test_a_folder_of_frames_keeps_the_channels(tmp_path, channels, mode):
    write(tmp_path / 'out', frames(3, 5, 4, channels))
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [f'frame{i:06d}.png' for i in range(3)]
    with PIL.Image.open(tmp_path / 'out' / 'frame000001.png') as image:
        assert image.mode == mode and np.asarray(image).max() == 50


def test_alpha_is_laid_over_the_background(tmp_path):
    clear = np.zeros([8, 8, 4], np.uint8)
    for name, options, expected in (('a.gif', {}, (255, 255, 255)),
                                    ('b.gif', {'background': 'lime'}, (0, 255, 0)),
                                    ('c', {'background': '#000080'}, (0, 0, 128))):
        write(tmp_path / name, [clear], **options)
        path = tmp_path / name
        with PIL.Image.open(path if path.is_file() else path / 'frame000000.png') as image:
            assert image.convert('RGB').getpixel((3, 3)) == expected


def test_half_transparent_gray_is_mixed():
    frame = np.array([[[100, 128]]], np.uint8)
    assert video.flatten(frame, (0, 255, 100)).tolist() == [[[50, 177, 100]]]


def fake_ffmpeg(folder, script):
    """A program in place of ffmpeg."""
    path = folder / 'ffmpeg'
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize('script, words', [
    (None, 'not found'), ('absent', 'cannot be started'), ('echo no x264 >&2; exit 1', 'no x264'),
    ('cat > /dev/null; echo broken >&2; exit 3', 'broken'), ('head -c 100 > /dev/null; exit 9', 'status 9'),
    ('cat > /dev/null', 'wrote no video'), ('kill -9 $$', 'status -9')])
def test_frames_are_kept_if_ffmpeg_is_missing_or_fails(tmp_path, monkeypatch, capsys, script, words):
    film = frames(20, 64, 64, 3)
    program = '/absent/ffmpeg' if script == 'absent' else script and fake_ffmpeg(tmp_path, script)
    monkeypatch.setattr(video, 'find_ffmpeg', lambda: program)
    out = tmp_path / 'out'
    out.mkdir()
    for name in ('walk-frames', 'walk-frames-2'):  # what an earlier try has left is not touched
        assert video.write_video(out / 'walk.mp4', lambda: iter(film)) == out / name
        kept = [read(path) for path in sorted((out / name).iterdir())]
        assert kept == [int(frame[0, 0, 0]) for frame in film]
        message = capsys.readouterr().err
        assert words in message and name in message and message.count('\n') == 1
    assert {path.name for path in out.iterdir()} == {'walk-frames', 'walk-frames-2'}


def read(path):
    with PIL.Image.open(path) as image:
        return int(np.asarray(image)[0, 0, 0])


def test_ffmpeg_is_found_by_its_package_or_not_at_all(monkeypatch):
    assert video.find_ffmpeg()
    monkeypatch.setitem(__import__('sys').modules, 'imageio_ffmpeg', None)
    monkeypatch.setenv('PATH', '')
    assert video.find_ffmpeg() is None


@pytest.mark.parametrize('name', ['a.mp4', 'a.gif', 'out'])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, name):
    old = tmp_path / 'a.mp4'
    old.write_text('old')
    with pytest.raises(KeyError), video.open_video(tmp_path / name, 4, 4) as film:
        film.append(frames(1, 4, 4, 3)[0])
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ['a.mp4'] and old.read_text() == 'old'


@pytest.mark.parametrize('name, options, hint', [
    ('a.avi', {}, '.webm'), ('a.mp4', {'fps': 0}, 'above 0'), ('a.mp4', {'fps': float('nan')}, 'above 0'),
    ('a.gif', {'fps': 60}, 'at most 50'), ('a.mp4', {'background': 'loud'}, 'loud'),
    ('absent/a.mp4', {}, 'absent'), ('absent/a.gif', {}, 'absent'), ('absent/a', {}, 'absent')])
def test_what_cannot_be_written_is_one_line(tmp_path, name, options, hint):
    with pytest.raises(UserError, match=hint) as info:
        write(tmp_path / name, frames(1, 4, 4, 3), **options)
    assert '\n' not in str(info.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('frame', [
    np.zeros([4, 4, 3]), np.zeros([4, 4], np.uint8), np.zeros([4, 4, 5], np.uint8),
    np.zeros([4, 5, 3], np.uint8)])
def test_frames_of_another_form_are_refused(tmp_path, frame):
    path = tmp_path / 'a.gif'
    with pytest.raises(ValueError, match='a frame must be'), video.open_video(path, 4, 4) as film:
        film.append(frame)


def test_a_video_without_frames_is_refused(tmp_path):
    for name in ('a.mp4', 'a.gif', 'a'):
        with pytest.raises(ValueError, match='without frames'), video.open_video(tmp_path / name, 4, 4):
            pass
    assert not list(tmp_path.iterdir())
