# SPDX-License-Identifier: Apache-2.0
"""Runs the click command of a script: user errors become one line and exit status 2."""
import contextlib
import os
import re
import sys
from typing import TextIO

import click

from dnnlib.streams import discard_output
from dnnlib.util import UserError, printable


def run_command(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command; print a UserError as one line on stderr and exit with status 2."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files may not be valid text; a stream that a test or a notebook put there has its own way.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')
    try:
        command.main(args=[_expand_home(arg) for arg in (sys.argv[1:] if args is None else args)],
                     standalone_mode=True)
    except UserError as error:
        # Messages hold names from archives and servers, which must not pass for lines of this program.
        click.echo(f'Error: {printable(error)}', err=True)
        sys.exit(2)
    except OSError as error:
        if not _is_full(sys.stdout):
            raise
        click.echo(f'Error: the output cannot be written ({error.strerror or error}); what has been written '
                   'to files is there', err=True)
        sys.exit(2)


def _is_full(stream: TextIO | None) -> bool:
    """Whether a line more cannot be written; what the stream holds is dropped, or Python would try again."""
    try:
        print(file=stream, flush=True)
    except OSError:
        discard_output(stream)
        return True
    return False


def _expand_home(argument: str) -> str:
    """An argument with a leading ~ replaced by the home folder, as in --outdir=~/runs, which bash leaves."""
    option, path = re.fullmatch(r'(--[\w-]+=)?(.*)', argument, re.DOTALL).groups()
    return (option or '') + os.path.expanduser(path)
