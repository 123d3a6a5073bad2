# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub on this machine: the requests by which files are published and fetched.

Large files go through git-lfs and come back by a redirect, as on the Hub. Its storage protocol Xet is not
spoken: tests set HF_HUB_DISABLE_XET.
"""
import base64
import contextlib
import hashlib
import http.server
import json
import re
import urllib.parse

from local_server import serving

TOKEN = 'hf_standin'
ROUTES = [  # method, path, name of the method that answers
    ('POST', r'/api/repos/create', 'create'),
    ('POST', r'/api/validate-yaml', 'validate'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)', 'preupload'),
    ('POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'batch'),
    ('PUT', r'/lfs/(?P<oid>\w+)', 'store'),
    ('GET', r'/lfs/(?P<oid>\w+)', 'stored'),
    ('HEAD', r'/lfs/(?P<oid>\w+)', 'stored'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)', 'commit'),
    ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)', 'tree'),
    ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+?)(?:/revision/(?P<revision>[^/]+))?', 'info'),
    ('HEAD', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)', 'resolve'),
    ('GET', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)', 'resolve'),
]


class Problem(Exception):
    """An answer that is an error. code: the Hub's name for it, None for none."""

    def __init__(self, status, code=None):
        self.status, self.code = status, code


class Repository:
    """The files of each revision, by name; (content, whether it is a large file)."""

    def __init__(self, private=False):
        self.private, self.revisions = private, {'main': {}}

    def put(self, revision='main', **files):
        """Add files; a double underscore in a name is a dot."""
        found = {name.replace('__', '.'): (content, False) for name, content in files.items()}
        self.revisions.setdefault(revision, {}).update(found)

    def commit_id(self, revision):
        return hashlib.sha1(repr((revision, sorted(self.revisions[revision].items()))).encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from server.repositories and server.objects, the large files by their SHA-256."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        length = int(self.headers.get('Content-Length') or 0)
        self.body = self.rfile.read(length)
        path = self.path.partition('?')[0]
        self.server.requests.append(f'{self.command} {urllib.parse.unquote(path)}')
        found = [(name, match) for method, pattern, name in ROUTES
                 if method == self.command and (match := re.fullmatch(pattern, path))]
        if not found:
            return self.answer(404, {'error': 'no such route'})
        name, match = found[0]
        parts = {key: urllib.parse.unquote(part or 'main') for key, part in match.groupdict().items()}
        try:
            return getattr(self, name)(**parts)
        except Problem as problem:
            headers = {} if problem.code is None else {'X-Error-Code': problem.code}
            return self.answer(problem.status, {'error': problem.code}, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass

    def answer(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def repository(self, repo, revision=None):
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self.is_known()):
            raise Problem(404 if self.is_known() else 401, 'RepoNotFound')
        if revision is not None and revision not in found.revisions:
            raise Problem(404, 'RevisionNotFound')
        return found

    def is_known(self):
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def require_token(self):
        if not self.is_known():
            raise Problem(401)

    def create(self):
        self.require_token()
        wanted = json.loads(self.body)
        repo = f'{wanted.get("organization") or "me"}/{wanted["name"]}'
        status = 409 if repo in self.server.repositories else 200
        is_private = wanted.get('private') or wanted.get('visibility') == 'private'
        self.server.repositories.setdefault(repo, Repository(bool(is_private)))
        self.answer(status, {'url': f'{self.server.url}/{repo}', 'name': repo, 'id': repo})

    def validate(self):
        self.answer(200, {'errors': [], 'warnings': []})

    def preupload(self, repo, revision):
        self.require_token()
        self.repository(repo, revision)
        self.answer(200, {'files': [
            {'path': file['path'], 'shouldIgnore': False,
             'uploadMode': 'lfs' if file['path'].endswith(('.safetensors', '.png')) else 'regular'}
            for file in json.loads(self.body)['files']]})

    def batch(self, repo):
        self.require_token()
        self.repository(repo)
        self.answer(200, {'transfer': 'basic', 'objects': [
            {**item, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{item["oid"]}'}}}
            for item in json.loads(self.body)['objects']]})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer(200, {})

    def stored(self, oid):
        self.answer(200, self.server.objects[oid], {'ETag': f'"{oid}"'})

    def commit(self, repo, revision):
        self.require_token()
        files = self.repository(repo, revision).revisions[revision]
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                files[value['path']] = (base64.b64decode(value['content']), False)
            elif item['key'] == 'lfsFile':
                files[value['path']] = (self.server.objects[value['oid']], True)
        oid = self.repository(repo).commit_id(revision)
        self.answer(200, {'commitUrl': f'{self.server.url}/{repo}/commit/{oid}', 'commitOid': oid})

    def tree(self, repo, revision):
        files = self.repository(repo, revision).revisions[revision]
        self.answer(200, [{'type': 'file', 'path': name, 'size': len(data), 'oid': '0' * 40}
                          for name, (data, _) in files.items()])

    def info(self, repo, revision='main'):
        found = self.repository(repo, revision)
        self.answer(200, {'id': repo, 'sha': found.commit_id(revision), 'private': found.private, 'tags': [],
                          'siblings': [{'rfilename': name} for name in found.revisions[revision]]})

    def resolve(self, repo, revision, file):
        found = self.repository(repo, revision)
        headers = {'X-Repo-Commit': found.commit_id(revision)}
        if file not in found.revisions[revision]:
            raise Problem(404, 'EntryNotFound')
        data, is_large = found.revisions[revision][file]
        oid = hashlib.sha256(data).hexdigest()
        if is_large:
            # Another host than the Hub's, so that the client takes it for a content server.
            headers |= {'Location': f'http://localhost:{self.server.server_port}/lfs/{oid}',
                        'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': str(len(data))}
            return self.answer(302, b'', headers)
        return self.answer(200, data, {**headers, 'ETag': f'"{oid[:40]}"'})


@contextlib.contextmanager
def hub_stand_in():
    """A running server. repositories: by user/name.  requests: 'METHOD path', as they came in."""
    with serving(Handler) as server:
        server.repositories, server.objects, server.requests = {}, {}, []
        yield server
