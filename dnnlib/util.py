# SPDX-License-Identifier: Apache-2.0
"""Small utilities: errors for the user, attribute dictionaries, times as text, logs, URLs and their cache."""
import contextlib
import hashlib
import io
import os
import re
import stat
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib import download
from dnnlib.streams import Logger as Logger  # the published name

HASH_CHUNK = 1 << 20  # bytes read at a time
MAX_FILE_BYTES = 4 << 30  # of a file that is read as a whole
MAX_CACHE_NAME = 150  # characters besides the digest; file systems allow 255 in all
_cache = {'dir': None}  # set by set_cache_dir


class UserError(ValueError):
    """An error that the user can fix: one line that names the option or file, the rule and the remedy."""


class EasyDict(dict):
    """A dictionary whose items are attributes too; a missing one raises AttributeError."""

    __module__ = 'dnnlib.util'  # as files name it, wherever it is installed

    # Attributes are items: nothing is ever stored beside the dictionary.
    __setattr__ = dict.__setitem__

    def __getattr__(self, key: str) -> Any:
        self._require(key)
        return self[key]

    def __delattr__(self, key: str) -> None:
        self._require(key)
        self.pop(key)

    def _require(self, key: str) -> None:
        if key not in self:
            raise AttributeError(f'no item {key!r} among {list(self)}')


def format_time(seconds: float) -> str:
    """Seconds, rounded, as '42s', '3m 07s', '2h 05m 09s' or '1d 03h 07m'."""
    # Rounded first, so that 59.6 s is a minute and never '60s'.
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f'{days}d {hours:02}h {minutes:02}m'
    if hours:
        return f'{hours}h {minutes:02}m {sec:02}s'
    return f'{minutes}m {sec:02}s' if minutes else f'{sec}s'


