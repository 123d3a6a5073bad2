# SPDX-License-Identifier: Apache-2.0
"""How every script runs its click command: user errors become one line and exit status 2."""
import contextlib
import sys

import click

from dnnlib.util import UserError, printable


def run_command(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command; print a UserError as one line on stderr and leave with status 2."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files may not be valid text; a stream that a test or a notebook put there has its own way.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')
    try:
        command.main(args=args, standalone_mode=True)
    except UserError as error:
        # Messages hold names from archives and servers, which must not pass for lines of this program.
        click.echo(f'Error: {printable(error)}', err=True)
        sys.exit(2)
