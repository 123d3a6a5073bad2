# SPDX-License-Identifier: Apache-2.0
"""The help of all tools: without torch, so at once, in one width and with one set of metavars."""
import importlib
import re
import subprocess
import sys

import click
import pytest
from source_tree import ROOT

TOOLS = ('train', 'generate', 'style_mixing', 'projector', 'calc_metrics', 'dataset_tool', 'legacy',
         'profile_step')
METAVARS = {'N', 'X', 'BOOL', 'TEXT', 'LIST', 'X:X', 'NXN', 'NxN', 'X,X,...', 'NAME', 'NAMES', 'FILE', 'DIR',
            'PATH', 'COLOR', 'N|NAME', 'FILE|URL', 'FILE|DIR', 'DIR|ZIP', 'FILE:N',
            'auto|folders|none|FILE.csv', 'auto|X,X'}
# A process for each tool would take most of its time to start.
PROGRAM = '''
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name).main(['--help'])
    except SystemExit as end:
        assert not end.code
print('loaded:', *[name for name in ('torch', 'scipy', 'matplotlib') if name in sys.modules])
'''


def commands(command, name):
    """(name, command) of a tool: itself, or its subcommands."""
    if not isinstance(command, click.Group):
        return [(name, command)]
    return [(f'{name} {sub}', child) for sub, child in command.commands.items()]


def all_commands():
    found = []
    for name in TOOLS:
        module = importlib.import_module(name)
        own = [value for value in vars(module).values() if isinstance(value, click.Command)]
        # The commands of a group are in its module, too.
        found += commands(max(own, key=lambda command: isinstance(command, click.Group)), name)
    return found


def test_no_tool_needs_torch_to_explain_itself():
    run = subprocess.run([sys.executable, '-c', PROGRAM, *TOOLS], cwd=ROOT, capture_output=True, text=True,
                         check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].strip() == 'loaded:' and run.stdout.count('Usage: ') == len(TOOLS)


@pytest.mark.parametrize(('name', 'command'), all_commands(), ids=lambda value: str(value)[:30])
def test_help_has_one_width_and_one_set_of_metavars(name, command):
    context = click.Context(command, info_name=name, **command.context_settings)
    lines = command.get_help(context).splitlines()
    # A long list of choices cannot be broken.
    wide = [line for line in lines if len(line) > 110 and not re.match(r' *--?[\w-]+ \[', line)]
    assert not wide and context.terminal_width == 110
    for param in command.params:
        if isinstance(param, click.Option) and not param.is_flag and not isinstance(param.type, click.Choice):
            metavar = param.metavar or param.type.name.upper()
            assert metavar in METAVARS, f'{param.opts}: {metavar}'
