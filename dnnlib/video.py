# SPDX-License-Identifier: Apache-2.0
"""Writing videos frame by frame: .mp4 and .webm (by ffmpeg), .gif, or a folder of PNG files."""
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import PIL.Image
import PIL.ImageColor

from dnnlib.image_io import save_png
from dnnlib.progress import Progress
from dnnlib.util import UserError, replace_file

# Rec. 709, tagged as such: for untagged files players guess by the image size.
BT709 = ['-vf', 'scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int',
         '-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709', '-color_range', 'tv']
CODECS = {
    '.mp4': ['-c:v', 'libx264', '-crf', '16', '-pix_fmt', 'yuv420p', *BT709, '-movflags', '+faststart',
             '-f', 'mp4'],
    '.webm': ['-c:v', 'libvpx-vp9', '-crf', '24', '-b:v', '0', '-row-mt', '1', '-pix_fmt', 'yuv420p', *BT709,
              '-f', 'webm'],
}
FORMATS = (*CODECS, '.gif')  # and a name without suffix: a folder of PNG files
DEFAULT_BACKGROUND = 'white'  # as in the metrics
MAX_FPS = {'.mp4': 1000, '.gif': 50}  # viewers slow down faster GIFs
GIF_TICK_SEC = 0.01  # unit of the duration of a GIF's frames
FRAME_NAME = 'frame{:06d}.png'


class EncoderError(UserError):
    """ffmpeg cannot be started, or fails."""


class Video:
    """A video being written; created by `open_video`."""

    def __init__(self, size: tuple[int, int], sink: Any, background: tuple[int, ...] | None):
        self.width, self.height = size
        self.num_frames = 0
        self._sink, self._background = sink, background

    def append(self, frame: np.ndarray) -> None:
        """Add a frame: uint8 [H, W, C], gray, gray with alpha, RGB or RGBA. Raises ValueError on others."""
        is_frame = frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] in (1, 2, 3, 4)
        if not is_frame or frame.shape[:2] != (self.height, self.width):
            raise ValueError(f'a frame must be uint8 [{self.height}, {self.width}, 1 to 4], '
                             f'not {frame.dtype} {list(frame.shape)}')
        self._sink.write(frame if self._background is None else flatten(frame, self._background))
        self.num_frames += 1


@contextlib.contextmanager
def open_video(
    path: str | os.PathLike, width: int, height: int, fps: float = 30, background: str | None = None,
) -> Iterator[Video]:
    """Context manager: a `Video` of width x height pixels to append frames to, in the format of the suffix.

    Written under a temporary name and renamed at the end, or removed after an error. .mp4 and .webm have even
    sides: an odd one repeats its last row or column. Alpha is composited over `background` (a CSS name or
    #RRGGBB, by default white); PNG files keep alpha unless a background is given. Raises UserError for
    another suffix, an invalid rate or background, and a path that cannot be written, EncoderError if ffmpeg
    is missing or fails.
    """
    path = Path(path)
    check_video(path, fps, background)
    kind, color = path.suffix.lower(), parse_color(background or DEFAULT_BACKGROUND)
    sinks = {'': _png_sink, '.gif': _gif_sink}
    with sinks.get(kind, _ffmpeg_sink)(path, width, height, fps) as sink:
        video = Video((width, height), sink, None if not kind and background is None else color)
        yield video
        if video.num_frames == 0:
            raise ValueError(f'{path}: a video without frames')


def write_video(
    path: str | os.PathLike, frames: Callable[[], Iterator[np.ndarray]], fps: float = 30,
    background: str | None = None, bar: Progress | None = None,
) -> Path:
    """Write all frames of frames() as `open_video` does; the path of the video, or of its folder of frames.

    If ffmpeg fails, frames() is called again and its frames become a folder of PNG files, with a note on
    stderr.  bar: counts the frames.
    """
    path = Path(path)
    try:
        _write_all(path, frames(), fps, background, bar)
        return path
    except EncoderError as error:
        folder = frame_folder(path)
        print(f'Note: {error}; writing frames to {folder}', file=sys.stderr)
        if bar is not None:
            bar.restart()
        _write_all(folder, frames(), fps, background, bar)
        return folder


def _write_all(
    path: Path, frames: Iterator[np.ndarray], fps: float, background: str | None, bar: Progress | None,
) -> None:
    frame: np.ndarray | None = next(frames)
    assert frame is not None
    height, width, _ = frame.shape
    with open_video(path, width, height, fps, background) as video:
        while frame is not None:
            video.append(frame)
            if bar is not None:
                bar.update(1)
            frame = next(frames, None)


def check_video(path: Path, fps: float, background: str | None = None) -> None:
    """Raise UserError for a name, rate or background that `open_video` would refuse."""
    kind = path.suffix.lower()
    if kind and kind not in FORMATS:
        raise UserError(f'{path}: a video ends in {", ".join(FORMATS)}, or in no suffix (frames)')
    fastest = MAX_FPS.get(kind, MAX_FPS['.mp4'])
    if not 0 < fps <= fastest:
        raise UserError(f'{path}: {fps:g} frames per second; must be above 0 and at most {fastest}')
    if background is not None:
        parse_color(background)
    if not kind:
        check_folder(path)


