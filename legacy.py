# SPDX-License-Identifier: Apache-2.0
"""Convert, inspect and publish network files of any kind, without running code in them."""
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import HELP_WIDTH, GroupedCommand

if TYPE_CHECKING:
    from training.formats.load import KEYS, NETWORKS, load_network, load_network_pkl
    from training.run.publish import push_to_hub

__all__ = ['KEYS', 'NETWORKS', 'load_network', 'load_network_pkl', 'main', 'push_to_hub']


def __getattr__(name: str) -> Any:
    """The functions for programs, imported at first use: importing torch takes seconds, --help should not."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name == 'push_to_hub':
        from training.run import publish as module
    else:
        from training.formats import load as module
    return getattr(module, name)


class _OldStyleGroup(click.Group):
    """Commands with `convert` as the default: `legacy.py --source=A --dest=B`, as published."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith('-') and args[0] not in ('--help', '-h'):
            args = ['convert', *args]
        return super().parse_args(ctx, args)


# \b keeps click from joining the lines.
EXAMPLES = '''\b
Examples:
  python legacy.py --source=stylegan2-tf.pkl --dest=stylegan2.pkl
  python legacy.py --source=network-snapshot-000500.pkl --dest=net.safetensors
  python legacy.py --source=net.safetensors --dest=net.onnx --trunc=0.7
  python legacy.py inspect unknown.pkl
  python legacy.py push --source=network-snapshot-000500.pkl --dest=hf://user/repo --license=cc-by-4.0
'''


@click.group(cls=_OldStyleGroup, epilog=EXAMPLES, context_settings={'terminal_width': HELP_WIDTH})
def legacy_tool() -> None:
    """Convert, inspect and publish network files of any kind; nothing in them is executed."""


@legacy_tool.command('convert', cls=GroupedCommand)
@click.option('--source', required=True, metavar='FILE|URL',
              help='Input: a network file of any kind (docs/formats.md), or a run directory; path, URL or '
                   'hf://user/repo.')
@click.option('--dest', required=True, metavar='FILE',
              help='Output; the suffix selects the format: .pkl, .safetensors, .pt (rosinality checkpoint), '
                   '.onnx, .pt2 (torch.export).')
@click.option('--force-fp16', type=bool, default=False, show_default=True, metavar='BOOL',
              help='Use float16 at the four highest resolutions of all networks.')
@click.option('--trunc', type=float, default=1, show_default=True, metavar='X',
              help='Truncation psi of an exported generator (.onnx, .pt2).')
@click.option('--noise-mode', type=click.Choice(['const', 'none']), default='const', show_default=True,
              help='Noise mode of an exported generator.')
@click.option('--export-network', type=click.Choice(['G_ema', 'G']),
              help='Generator to export.  [default: G_ema, or G if missing]')
def convert_command(
    source: str, dest: str, force_fp16: bool, trunc: float, noise_mode: str, export_network: str | None,
) -> None:
    """Convert a network file; the suffix of --dest selects the format."""
    from training.formats import convert, load
    convert.check_suffix(dest)
    click.echo(f'Loading {source} ...')
    found = load.load_network(source, force_fp16=force_fp16)
    click.echo(f'Writing {dest} ...')
    notes = convert.write(dest, found, convert.Choices(trunc, noise_mode, export_network))
    click.echo('\n'.join([*notes, 'Done.']))


@legacy_tool.command('push', cls=GroupedCommand)
@click.option('--source', required=True, metavar='FILE|URL',
              help='Network file; or a folder that this command wrote, to upload as it is.')
@click.option('--dest', required=True, metavar='DIR',
              help='Repository on the Hugging Face Hub, hf://user/repo, or a new folder to write everything '
                   'to.')
@click.option('--license', metavar='NAME',
              help='Licence of the network: an identifier of the Hub, such as cc-by-4.0.  [default: none]')
@click.option('--private', is_flag=True, help='Make a new repository private.')
def push_command(source: str, dest: str, license: str | None, private: bool) -> None:
    """Publish a network on the Hugging Face Hub: .safetensors, config.json, and a model card of its run.

    Needs `pip install huggingface_hub`, and a token from `hf auth login` or in HF_TOKEN.
    """
    from training.run import publish
    click.echo(f'Preparing {source} ...')
    where = publish.push_to_hub(source, dest, license=license, private=private)
    if where == dest:
        click.echo(f'Written to {dest}. Edit {publish.CARD_FILE}, then: legacy.py push --source={dest} '
                   '--dest=hf://USER/REPO')
    else:
        click.echo(f'Uploaded to {where}')


@legacy_tool.command(
    'inspect', short_help='List the contents of a network file, executing nothing.', cls=GroupedCommand)
@click.argument('path_or_url', metavar='FILE|URL')
def inspect_command(path_or_url: str) -> None:
    """List the contents of a network file without executing anything in it.

    Exits with status 1 if it cannot be used.
    """
    from training.formats import inspection, load
    path_or_url = load.network_path(path_or_url)
    data, local = load.read_file(path_or_url)
    lines = inspection.describe(data, path_or_url, load.load_bytes)
    click.echo('\n'.join(lines))
    if lines[-1].startswith(inspection.REFUSED):
        fate = load.fate_of_download(path_or_url, local, data)
        click.echo(f'  {fate}' if fate else '', nl=bool(fate))
        raise click.exceptions.Exit(1)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(legacy_tool, args)


if __name__ == '__main__':
    main()
