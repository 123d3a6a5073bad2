# SPDX-License-Identifier: Apache-2.0
"""dnnlib.util: dictionaries, times, whole files, logs, URLs."""
import errno
import hashlib
import io
import os
import pickle
import sys

import pytest
from golden_cases import index

import dnnlib
from dnnlib import util
from dnnlib.util import (
    EasyDict,
    Logger,
    UserError,
    file_sha256,
    first_line,
    format_time,
    is_url,
    make_folder,
    open_url,
    replace_file,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or fills the cache of the person who runs it."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))


def fail_to_fetch(*args):
    raise AssertionError('a download was started')


def test_easy_dict_items_are_attributes():
    d = EasyDict(a=1)
    d.b = 2
    del d.a
    assert d == {'b': 2} and d.b == d['b'] == 2
    with pytest.raises(AttributeError, match="'a'"):
        _ = d.a
    with pytest.raises(AttributeError, match="'a'"):
        del d.a
    assert not hasattr(d, 'other')


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_easy_dict_pickles_under_its_published_name(protocol):
    data = pickle.dumps(EasyDict(a=[1], b=EasyDict(c='x')), protocol)
    copy = pickle.loads(data)
    assert type(copy) is dnnlib.EasyDict and copy.b.c == 'x' and copy.a == [1]
    assert b'dnnlib.util' in data


@pytest.mark.parametrize(('seconds', 'text'), index('loop_misc').get('format_time', []) + [
    [42.4, '42s'], [59.6, '1m 00s'], [187, '3m 07s'], [7509, '2h 05m 09s'], [100 * 86400, '100d 00h 00m']])
def test_times_are_rounded_and_padded(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize(('obj', 'expected'), index('loop_misc').get('is_url', []) + [
    ['http://localhost/x', False], ['x.pkl', False], [None, False], ['://a.b', False], ['https://[x', False]])
def test_urls_are_told_from_paths(obj, expected):
    assert is_url(obj) is expected


def test_file_urls_count_only_if_allowed():
    assert is_url('file:///x', allow_file_urls=True)
    assert not is_url('file:///x')


@pytest.mark.parametrize('case', index('loop_misc').get('url_cache', []))
def test_downloads_have_the_published_name_in_the_cache(case):
    assert util.cache_file_name(case['url']) == case['cache_file']


def test_the_cache_folder_is_the_set_one_then_the_environment_then_home(monkeypatch, tmp_path):
    util.set_cache_dir('/set')
    assert util.make_cache_dir_path('a', 'b') == '/set/a/b'
    util.set_cache_dir(None)
    assert util.make_cache_dir_path() == str(tmp_path / 'cache')
    monkeypatch.delenv('DNNLIB_CACHE_DIR')
    monkeypatch.setenv('HOME', '/home/me')
    assert dnnlib.make_cache_dir_path('x') == '/home/me/.cache/dnnlib/x'
    monkeypatch.delenv('HOME')
    monkeypatch.setenv('USERPROFILE', '/users/me')
    assert util.make_cache_dir_path() == '/users/me/.cache/dnnlib'


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / 'a.txt'
    with replace_file(path) as temporary:
        temporary.write_text('first')
        assert not path.exists() and temporary.suffix == '.txt'
    with pytest.raises(KeyError), replace_file(path) as temporary:
        temporary.write_text('second, half')
        raise KeyError('interrupted')
    assert path.read_text() == 'first' and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'missing' / 'a', tmp_path / 'file' / 'a', tmp_path):
        with pytest.raises(UserError, match=f'^{path}: cannot be written') as caught:
            with replace_file(path) as temporary:
                temporary.write_text('x')
        assert '\n' not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / 'a'):
        open(tmp_path / 'source')


def test_a_durable_file_is_flushed_before_it_appears(tmp_path, monkeypatch):
    path, flushed = tmp_path / 'file.bin', []
    monkeypatch.setattr(os, 'fsync', lambda handle: flushed.append(path.exists()))
    with replace_file(path, durable=True) as temporary:
        temporary.write_bytes(b'new')
        assert not path.exists()
    assert path.read_bytes() == b'new' and list(tmp_path.iterdir()) == [path]
    assert flushed == [False, True]  # the file, then its folder


def test_a_failure_leaves_the_old_durable_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file.bin'
    path.write_bytes(b'old')
    with pytest.raises(KeyError), replace_file(path, durable=True) as temporary:
        temporary.write_bytes(b'half')
        raise KeyError('interrupted')
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r'net\.pkl: cannot be written \(No space left'):
        with replace_file(tmp_path / 'net.pkl', durable=True):
            raise OSError(errno.ENOSPC, 'No space left on device')
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / 'file').write_bytes(data)
    assert file_sha256(tmp_path / 'file') == hashlib.sha256(data).hexdigest()


def test_the_first_line_of_an_error_is_its_message_or_its_class():
    assert first_line(ValueError('\n one \ntwo')) == 'one ' and first_line(KeyError()) == 'KeyError'


def test_a_folder_is_made_with_its_parents_and_may_exist(tmp_path):
    for _ in range(2):
        assert make_folder(tmp_path / 'a' / 'b').is_dir()


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / 'a').write_text('')
    with pytest.raises(UserError, match=r'--outdir=.*cannot be created'):
        make_folder(tmp_path / 'a' / 'b')


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK)  # the tests may run as root
    with pytest.raises(UserError, match='cannot be written to'):
        make_folder(tmp_path)