@contextlib.contextmanager
def replace_file(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which replaces `path` if the block succeeds.

    Readers never see a partial file; on failure `path` is unchanged and the temporary file is removed.
    durable: flush file and folder to disk, so that the file survives a power cut. Raises UserError naming
    `path` if the file cannot be written.
    """
    path = Path(path)
    # Keeps the suffix, by which writers choose the format.
    temporary = path.with_name(f'.{uuid.uuid4().hex}.tmp{path.suffix}')
    try:
        yield temporary
        if durable:
            # Without this a power cut after the renaming may leave an empty file under the final name.
            with open(temporary, 'r+b') as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Errors about other files, read inside the block, are not handled here.
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        raise UserError(f'{path}: cannot be written ({error.strerror or error}); check the folder, its '
                        'permissions and the free space') from error
    finally:
        with contextlib.suppress(OSError):  # usually there is nothing left
            temporary.unlink()
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, if the system supports it: renames can be lost, too."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: str | os.PathLike) -> Path:
    """Create the folder of --outdir if it does not exist. Raises UserError if it cannot be written to."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={path}: cannot be created ({error.strerror}); choose another') from error
    # Checked here, not only after the first image has been generated.
    if not os.access(path, os.W_OK):
        raise UserError(f'--outdir={path}: cannot be written to; choose another or change its permissions')
    return Path(path)


def find_bundled(name_or_path: str, folder: Path, suffixes: tuple[str, ...]) -> str:
    """The path of a file of a folder that a bare name means; anything else is returned unchanged."""
    # './emoji32' and 'data/emoji32' are paths; only a bare name is looked up.
    is_name = name_or_path == os.path.basename(name_or_path)
    found = [folder / f'{name_or_path}{suffix}' for suffix in suffixes]
    return next((str(path) for path in found if is_name and path.is_file()), name_or_path)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file opened for reading. Raises OSError, at once, for pipes, devices and the like.

    Reading a pipe would wait for a writer, and /dev/zero never ends.
    """
    # Checked on the opened file: the name may be given to another one at any time.
    handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError('not a regular file')
        return os.fdopen(handle, 'rb')
    except OSError:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file of at most MAX_FILE_BYTES. Raises OSError."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise OSError(f'larger than {MAX_FILE_BYTES >> 30} GiB')
        return file.read(MAX_FILE_BYTES)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while data := file.read(HASH_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: object) -> str:
    """Text of foreign origin on one line: control characters, line breaks and lone surrogates as escapes.

    Names in archives and messages of servers must not move the cursor or pass for lines of this program.
    """
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode('ascii')
                   for char in str(text))


def set_cache_dir(path: str | None) -> None:
    """Keep downloads and cached statistics in `path` from now on; None for the default place."""
    _cache['dir'] = path


def make_cache_dir_path(*parts: str) -> str:
    """The path of `parts` inside the cache folder; creates nothing.

    The folder is the one set by set_cache_dir, else $DNNLIB_CACHE_DIR, else .cache/dnnlib inside $HOME,
    %USERPROFILE% or the temporary folder.
    """
    # set_cache_dir takes precedence over the environment.
    root = _cache['dir'] or os.environ.get('DNNLIB_CACHE_DIR')
    if not root:
        home = os.environ.get('HOME') or os.environ.get('USERPROFILE') or tempfile.gettempdir()
        root = os.path.join(home, '.cache', 'dnnlib')
    return os.path.join(root, *parts)


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Whether `obj` is text like 'https://example.com/x': scheme, host with a dot; 'file://' if allowed."""
    if not isinstance(obj, str) or '://' not in obj:
        return False
    if obj.startswith('file://'):
        return allow_file_urls
    try:
        parts = urllib.parse.urlsplit(obj)
    except ValueError:  # such as an unfinished IPv6 address
        return False
    # A host without a dot is local or a typing error.
    return bool(parts.scheme) and '.' in parts.netloc


def cache_file_name(url: str, server_name: str | None = None) -> str:
    """Name of a download in the cache: <md5 of the URL>_<the server's name for it, else the URL>.

    Without passwords and keys; of a long name only the end.
    """
    name = re.sub(r'[^0-9a-zA-Z._-]', '_', server_name or download.shown(url))
    # The end has the suffix.
    return f'{url_digest(url)}_{name[-MAX_CACHE_NAME:]}'


def url_digest(url: str) -> str:
    """The 32 hexadecimal digits with which the name of a URL's cached file begins."""
    return hashlib.md5(url.encode('utf-8', 'surrogatepass'), usedforsecurity=False).hexdigest()


def open_url(
    url: str, cache_dir: str | None = None, num_attempts: int = 10, verbose: bool = True,
    return_filename: bool = False, cache: bool = True,
) -> BinaryIO | str:
    """A URL or local path, opened for reading in binary, or its local path if `return_filename`.

    http(s): fetched at most `num_attempts` times, checked against the size that the server announced, and
    kept in `cache_dir` (default: 'downloads' in the cache folder), where later calls find it. A URL that ends
    in #sha256=<digits> is checked against them each time. Without `cache` nothing is written. Raises
    UserError if the file is unavailable.
    """
    if num_attempts < 1 or (return_filename and not cache):
        raise ValueError(f'{num_attempts=} must be at least 1, and a file name needs cache=True')
    if not url:
        raise UserError('the path of a file is empty; give its path or URL')
    path = _local_path(url)
    if path is None and not cache:
        content = io.BytesIO()
        _fetch(url, content, num_attempts, verbose)
        content.seek(0)
        return content
    if path is None:
        path = _cached_path(url, Path(cache_dir or make_cache_dir_path('downloads')), num_attempts, verbose)
    if return_filename:
        return str(path)
    # A pipe or a device would be waited for, or read, without end.
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path}: not a file but a folder, pipe or device; give a file')
    try:
        return open(path, 'rb')
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}); check the path') from error
    except ValueError as error:  # such as a zero byte
        raise UserError(f'{path!a}: not the path of a file ({error})') from error


def _local_path(url: str) -> str | None:
    if not re.match('[a-z]+://', url):
        return url
    if not url.startswith('file://'):
        return None
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    # file:///C:/x on Windows
    return path[1:] if re.match('/[a-zA-Z]:', path) else path


def _cached_path(url: str, folder: Path, num_attempts: int, verbose: bool) -> Path:
    # Several matches are ambiguous, and a changed one is invalid: fetch again.
    found = list(folder.glob(f'{url_digest(url)}_*'))
    if len(found) == 1 and download.is_intact(found[0], url):
        return found[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder}: cannot be created ({error.strerror}); set DNNLIB_CACHE_DIR to a folder '
                        'that can be written') from error
    # Several processes may fetch the same file at once: each replaces it by the same content.
    partial = folder / f'.{uuid.uuid4().hex}.tmp'
    try:
        with open(partial, 'x+b') as file:
            server_name = _fetch(url, file, num_attempts, verbose)
        path = folder / cache_file_name(url, server_name)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f'{folder}: a download cannot be written ({error.strerror or error}); free space, or '
                        'set DNNLIB_CACHE_DIR to another folder') from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, file: BinaryIO, num_attempts: int, verbose: bool) -> str | None:
    try:
        return download.fetch(url, file, num_attempts, verbose)
    except download.DownloadError as error:
        raise UserError(f'{download.shown(url)}: cannot be downloaded ({error}); check address and '
                        'connection, or fetch it by hand and give its path instead') from error
