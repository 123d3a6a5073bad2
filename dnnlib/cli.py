# SPDX-License-Identifier: Apache-2.0
"""How every script runs its click command: user errors become one line and exit status 2."""
import sys

import click

from dnnlib.util import UserError


def run_command(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command; print a UserError as one line on stderr and leave with status 2."""
    try:
        command.main(args=args, standalone_mode=True)
    except UserError as error:
        click.echo(f'Error: {error}', err=True)
        sys.exit(2)
