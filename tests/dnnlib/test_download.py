# SPDX-License-Identifier: Apache-2.0
"""dnnlib.download against a small server on this machine."""
import hashlib
import http.server
import threading

import pytest

from dnnlib import download
from dnnlib.download import DownloadError, fetch

pytest.importorskip('requests')


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from a table: path -> list of (status, headers, body), the last one again and again."""

    def do_GET(self):
        answers = self.server.answers[self.path.partition('?')[0]]
        self.server.requests.append(self.path)
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in ({'Content-Length': str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, 'MAX_PAUSE_SEC', 0.0)
    monkeypatch.setenv('no_proxy', '*')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.answers, server.requests = {}, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_content_and_server_name_are_returned(server):
    server.answers['/a'] = [(200, {'Content-Disposition': 'attachment; filename="x y.pkl"'}, b'content')]
    assert fetch(server.url + '/a') == (b'content', 'x y.pkl')


def test_failures_and_truncated_answers_are_retried(server, capsys):
    server.answers['/a'] = [(500, {}, b'x'), (200, {}, b''), (200, {'Content-Length': '9'}, b'short'),
                            (200, {}, b'complete')]
    assert fetch(server.url + '/a') == (b'complete', None)
    assert len(server.requests) == 4
    assert capsys.readouterr().out.count('trying again') == 3


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
    with pytest.raises(DownloadError, match='again and again'):
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
