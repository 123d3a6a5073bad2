# SPDX-License-Identifier: Apache-2.0
"""Opens network files of every kind without running code in them, and converts each kind into the others."""
import io
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

import click

import dnnlib
from dnnlib.cli import run_command
from dnnlib.util import UserError
from torch_utils.pickles import describe, torch_file
from training.formats import convert, inspection, pickled, rosinality, safetensors_file, tensorflow
from training.formats.rebuild import KEYS, MODULES, NETWORKS

__all__ = ['KEYS', 'NETWORKS', 'load_network', 'load_network_pkl', 'main']


def load_network(
    path_or_url: str, *, trust_pickle: bool = False, force_fp16: bool = False, only: Collection[str] = KEYS,
) -> dnnlib.EasyDict:
    """Contents of a network file or URL: G, D, G_ema, training_set_kwargs, augment_pipe; None where missing.

    The file: a pickle (official, own, or of TensorFlow), .safetensors, or a rosinality checkpoint.
    Networks are on the CPU, in eval mode, without gradients. Nothing in the file is executed unless
    trust_pickle, which is for files of your own or of somebody you trust.
    force_fp16: G, D and G_ema get num_fp16_res=4 and conv_clamp=256.  only: build nothing but these.
    Raises UserError naming the file if it is missing, no network file, or asks for anything else than one.
    """
    with dnnlib.util.open_url(str(path_or_url)) as file:
        return _load(file, str(path_or_url), trust_pickle=trust_pickle, force_fp16=force_fp16, only=only)


def load_network_pkl(f: BinaryIO, force_fp16: bool = False) -> dnnlib.EasyDict:
    """As load_network, from an open binary file; nothing in it is executed."""
    name = str(getattr(f, 'name', 'network pickle'))
    return _load(f, name, trust_pickle=False, force_fp16=force_fp16, only=KEYS)


def _load(
    file: BinaryIO, name: str, *, trust_pickle: bool, force_fp16: bool, only: Collection[str],
) -> dnnlib.EasyDict:
    data = file.read()
    is_pickle = not (safetensors_file.is_safetensors(data) or torch_file.is_torch_file(data))
    if trust_pickle and is_pickle:
        if force_fp16:
            raise UserError('--trust-pickle cannot be combined with a change to fp16: the file has its '
                            'classes')
        return pickled.load_by_execution(io.BytesIO(data), name)
    # Recipes are inert: from here on only our own classes are constructed.
    recipes, training_set_kwargs = _read(data, name)
    found = dnnlib.EasyDict(dict.fromkeys(KEYS))
    for key in MODULES:
        if key in recipes and key in only:
            found[key] = recipes[key].build(force_fp16 and key in NETWORKS)
    if isinstance(training_set_kwargs, dict):
        found.training_set_kwargs = training_set_kwargs
    return found


def _read(data: bytes, name: str) -> tuple[Mapping[str, Any], Any]:
    """(key -> what builds that network, training_set_kwargs) of a file of any kind."""
    if safetensors_file.is_safetensors(data):
        return safetensors_file.read(data, name)
    if torch_file.is_torch_file(data):
        return rosinality.read(data, name), None
    held = describe.load(io.BytesIO(data), name)
    if tensorflow.is_tensorflow(held):
        return tensorflow.recipes(name, held), None
    networks = pickled.blueprints(name, held)
    return networks, describe.plain(held.get('training_set_kwargs'), name)


class _OldStyleGroup(click.Group):
    """Commands of which `convert` need not be named: `legacy.py --source=A --dest=B`, as published."""

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
'''


@click.group(cls=_OldStyleGroup, epilog=EXAMPLES)
def legacy_tool() -> None:
    """Convert network files of any kind, and look inside them; nothing in them is executed."""


@legacy_tool.command('convert')
@click.option('--source', required=True, metavar='FILE|URL',
              help='Pickle (official, own, of TensorFlow), .safetensors, or a rosinality checkpoint.')
@click.option('--dest', required=True, metavar='FILE',
              help='What to write; the suffix says in which format: '
                   f'{", ".join(convert.WRITERS)} (a rosinality checkpoint is .pt, torch.export .pt2).')
@click.option('--force-fp16', type=bool, default=False, show_default=True,
              help='Give all networks float16 at their four highest levels.')
@click.option('--trunc', type=float, default=1, show_default=True, metavar='PSI',
              help='Truncation psi of an exported generator (.onnx, .pt2).')
@click.option('--noise-mode', type=click.Choice(['const', 'none']), default='const', show_default=True,
              help='Noise of an exported generator.')
@click.option('--export-network', type=click.Choice(['G_ema', 'G']),
              help='Which generator to export  [default: G_ema, else G]')
def convert_command(
    source: str, dest: str, force_fp16: bool, trunc: float, noise_mode: str, export_network: str | None,
) -> None:
    """Convert a network file; the suffix of --dest says into what."""
    convert.check_suffix(dest)
    click.echo(f'Loading {source} ...')
    found = load_network(source, force_fp16=force_fp16)
    click.echo(f'Writing {dest} ...')
    notes = convert.write(dest, found, convert.Choices(trunc, noise_mode, export_network))
    click.echo('\n'.join([*notes, 'Done.']))


@legacy_tool.command('inspect')
@click.argument('path_or_url', metavar='FILE|URL')
def inspect_command(path_or_url: str) -> None:
    """Say what is inside a network file, without executing anything in it."""
    with dnnlib.util.open_url(path_or_url) as file:
        data = file.read()
    click.echo('\n'.join(inspection.describe(data, path_or_url, _load_bytes)))


def _load_bytes(data: bytes, name: str) -> dnnlib.EasyDict:
    return _load(io.BytesIO(data), name, trust_pickle=False, force_fp16=False, only=KEYS)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(legacy_tool, args)


if __name__ == '__main__':
    main()
