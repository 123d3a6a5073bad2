# SPDX-License-Identifier: Apache-2.0
"""A web server on this machine that answers what a test tells it to."""
import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from a table: path -> list of (status, headers, body), the last one again and again."""

    def do_GET(self):
        answers = self.server.answers[self.path.partition('?')[0]]
        self.server.requests.append(self.path)
        self.server.ranges.append((self.headers.get('Range'), self.headers.get('If-Range')))
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in ({'Content-Length': str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def local_server():
    """A running server. answers: see Handler.  requests: the paths asked for.  ranges: which part of each."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.answers, server.requests, server.ranges = {}, [], []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
