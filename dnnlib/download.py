# SPDX-License-Identifier: Apache-2.0
"""Downloads over http(s): resumed or retried, complete or not at all, past Google Drive's warning page."""
import hashlib
import html
import os
import re
import time
import urllib.parse
from typing import Any

from dnnlib.progress import progress, write

CHUNK_BYTES = 1 << 20
SHOW_BYTES = 16 << 20  # smaller files have no progress bar
TIMEOUT_SEC = 30
MAX_PAUSE_SEC = 4.0
DRIVE_PAGE_BYTES = 8192  # warning pages of Google Drive are smaller
DRIVE_HOPS = 3
PARTIAL_CONTENT, NO_SUCH_RANGE = 206, 416  # answers to requests for a part
CHECKSUM_MARK = '#sha256='


class DownloadError(OSError):
    """A file could not be downloaded; the message gives the reason, without the URL."""


class _PermanentError(DownloadError):
    """A response for which a retry is useless."""


class _Received:
    """The part of a file received so far, so that the next attempt resumes there."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Discard everything."""
        # version: identifies this content to the server; '' if it cannot be resumed.
        self.url, self.version, self.data = '', '', bytearray()

    def request(self, url: str) -> dict[str, str]:
        """Headers of a request for the rest of the file; none to request all of it."""
        if url != self.url or not self.version or not self.data:
            return {}
        # If the content has changed, the server sends all of the new content.
        return {'Range': f'bytes={len(self.data)}-', 'If-Range': self.version}

    def begin(self, answer: Any, url: str) -> None:
        """Prepare for the content of a response. Raises DownloadError if it is not the missing part."""
        start, status, headers = len(self.data), answer.status_code, answer.headers
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


def fetch(url: str, num_attempts: int = 10, verbose: bool = True) -> tuple[bytes, str | None]:
    """(content of a URL, file name given by the server or None).

    A URL may end in #sha256=<64 digits>, the expected checksum. Raises DownloadError after `num_attempts`
    failures, or at once for a permanent error or a wrong checksum.
    """
    address, _, digest = url.partition(CHECKSUM_MARK)
    received = _Received()
    for attempt in range(num_attempts):
        try:
            data, server_name = _fetch_past_warnings(address, verbose, received)
            if digest:
                _check_content(data, digest)
            return data, server_name
        except _PermanentError:
            raise
        except DownloadError as error:
            if attempt + 1 == num_attempts:
                raise
            # Exponential backoff.
            pause_sec = min(0.5 * 2 ** attempt, MAX_PAUSE_SEC)
            if verbose:
                write(f'Downloading {url} failed ({error}); trying again in {pause_sec:g} s')
            time.sleep(pause_sec)
    raise AssertionError(f'{num_attempts=} must be at least 1')


def is_intact(path: str | os.PathLike, url: str) -> bool:
    """Whether a file matches the SHA-256 in the URL; True if the URL has none."""
    digest = url.partition(CHECKSUM_MARK)[2]
    if not digest:
        return True
    found = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest() == digest.lower()


def _check_content(data: bytes, digest: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != digest.lower():
        raise _PermanentError(f'the content has the SHA-256 {found}, not {digest}')


def _fetch_past_warnings(url: str, verbose: bool, received: _Received) -> tuple[bytes, str | None]:
    """One attempt; follows a Google Drive page that asks for confirmation."""
    with _new_session() as session:
        target = url
        for _ in range(DRIVE_HOPS):
            data, server_name = _fetch_once(session, target, verbose, received)
            page = data.decode('utf-8', errors='replace') if len(data) < DRIVE_PAGE_BYTES else ''
            if 'Google Drive - Quota exceeded' in page:
                raise _PermanentError('the download quota of this Google Drive file is exceeded')
            link = _confirmation_link(page)
            # Without such a link, this is the file itself.
            if link is None:
                return data, server_name
            target = urllib.parse.urljoin(target, link)
    raise DownloadError('Google Drive keeps asking for confirmation')


def _confirmation_link(page: str) -> str | None:
    """Target of the "download anyway" link or form of a Google Drive page; None for any other page."""
    # Older pages have a link, newer ones a form with hidden fields.
    link = re.search(r'href="([^"]*export=download[^"]*)"', page)
    if link:
        return html.unescape(link.group(1))
    form = re.search(r'<form[^>]*id="download-form"[^>]*action="([^"]+)"', page)
    if not form:
        return None
    fields = re.findall(r'<input[^>]*type="hidden"[^>]*name="([^"]+)"[^>]*value="([^"]*)"', page)
    query = urllib.parse.urlencode([(name, html.unescape(value)) for name, value in fields])
    return f'{html.unescape(form.group(1))}?{query}'


def _new_session() -> Any:
    # Imported on use: it takes a tenth of a second, and most runs download nothing.
    try:
        import requests
    except ImportError as error:
        raise _PermanentError('this needs one more package: pip install requests') from error
    return requests.Session()


def _fetch_once(
    session: Any, url: str, verbose: bool, received: _Received,
) -> tuple[bytes, str | None]:
    # requests derives its errors from OSError; an unusable URL is a ValueError besides.
    try:
        # Without compression Content-Length is the size of the content.
        headers = {'Accept-Encoding': 'identity', **received.request(url)}
        with session.get(url, stream=True, timeout=TIMEOUT_SEC, headers=headers) as answer:
            # Client errors are permanent, except timeouts and rate limits.
            if 400 <= answer.status_code < 500 and answer.status_code not in (408, NO_SUCH_RANGE, 429):
                raise _PermanentError(f'the server answers {answer.status_code} {answer.reason}')
            if answer.status_code != NO_SUCH_RANGE:
                answer.raise_for_status()
            received.begin(answer, url)
            data = _read_all(answer, url, verbose, received.data)
            return data, _server_file_name(answer.headers.get('Content-Disposition', ''))
    except DownloadError:
        raise
    except ValueError as error:
        raise _PermanentError(str(error)) from error
    except OSError as error:
        raise DownloadError(str(error) or type(error).__name__) from error


def _read_all(answer: Any, url: str, verbose: bool, data: bytearray) -> bytes:
    """The complete content: `data`, to which the rest is appended."""
    announced, before = answer.headers.get('Content-Length', ''), len(data)
    is_told = announced.isdigit() and 'Content-Encoding' not in answer.headers
    total = before + int(announced) if is_told else None
    chunks = answer.iter_content(CHUNK_BYTES)
    if verbose and (total or 0) >= SHOW_BYTES:
        name = urllib.parse.urlsplit(url).path.rpartition('/')[2]
        chunks = progress(chunks, total=-(-total // CHUNK_BYTES), desc=f'Downloading {name}', unit='MiB',
                          initial=before // CHUNK_BYTES)
    for chunk in chunks:
        data += chunk
    if not data:
        raise DownloadError('the server sent an empty file')
    # A lost connection looks like the end of the file.
    if total is not None and len(data) != total:
        raise DownloadError(f'got {len(data)} of {total} bytes')
    return bytes(data)


def _server_file_name(disposition: str) -> str | None:
    found = re.search(r'filename="([^"]*)"', disposition) or re.search(r'filename=([^;\s]+)', disposition)
    return found.group(1) if found and found.group(1) else None
