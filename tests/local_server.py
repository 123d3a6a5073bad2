# SPDX-License-Identifier: Apache-2.0
"""A web server on this machine that answers what a test tells it to."""
import contextlib
import http.server
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from a table: path -> list of (status, headers, body), the last one again and again."""

    def do_GET(self):
        answers = self.server.answers[self.path.partition('?')[0]]
        self.server.requests.append(self.path)
        self.server.ranges.append((self.headers.get('Range'), self.headers.get('If-Range')))
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status, self.server.reason)
        for name, value in ({'Content-Length': str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not self.server.pause_sec:
            self.wfile.write(body)
            return
        with contextlib.suppress(OSError):  # the other side has given up
            for i in range(len(body)):
                self.wfile.write(body[i:i + 1])
                time.sleep(self.server.pause_sec)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(handler):
    """A running server of this machine with its url; whatever it reads is set before the first request."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    server.daemon_threads = True
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def local_server():
    """A running server. answers: see Handler.  requests: the paths asked for.  ranges: which part of each.

    reason: phrase after each status.  pause_sec: after each byte.
    """
    with serving(Handler) as server:
        server.answers, server.requests, server.ranges = {}, [], []
        server.reason, server.pause_sec = None, 0.0
        yield server