def check_folder(path: Path) -> None:
    """Raise UserError if `path` is a file or a folder that is not empty."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f'{path}: is not an empty folder; empty it or choose another name')


def frame_folder(path: Path) -> Path:
    """A folder that does not exist yet, for the frames of a video that cannot be encoded."""
    names = itertools.chain([f'{path.stem}-frames'], (f'{path.stem}-frames-{n}' for n in itertools.count(2)))
    return next(folder for folder in map(path.with_name, names) if not folder.exists())


def parse_color(text: str) -> tuple[int, ...]:
    """(R, G, B) of a CSS color. Raises UserError if the text is not one."""
    try:
        return PIL.ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UserError(f'background {text!r}: must be a color such as white, black or #80C0FF') from error


def flatten(frame: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    """uint8 [H, W, 1 to 4] -> RGB [H, W, 3], with alpha composited over a color."""
    channels = frame.shape[2]
    rgb = frame[:, :, :-1] if channels in (2, 4) else frame
    if rgb.shape[2] == 1:
        rgb = np.repeat(rgb, 3, axis=2)
    if channels in (1, 3):
        return rgb
    alpha = frame[:, :, -1:].astype(np.int32)
    return ((rgb * alpha + np.array(color, np.int32) * (255 - alpha) + 127) // 255).astype(np.uint8)


def find_ffmpeg() -> str | None:
    """Path of ffmpeg: from imageio-ffmpeg (its own or the system's), else the one on the PATH."""
    try:
        import imageio_ffmpeg
        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return shutil.which('ffmpeg')


class _Ffmpeg:
    """An ffmpeg process that reads raw frames."""

    def __init__(self, command: list[str], is_odd: tuple[bool, bool], log: IO[bytes]):
        self._padding = [(0, int(is_odd[0])), (0, int(is_odd[1])), (0, 0)]
        self._log = log
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        except OSError as error:
            reason = error.strerror or error
            raise EncoderError(f'ffmpeg cannot be started ({command[0]}: {reason})') from error

    def write(self, frame: np.ndarray) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.pad(frame, self._padding, mode='edge').tobytes())
        except OSError:
            self._fail()

    def finish(self) -> None:
        assert self._process.stdin is not None
        # Closing flushes, and ffmpeg may have exited.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            self._fail()

    def _fail(self) -> None:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors='replace').split('\n')
        reason = next((line.strip() for line in lines if line.strip()), f'status {self._process.returncode}')
        raise EncoderError(f'ffmpeg cannot write the video ({reason})')

    def __enter__(self) -> '_Ffmpeg':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


@contextlib.contextmanager
def _ffmpeg_sink(path: Path, width: int, height: int, fps: float) -> Iterator[_Ffmpeg]:
    executable = find_ffmpeg()
    if executable is None:
        raise EncoderError('ffmpeg not found (pip install imageio-ffmpeg)')
    even = f'{width + width % 2}x{height + height % 2}'
    source = ['-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', even, '-r', f'{fps:g}', '-i', '-', '-an']
    with replace_file(path) as temporary, tempfile.TemporaryFile() as log:
        command = [executable, '-y', '-loglevel', 'error', *source, *CODECS[path.suffix.lower()],
                   str(temporary)]
        with _Ffmpeg(command, (height % 2 == 1, width % 2 == 1), log) as process:
            yield process
        if not temporary.is_file() or temporary.stat().st_size == 0:
            raise EncoderError('ffmpeg wrote no video, without a message')


class _Frames:
    """Frames as numbered PNG files of a folder."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0

    def write(self, frame: np.ndarray) -> None:
        save_png(self.folder / FRAME_NAME.format(self.count), frame.transpose(2, 0, 1))
        self.count += 1

    def read(self) -> Iterator[PIL.Image.Image]:
        for i in range(self.count):
            with PIL.Image.open(self.folder / FRAME_NAME.format(i)) as image:
                yield image.convert('RGB')


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, removed at the end unless it was renamed."""
    folder = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        folder.mkdir()
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f'{path}: cannot be written ({error.strerror or error}); check the folder and its '
                     'permissions')


@contextlib.contextmanager
def _png_sink(path: Path, width: int, height: int, fps: float) -> Iterator[_Frames]:
    with _temporary_folder(path) as folder:
        yield _Frames(folder)
        try:
            # An empty folder may exist, and not every system can rename over it.
            if path.is_dir():
                path.rmdir()
            os.replace(folder, path)
        except OSError as error:
            raise _cannot_write(path, error) from error


@contextlib.contextmanager
def _gif_sink(path: Path, width: int, height: int, fps: float) -> Iterator[_Frames]:
    # Pillow needs all frames at the end: until then they are on disk, not in memory.
    with _temporary_folder(path) as folder:
        frames = _Frames(folder)
        yield frames
        images = frames.read()
        with replace_file(path) as temporary:
            next(images).save(temporary, format='GIF', save_all=True, append_images=images, loop=0,
                                duration=gif_durations(frames.count, fps))


def gif_durations(count: int, fps: float) -> list[int]:
    """Milliseconds of each frame, in whole GIF units, without accumulated rounding."""
    ends = [round(i / fps / GIF_TICK_SEC) for i in range(count + 1)]
    return [round(1000 * GIF_TICK_SEC) * (end - start) for start, end in itertools.pairwise(ends)]
