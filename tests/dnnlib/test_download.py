# SPDX-License-Identifier: Apache-2.0
"""dnnlib.download against a small server on this machine."""
import gzip
import hashlib
import io
import time

import pytest
from local_server import local_server

from dnnlib import download
from dnnlib.download import DownloadError

pytest.importorskip('requests')


def fetch(url, **options):
    """(content, file name of the server)."""
    file = io.BytesIO()
    name = download.fetch(url, file, **options)
    return file.getvalue(), name


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, 'MAX_PAUSE_SEC', 0.0)
    monkeypatch.setenv('no_proxy', '*')
    with local_server() as server:
        yield server


def test_content_and_server_name_are_returned(server):
    server.answers['/a'] = [(200, {'Content-Disposition': 'attachment; filename="x y.pkl"'}, b'content')]
    assert fetch(server.url + '/a') == (b'content', 'x y.pkl')


def test_failures_and_truncated_answers_are_retried(server, capsys):
    server.answers['/a'] = [(500, {}, b'x'), (200, {}, b''), (200, {'Content-Length': '9'}, b'short'),
                            (200, {}, b'complete')]
    assert fetch(server.url + '/a') == (b'complete', None)
    assert len(server.requests) == 4
    assert capsys.readouterr().out.count('trying again') == 3


TAGGED = {'Accept-Ranges': 'bytes', 'ETag': '"v1"'}
DATED = {'Accept-Ranges': 'bytes', 'ETag': 'W/"v1"', 'Last-Modified': 'Mon, 02 Mar 2026 10:00:00 GMT'}


@pytest.mark.parametrize(('headers', 'version'), [(TAGGED, '"v1"'), (DATED, DATED['Last-Modified'])])
def test_a_broken_download_goes_on_where_it_broke(server, monkeypatch, headers, version):
    monkeypatch.setattr(download, 'CHUNK_BYTES', 2)
    server.answers['/a'] = [
        (200, {**headers, 'Content-Length': '9'}, b'1234'), (503, {}, b'busy'),
        (206, {'Content-Range': 'bytes 4-8/9'}, b'56789')]
    assert fetch(server.url + '/a')[0] == b'123456789'
    assert server.ranges == [(None, None), ('bytes=4-', version), ('bytes=4-', version)]


def test_a_file_that_has_changed_meanwhile_or_cannot_be_continued_starts_again(server, monkeypatch):
    monkeypatch.setattr(download, 'CHUNK_BYTES', 2)
    broken = (200, {**TAGGED, 'Content-Length': '9'}, b'1234')
    server.answers['/new'] = [broken, (200, {}, b'other')]
    wrong_part = (206, {'Content-Range': 'bytes 2-8/9'}, b'3456789')
    server.answers['/elsewhere'] = [broken, wrong_part, (200, {}, b'all')]
    server.answers['/gone'] = [broken, (416, {}, b'no'), (200, {}, b'all')]
    contents = [fetch(f'{server.url}/{name}')[0] for name in ('new', 'elsewhere', 'gone')]
    assert contents == [b'other', b'all', b'all']
    server.ranges.clear()
    server.answers['/plain'] = [(200, {'Content-Length': '9'}, b'1234'), (200, {}, b'whole')]
    assert fetch(server.url + '/plain')[0] == b'whole' and server.ranges == [(None, None)] * 2


def test_the_last_failure_is_raised_and_silence_is_kept(server, capsys):
    server.answers['/a'] = [(200, {}, b'')]
    with pytest.raises(DownloadError, match='empty'):
        fetch(server.url + '/a', num_attempts=2, verbose=False)
    assert len(server.requests) == 2 and capsys.readouterr().out == ''


def test_a_missing_file_is_not_asked_for_again(server):
    server.answers['/a'] = [(404, {}, b'no')]
    with pytest.raises(DownloadError, match='404'):
        fetch(server.url + '/a')
    assert len(server.requests) == 1


def test_an_unusable_url_is_an_error_at_once():
    with pytest.raises(DownloadError, match='nonsense'):
        fetch('nonsense://x')


def test_google_drive_pages_are_followed_by_link_and_by_form(server):
    server.answers['/link'] = [(200, {}, b'<a href="/file?export=download&amp;confirm=t1">Anyway</a>')]
    server.answers['/form'] = [(200, {}, b'<form id="download-form" action="/file" method="get">'
                                         b'<input type="hidden" name="confirm" value="t&amp;2"></form>')]
    server.answers['/file'] = [(200, {}, b'content')]
    assert fetch(server.url + '/link')[0] == fetch(server.url + '/form')[0] == b'content'
    assert server.requests == ['/link', '/file?export=download&confirm=t1', '/form', '/file?confirm=t%262']


def test_google_drive_quota_and_endless_confirmation_are_errors(server):
    server.answers['/quota'] = [(200, {}, b'<title>Google Drive - Quota exceeded</title>')]
    server.answers['/loop'] = [(200, {}, b'<a href="/loop?export=download">Download</a>')]
    with pytest.raises(DownloadError, match='quota'):
        fetch(server.url + '/quota')
    with pytest.raises(DownloadError, match='keeps asking'):
        fetch(server.url + '/loop', num_attempts=1)


