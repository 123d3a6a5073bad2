# SPDX-License-Identifier: Apache-2.0
"""dnnlib.cli: user errors are one line and status 2."""
import os

import click
import pytest

from dnnlib.cli import run_command
from dnnlib.util import UserError


@click.command()
@click.option('--n', type=int, default=1)
def command(n):
    if n < 0:
        raise UserError(f'--n={n} must not be negative; use 0 or more')
    click.echo(f'n is {n}')


def run(args):
    with pytest.raises(SystemExit) as caught:
        run_command(command, args)
    return caught.value.code


def test_success_leaves_with_status_0(capsys):
    assert run(['--n', '3']) == 0
    assert capsys.readouterr() == ('n is 3\n', '')


def test_a_user_error_is_one_line_on_stderr_without_traceback(capsys):
    assert run(['--n', '-3']) == 2
    assert capsys.readouterr() == ('', 'Error: --n=-3 must not be negative; use 0 or more\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no such device here')
def test_a_full_disk_behind_the_output_is_one_line(capfd, monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr('sys.stdout', full)
        assert run([]) == 2
    assert capfd.readouterr().err == (
        'Error: the output cannot be written (No space left on device); what has been written to files is '
        'there\n')


def test_a_usage_error_leaves_with_status_2_and_names_the_option(capsys):
    assert run(['--n', 'x']) == 2
    assert '--n' in capsys.readouterr().err


def test_names_from_elsewhere_cannot_fake_a_line_or_move_the_cursor(capsys):
    @click.command()
    def fail():
        raise UserError('a\nError: b\x1b[2J\u202e\udcff: h\u00e9 cannot be read')
    with pytest.raises(SystemExit) as caught:
        run_command(fail, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        'Error: a\\nError: b\\x1b[2J\\u202e\\udcff: h\u00e9 cannot be read\n')
