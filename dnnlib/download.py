# SPDX-License-Identifier: Apache-2.0
"""Downloads over http(s): resumed or retried, complete or not at all, past Google Drive's warning page."""
import errno
import hashlib
import html
import http.client
import os
import re
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from dnnlib.progress import progress, write

CHUNK_BYTES = 1 << 20
SHOW_BYTES = 16 << 20  # smaller files have no progress bar
TIMEOUT_SEC = 30
MAX_BYTES = 4 << 30  # the largest network files have 2 GiB
STALL_SEC, STALL_BYTES = 30.0, 32 << 10  # in each such time at least so many bytes must arrive
MAX_STALLS = 2
GZIP_OR_ZLIB = 47  # of zlib.decompressobj: by the first bytes
MAX_PAUSE_SEC = 4.0
DRIVE_PAGE_BYTES = 8192  # warning pages of Google Drive are smaller
DRIVE_HOPS = 3
PARTIAL_CONTENT, NO_SUCH_RANGE = 206, 416  # answers to requests for a part
CHECKSUM_MARK = '#sha256='
SUCCESS = (200, 203, PARTIAL_CONTENT)
# None of these looks at a character of a hostile page more than a few times.
TAG = re.compile(r'<(a|form|input)\b([^<>]*)>')
ATTRIBUTE = re.compile(r'(?<![\w-])([\w-]+)="([^"<>]*)"')
SECRET = re.compile(
    r'((?<=[?&])[^=&#]{0,60}(?:token|key|sig|pass|auth|secret|credential)[^=&#]{0,60}=)[^&#\s]*',
    re.IGNORECASE)


class DownloadError(OSError):
    """A file could not be downloaded; the message gives the reason, without the URL."""


class _PermanentError(DownloadError):
    """A response for which a retry is useless."""


class _StalledError(DownloadError):
    """The server sends next to nothing."""