def test_large_files_show_their_progress(server, monkeypatch, capsys):
    monkeypatch.setattr(download, 'SHOW_BYTES', 4)
    server.answers['/net.pkl'] = [(200, {}, b'content')]
    assert fetch(server.url + '/net.pkl')[0] == b'content'
    assert 'Downloading net.pkl: 1/1 MiB (100%)' in capsys.readouterr().err


def test_a_promised_checksum_is_checked_and_not_sent(server, tmp_path):
    server.answers['/a'] = [(200, {}, b'content')]
    digest = hashlib.sha256(b'content').hexdigest()
    url = f'{server.url}/a#sha256='
    assert fetch(url + digest) == fetch(url + digest.upper()) == (b'content', None)
    assert set(server.requests) == {'/a'}
    asked = len(server.requests)
    with pytest.raises(DownloadError, match=f'SHA-256 {digest}, not 00'):
        fetch(url + '0' * 64)
    assert len(server.requests) == asked + 1
    (tmp_path / 'x').write_bytes(b'content')
    assert download.is_intact(tmp_path / 'x', url + digest) and download.is_intact(tmp_path / 'x', server.url)
    (tmp_path / 'x').write_bytes(b'conten')
    assert not download.is_intact(tmp_path / 'x', url + digest)


@pytest.mark.parametrize('status', [204, 300, 302, 304, 401])
def test_an_answer_that_is_no_content_is_an_error_at_once(server, status):
    server.answers['/a'] = [(status, {}, b'' if status in (204, 304) else b'<html>see there</html>')]
    with pytest.raises(DownloadError, match=f'answers {status}'):
        fetch(server.url + '/a')
    assert len(server.requests) == 1


def test_bodies_beyond_the_limit_are_not_read_to_the_end(server, monkeypatch):
    monkeypatch.setattr(download, 'MAX_BYTES', 1000)
    monkeypatch.setattr(download, 'CHUNK_BYTES', 100)
    server.answers['/announced'] = [(200, {'Content-Length': str(10 ** 30)}, b''), (200, {}, bytes(1001))]
    server.answers['/endless'] = [(200, {'Transfer-Encoding': 'chunked', 'Content-Length': ''},
                                   b'fffff\r\n' + bytes(0xfffff) + b'\r\n0\r\n\r\n')]
    server.answers['/bomb'] = [(200, {'Content-Encoding': 'gzip'}, gzip.compress(bytes(50_000_000)))]
    server.answers['/exact'] = [(200, {}, bytes(1000))]
    for name in ('announced', 'endless', 'bomb'):
        file = io.BytesIO()
        with pytest.raises(DownloadError, match=r'limit of 1000|limit is 1000'):
            download.fetch(f'{server.url}/{name}', file, verbose=False)
        assert len(file.getvalue()) < 5000
    assert len(fetch(server.url + '/exact')[0]) == 1000


def test_compressed_content_that_nobody_asked_for_is_expanded(server):
    server.answers['/a'] = [(200, {'Content-Encoding': 'gzip'}, gzip.compress(b'content' * 1000))]
    server.answers['/b'] = [(200, {'Content-Encoding': 'br'}, b'x')]
    server.answers['/c'] = [(200, {'Content-Encoding': 'gzip'}, b'not compressed')]
    assert fetch(server.url + '/a')[0] == b'content' * 1000
    for name in 'bc':
        with pytest.raises(DownloadError):
            fetch(f'{server.url}/{name}', num_attempts=2)


def test_a_server_that_stalls_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, 'STALL_SEC', 0.2)
    server.answers['/a'] = [(200, {'Content-Length': '1000'}, b'x' * 1000)]
    server.pause_sec = 0.05
    with pytest.raises(DownloadError, match=r'has sent \d+ bytes in 0.2 s'):
        fetch(server.url + '/a')
    assert len(server.requests) == download.MAX_STALLS


@pytest.mark.parametrize('page', [
    '<form ' * 1300, '<form id="download-form" ' * 320, 'href="' * 1300, 'a' * 8100,
    '<form id="download-form" action="' * 240, '<input type="hidden" name="' * 300])
def test_pages_that_look_like_those_of_google_drive_cost_no_time(page):
    start = time.thread_time()
    download._confirmation_link(page)
    download.shown('http://x.y/?' + page)
    assert time.thread_time() - start < 0.2


def test_passwords_and_keys_are_not_shown():
    url = 'https://me:secret@example.com/a?id=5&X-Amz-Signature=abc&access_token=def#x'
    assert download.shown(url) == 'https://example.com/a?id=5&X-Amz-Signature=...&access_token=...#x'
    assert download.shown('https://example.com/a@b\x1b\ud800') == 'https://example.com/a@b??'


def test_reasons_from_the_server_cannot_write_to_the_terminal(server):
    server.answers['/a'] = [(500, {}, b'')]
    server.reason = 'Bad\x1b[2J'
    with pytest.raises(DownloadError) as error:
        fetch(server.url + '/a', num_attempts=1)
    assert str(error.value) == 'the server answers 500 Bad?[2J'