def test_a_log_copies_both_streams_and_keeps_them_apart(tmp_path, capsys):
    before = sys.stdout, sys.stderr
    with Logger(tmp_path / 'log.txt') as log:
        print('out')
        print('err', file=sys.stderr)
        log.write(b'bytes\n')
        log.write('')
        assert (tmp_path / 'log.txt').read_text() == 'out\nerr\nbytes\n'
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ('out\nbytes\n', 'err\n')


def test_a_log_can_be_appended_to_and_needs_no_file(tmp_path, capsys):
    for text in ('one', 'two'):
        with Logger(tmp_path / 'log.txt', file_mode='a'):
            print(text)
    with Logger():
        print('three')
    assert (tmp_path / 'log.txt').read_text() == 'one\ntwo\n'
    assert capsys.readouterr().out == 'one\ntwo\nthree\n'


def test_closing_leaves_streams_alone_that_others_have_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    log, mine = Logger(tmp_path / 'log.txt'), io.StringIO()
    kept, sys.stdout = sys.stdout, mine
    log.close()
    log.close()
    assert sys.stdout is mine
    kept.write('late')  # goes on without the file
    assert (tmp_path / 'log.txt').read_text() == ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_a_full_disk_ends_the_log_but_not_the_program(capsys):
    with Logger('/dev/full'):
        print('one')
        print('two')
    out = capsys.readouterr().out
    assert out.count('Logging to the file has stopped') == 1 and out.endswith('two\n')


def test_local_paths_and_file_urls_need_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(util.download, 'fetch', fail_to_fetch)
    path = tmp_path / 'a b.bin'
    path.write_bytes(b'content')
    for url in (str(path), f'file://{path}', f'file://{path}'.replace(' ', '%20')):
        with open_url(url) as file:
            assert file.read() == b'content'
    assert open_url(str(path), return_filename=True) == str(path)
    assert open_url('file:///C:/x.pkl', return_filename=True) == 'C:/x.pkl'


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match=f'^{tmp_path}/no.pkl: cannot be read'):
        open_url(str(tmp_path / 'no.pkl'))


def content_of(name):
    def fetch(url, file, *_):
        file.write(b'content')
        return name
    return fetch


def test_a_download_is_kept_and_found_again(tmp_path, monkeypatch):
    url = 'https://example.com/net'
    monkeypatch.setattr(util.download, 'fetch', content_of('my net.pkl'))
    with open_url(url) as file:
        assert file.read() == b'content'
    files = list((tmp_path / 'cache' / 'downloads').iterdir())
    assert [p.name for p in files] == [util.cache_file_name(url, 'my net.pkl')]
    assert files[0].name.endswith('_my_net.pkl')
    monkeypatch.setattr(util.download, 'fetch', fail_to_fetch)
    assert open_url(url, return_filename=True) == str(files[0])


def test_a_download_without_cache_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(util.download, 'fetch', content_of(None))
    assert open_url('https://example.com/net', cache=False).read() == b'content'
    assert not (tmp_path / 'cache').exists()
    with pytest.raises(ValueError, match='cache=True'):
        open_url('https://example.com/net', cache=False, return_filename=True)


def test_a_failed_download_names_url_cause_and_remedy(tmp_path, monkeypatch):
    def fail(*args):
        raise util.download.DownloadError('no route')
    monkeypatch.setattr(util.download, 'fetch', fail)
    with pytest.raises(UserError, match=r'https://example.com/net: .*no route.*by hand'):
        open_url('https://example.com/net')
    assert list((tmp_path / 'cache' / 'downloads').iterdir()) == []


def test_a_cache_that_cannot_be_created_is_named(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(util.download, 'fetch', content_of(None))
    with pytest.raises(UserError, match='DNNLIB_CACHE_DIR'):
        open_url('https://example.com/net', cache_dir=str(tmp_path / 'file' / 'x'))


def test_names_in_the_cache_are_short_and_hold_no_password():
    long = 'https://example.com/' + 'a' * 3000 + '/net.pkl'
    assert len(util.cache_file_name(long)) < 200 and util.cache_file_name(long).endswith('_net.pkl')
    assert util.cache_file_name(long) != util.cache_file_name(long + '?')
    assert len(util.cache_file_name('https://example.com/x', 'b' * 500 + '.pkl')) < 200
    assert 'secret' not in util.cache_file_name('https://me:secret@example.com/x.pkl?token=secret')
    assert util.cache_file_name('https://example.com/\ud800').endswith('_https___example.com__')


@pytest.mark.parametrize('is_full', [False, True])
def test_a_terminal_that_is_gone_costs_nothing_but_itself(tmp_path, is_full, monkeypatch, capsys):
    if is_full and not os.path.exists('/dev/full'):
        pytest.skip('no device that is always full')
    read, write = os.pipe()
    os.close(read)
    gone = open('/dev/full' if is_full else write, 'w')
    monkeypatch.setattr(sys, 'stdout', gone)
    with Logger(tmp_path / 'log.txt'):
        for i in range(3):
            print(f'line {i}')
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert lines[0] == 'line 0' and lines[-2:] == ['line 1', 'line 2']
    assert sum('cannot be written to any more' in line for line in lines) >= 1
    assert capsys.readouterr().err.count('the program continues') == 1
    gone.close()  # what it still holds is discarded without an error