class _Received:
    """The part of a download that is in `file` so far, so that the next attempt resumes there."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.clear()

    def clear(self) -> None:
        """Discard everything."""
        # version: identifies this content to the server; '' if it cannot be resumed.
        self.url, self.version = '', ''
        self.file.seek(0)
        self.file.truncate()

    def request(self, url: str) -> dict[str, str]:
        """Headers of a request for the rest of the file; none to request all of it."""
        if url != self.url or not self.version or not self.file.tell():
            return {}
        # If the content has changed, the server sends all of the new content.
        return {'Range': f'bytes={self.file.tell()}-', 'If-Range': self.version}

    def begin(self, answer: Any, url: str) -> None:
        """Prepare for the content of a response. Raises DownloadError if it is not the missing part."""
        start, status, headers = self.file.tell(), answer.status_code, answer.headers
        if status == PARTIAL_CONTENT and headers.get('Content-Range', '').startswith(f'bytes {start}-'):
            return
        self.clear()
        if status in (PARTIAL_CONTENT, NO_SUCH_RANGE):
            raise DownloadError(f'the server does not resume at byte {start}')
        if headers.get('Accept-Ranges') == 'bytes' and 'Content-Encoding' not in headers:
            tag = headers.get('ETag', 'W/')
            # A weak tag does not guarantee identical bytes.
            self.version = headers.get('Last-Modified', '') if tag.startswith('W/') else tag
        self.url = url


def fetch(url: str, file: BinaryIO, num_attempts: int = 10, verbose: bool = True) -> str | None:
    """Write the content of a URL into a file that is open for reading and writing.

    Returns the file name given by the server or None. A URL may end in #sha256=<64 digits>, the expected
    checksum. Raises DownloadError after `num_attempts` failures, or at once for a permanent error, a wrong
    checksum, or a body beyond MAX_BYTES; after MAX_STALLS attempts that came to a standstill, too.
    """
    address, _, digest = url.partition(CHECKSUM_MARK)
    received, stalls = _Received(file), 0
    for attempt in range(num_attempts):
        try:
            server_name = _fetch_past_warnings(address, verbose, received)
            if digest:
                _check_content(file, digest)
            return server_name
        except _PermanentError:
            raise
        except DownloadError as error:
            stalls += isinstance(error, _StalledError)
            if attempt + 1 == num_attempts or stalls >= MAX_STALLS:
                raise
            # Exponential backoff.
            pause_sec = min(0.5 * 2 ** attempt, MAX_PAUSE_SEC)
            if verbose:
                write(f'Downloading {shown(url)} failed ({error}); trying again in {pause_sec:g} s')
            time.sleep(pause_sec)
    raise AssertionError(f'{num_attempts=} must be at least 1')


def shown(url: str) -> str:
    """A URL for messages and file names: without user name, password and keys, in printable characters."""
    text = re.sub('//[^/?#]*@', '//', url, count=1)
    text = SECRET.sub(r'\1...', text)
    return ''.join(c if c.isascii() and c.isprintable() else '?' for c in text)


def is_intact(path: str | os.PathLike, url: str) -> bool:
    """Whether a file matches the SHA-256 in the URL; True if the URL has none."""
    digest = url.partition(CHECKSUM_MARK)[2]
    if not digest:
        return True
    with open(path, 'rb') as file:
        return _digest(file) == digest.lower()


def _check_content(file: BinaryIO, digest: str) -> None:
    found = _digest(file)
    if found != digest.lower():
        raise _PermanentError(f'the content has the SHA-256 {found}, not {digest[:64]}')


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        found.update(chunk)
    return found.hexdigest()


def _fetch_past_warnings(url: str, verbose: bool, received: _Received) -> str | None:
    """One attempt; follows a Google Drive page that asks for confirmation."""
    with _new_session() as session:
        target = url
        for _ in range(DRIVE_HOPS):
            server_name = _fetch_once(session, target, verbose, received)
            page = _small_page(received.file)
            if 'Google Drive - Quota exceeded' in page:
                raise _PermanentError('the download quota of this Google Drive file is exceeded')
            link = _confirmation_link(page)
            # Without such a link, this is the file itself.
            if link is None:
                return server_name
            target = urllib.parse.urljoin(target, link)
    raise DownloadError('Google Drive keeps asking for confirmation')


def _small_page(file: BinaryIO) -> str:
    """The content as text if it is short enough for a warning page, else ''."""
    if file.tell() >= DRIVE_PAGE_BYTES:
        return ''
    file.seek(0)
    return file.read().decode('utf-8', errors='replace')


def _confirmation_link(page: str) -> str | None:
    """Target of the "download anyway" link or form of a Google Drive page; None for any other page."""
    tags = [(name, dict(ATTRIBUTE.findall(text))) for name, text in TAG.findall(page)]
    # Older pages have a link, newer ones a form with hidden fields.
    links = [found['href'] for _, found in tags if 'export=download' in found.get('href', '')]
    if links:
        return html.unescape(links[0])
    forms = [found['action'] for name, found in tags
             if name == 'form' and found.get('id') == 'download-form' and found.get('action')]
    if not forms:
        return None
    query = urllib.parse.urlencode([
        (found['name'], html.unescape(found['value'])) for name, found in tags
        if name == 'input' and found.get('type') == 'hidden' and {'name', 'value'} <= set(found)])
    return f'{html.unescape(forms[0])}?{query}'


def _new_session() -> Any:
    # Imported on use: it takes a tenth of a second, and most runs download nothing.
    try:
        import requests
    except ImportError as error:
        raise _PermanentError('this needs one more package: pip install requests') from error
    return requests.Session()


def _fetch_once(session: Any, url: str, verbose: bool, received: _Received) -> str | None:
    import requests
    # requests derives its errors from OSError; an unusable URL is a ValueError besides.
    try:
        # Without compression Content-Length is the size of the content.
        headers = {'Accept-Encoding': 'identity', **received.request(url)}
        with session.get(url, stream=True, timeout=TIMEOUT_SEC, headers=headers) as answer:
            _check_status(answer)
            received.begin(answer, url)
            _receive(answer, url, verbose, received.file)
            return _server_file_name(answer.headers.get('Content-Disposition', ''))
    except DownloadError:
        raise
    except ValueError as error:
        raise _PermanentError(_one_line(error)) from error
    except (OSError, requests.urllib3.exceptions.HTTPError, http.client.HTTPException, zlib.error) as error:
        # A full disk is no fault of the connection.
        is_full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT)
        raise (_PermanentError if is_full else DownloadError)(_one_line(error)) from error


def _check_status(answer: Any) -> None:
    """Raise unless the response has the content, or says that it cannot be resumed."""
    status = answer.status_code
    if status in (*SUCCESS, NO_SUCH_RANGE):
        return
    text = f'the server answers {status} {_one_line(answer.reason or "")}'.rstrip()
    # Client errors are permanent, except timeouts and rate limits; so is a redirection to nowhere.
    raise DownloadError(text) if status in (408, 429) or status >= 500 else _PermanentError(text)


def _one_line(error: Any) -> str:
    # Messages of requests contain the path of the URL.
    text = SECRET.sub(r'\1...', str(error) or type(error).__name__)
    return ''.join(c if c.isascii() and c.isprintable() else '?' for c in text)[:300]


def _receive(answer: Any, url: str, verbose: bool, file: BinaryIO) -> None:
    """Append the content of a response to the file; it must be as long as announced."""
    announced, before = answer.headers.get('Content-Length', ''), file.tell()
    is_told = announced.isdigit() and len(announced) < 20 and 'Content-Encoding' not in answer.headers
    total = before + int(announced) if is_told else None
    if (total or 0) > MAX_BYTES:
        raise _PermanentError(f'the server announces {total} bytes; the limit is {MAX_BYTES}')
    is_shown = verbose and (total or 0) >= SHOW_BYTES
    name = shown(urllib.parse.urlsplit(url).path.rpartition('/')[2])
    with progress(total=-(-(total or 0) // CHUNK_BYTES), desc=f'Downloading {name}', unit='MiB',
                  initial=before // CHUNK_BYTES, show=is_shown) as bar:
        for part in _parts(answer):
            done = file.tell() // CHUNK_BYTES
            file.write(part)
            if file.tell() > MAX_BYTES:
                raise _PermanentError(f'it is longer than the limit of {MAX_BYTES} bytes')
            bar.update(file.tell() // CHUNK_BYTES - done)
        bar.update((total or 0) % CHUNK_BYTES > 0)
    if not file.tell():
        raise DownloadError('the server sent an empty file')
    # A lost connection looks like the end of the file.
    if total is not None and file.tell() != total:
        raise DownloadError(f'got {file.tell()} of {total} bytes')


def _parts(answer: Any) -> Iterator[bytes]:
    """The content of a response, decompressed if need be. Raises DownloadError if the server stalls."""
    encoding = answer.headers.get('Content-Encoding', 'identity')
    if encoding not in ('identity', 'gzip', 'deflate'):
        raise _PermanentError(f'the server compresses by {_one_line(encoding)}, unasked')
    expand = None if encoding == 'identity' else zlib.decompressobj(GZIP_OR_ZLIB)
    # Reads what has arrived; urllib3 before 2 has only read(), which waits for all of it.
    read = getattr(answer.raw, 'read1', answer.raw.read)
    window_sec, num_bytes = time.monotonic(), 0
    while data := read(CHUNK_BYTES, decode_content=False):
        num_bytes += len(data)
        while expand is not None and data:
            yield expand.decompress(data, CHUNK_BYTES)
            data = expand.unconsumed_tail
        if data:
            yield data
        if time.monotonic() - window_sec > STALL_SEC:
            if num_bytes < STALL_BYTES:
                raise _StalledError(f'the server has sent {num_bytes} bytes in {STALL_SEC:g} s')
            window_sec, num_bytes = time.monotonic(), 0


def _server_file_name(disposition: str) -> str | None:
    found = re.search(r'filename="([^"]*)"', disposition) or re.search(r'filename=([^;\s]+)', disposition)
    return found.group(1) if found and found.group(1) else None
