# SPDX-License-Identifier: Apache-2.0
"""Train a generator on a folder or zip of pictures: python train.py --outdir=runs --data=pictures.zip"""
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import run_command
from dnnlib.util import UserError
from training import config as cfg

CLICK_TYPES = {int: click.INT, float: click.FLOAT, bool: click.BOOL, str: click.STRING}
METAVARS = {int: 'INT', float: 'FLOAT', bool: 'BOOL', str: 'TEXT'}
RUN_NUMBER = re.compile(r'\d+')
CLAIM_ATTEMPTS = 1000


class TrainCommand(click.Command):
    """The command, with its options in the help under the headings of cfg.OPTIONS."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group of options."""
        groups = {option.key: option.group for option in cfg.OPTIONS}
        for group in dict.fromkeys([*groups.values(), 'Other']):
            rows = [param.get_help_record(ctx) for param in self.get_params(ctx)
                    if groups.get(param.name or '', 'Other') == group]
            with formatter.section(group):
                formatter.write_dl([row for row in rows if row is not None])


def click_option(option: cfg.Option) -> click.Option:
    """The command line's view of a row of cfg.OPTIONS."""
    text = f'{option.help}  [default: {option.default}]' if option.default else option.help
    is_choice = isinstance(option.kind, tuple)
    return click.Option(
        [f'--{option.name}'], help=text, required=option.required,
        metavar=None if is_choice else METAVARS[option.kind],
        type=click.Choice(option.kind) if is_choice else CLICK_TYPES[option.kind])


def open_dataset(name_or_path: str, cond: bool) -> tuple[cfg.DatasetInfo, str | None]:
    """What a run must know of a dataset (first picture, names, labels), and words on its labels."""
    # Imported here, and so below, because torch takes seconds and --help needs none of it.
    from training.dataset import ImageFolderDataset, find_dataset
    from training.dataset_labels import LabelError
    from training.label_report import describe_labels, ignored_labels_notice
    path, labels = find_dataset(name_or_path), (False, 0)
    try:
        dataset = ImageFolderDataset(path=path, use_labels=True)
        # Labels that nobody asks for need not be right.
        with contextlib.nullcontext() if cond else contextlib.suppress(LabelError):
            labels = dataset.has_labels, dataset.label_dim
    except (UserError, OSError) as error:
        raise UserError(f'--data: {error}') from error
    text = '\n'.join(describe_labels(dataset)) if cond else ignored_labels_notice(dataset)
    return cfg.DatasetInfo(path, len(dataset), dataset.height, dataset.width, dataset.num_channels,
                           *labels), text


def existing_numbers(outdir: Path) -> Iterator[int]:
    """The numbers that the sub-folders of `outdir` begin with."""
    if outdir.is_dir():
        for path in outdir.iterdir():
            match = RUN_NUMBER.match(path.name)
            if match and path.is_dir():
                yield int(match[0])


def next_run_number(outdir: Path) -> int:
    """One above the highest number in use, 0 in a new folder."""
    return max(existing_numbers(outdir), default=-1) + 1


def claim_run_dir(outdir: Path, description: str) -> Path:
    """Create the folder <number>-<description> with a number that no other run has, even one started right
    now.

    Raises UserError if that cannot be done.
    """
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        for _ in range(CLAIM_ATTEMPTS):
            # The bare number is the claim: creating a folder either succeeds for one process or fails.
            number = next_run_number(outdir)
            claim = outdir / f'{number:05d}'
            try:
                claim.mkdir()
            except FileExistsError:
                continue
            # Between our look and our claim another run may have finished claiming this number.
            if list(existing_numbers(outdir)).count(number) == 1:
                return claim.rename(outdir / f'{number:05d}-{description}')
            claim.rmdir()
    except OSError as error:
        raise UserError(f'--outdir={outdir}: cannot create a run folder ({error.strerror}); choose a folder '
                        'that you can write to') from error
    raise UserError(f'--outdir={outdir}: too many runs start at once; try again')


def save_options(config: cfg.TrainConfig) -> None:
    """Write training_options.json into the run folder, whole or not at all."""
    path = Path(config.run_dir, 'training_options.json')
    # A name beside the target, so that replacing it is one step on one file system.
    partial = path.with_suffix('.json.tmp')
    partial.write_text(json.dumps(config.to_options(), indent=2) + '\n', encoding='utf-8')
    os.replace(partial, path)


def print_config(config: cfg.TrainConfig) -> None:
    """Print the options as JSON, then a summary that one can take in."""
    height, width = config.data.size
    summary = {
        'Output directory': config.run_dir,
        'Training data': config.data.path,
        'Training duration': f'{config.total_kimg} kimg',
        'Number of GPUs': config.num_gpus,
        'Number of images': config.data.max_size,
        'Image resolution': height if height == width else f'{width}x{height}',
        'Conditional model': config.data.use_labels,
        'Dataset x-flips': config.data.xflip,
    }
    click.echo(f'\nTraining options:\n{json.dumps(config.to_options(), indent=2)}\n')
    click.echo('\n'.join(f'{name + ":":<20}{value}' for name, value in summary.items()))


def print_parameter_counts(config: cfg.TrainConfig, dataset: cfg.DatasetInfo) -> None:
    """Print how many numbers each network learns. Nothing is allocated."""
    import torch

    from training.networks import Discriminator, Generator
    shape = {'c_dim': dataset.label_dim if config.data.use_labels else 0, 'img_channels': dataset.channels,
             'img_resolution': config.data.resolution}
    # Tensors on the meta device have shapes and no memory.
    with torch.device('meta'):
        networks = {'Generator': Generator(**shape, **config.G_kwargs()),
                    'Discriminator': Discriminator(**shape, **config.D_kwargs())}
    for name, network in networks.items():
        click.echo(f'{name + ":":<20}{sum(p.numel() for p in network.parameters()):,} parameters')


def print_estimate(config: cfg.TrainConfig, dataset: cfg.DatasetInfo) -> None:
    """Print how much memory and time the training will take on this machine; takes some seconds."""
    from training.estimate import describe
    label_dim = dataset.label_dim if config.data.use_labels else 0
    click.echo('\n'.join(describe(config, label_dim, dataset.channels)))


def check_launch(config: cfg.TrainConfig) -> None:
    """Raise UserError for what a dry run lets pass: files and devices that are not there."""
    from training.state import pick_device
    if pick_device(config.device).type == 'cuda':
        import torch
        available = torch.cuda.device_count()
        if available < config.num_gpus:
            raise UserError(f'--gpus={config.num_gpus}: this machine has {available}; use '
                            f'--gpus={available}, or torchrun for several machines')
    source = config.resume_pkl
    if source is not None and '://' not in source and not os.path.isfile(source):
        raise UserError(f'--resume={source}: no such file; give a network .pkl, a URL, or a name from --help')


def run_training(dry_run: bool, outdir: str, data: str, **flags: Any) -> None:
    """Train StyleGAN2-ADA on the pictures of --data, in a new folder of --outdir.

    BOOL is 1 or 0, yes or no, true or false, on or off. A kimg is a thousand pictures shown to the
    discriminator.
    """
    # Importing torch takes seconds: what can be refused without it is refused before.
    cfg.check_flags(flags, before='data')
    dataset, label_text = open_dataset(data, bool(flags.get('cond')))
    config, description = cfg.resolve(flags, dataset), cfg.run_description(flags, dataset)
    if dry_run:
        run_dir = Path(outdir, f'{next_run_number(Path(outdir)):05d}-{description}')
    else:
        check_launch(config)
        run_dir = claim_run_dir(Path(outdir), description)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    print_config(config)
    if dry_run:
        print_parameter_counts(config, dataset)
        print_estimate(config, dataset)
    if label_text is not None:
        click.echo(f'\n{label_text}\n')
    for note in cfg.notes(flags, dataset, config):
        click.echo(f'Note: {note}')
    if dry_run:
        click.echo('Dry run; exiting.')
        return
    save_options(config)
    from torch_utils import distributed
    from training.training_loop import train
    if config.num_gpus == 1:
        train(config)
    else:
        distributed.launch(train, (config,), config.num_gpus)


command = TrainCommand(
    'train', callback=run_training, help=run_training.__doc__, context_settings={'terminal_width': 110},
    params=[*map(click_option, cfg.OPTIONS),
            click.Option(['-n', '--dry-run'], is_flag=True, help='Print what would be done, and stop.')])


def main(args: list[str] | None = None) -> None:
    """Entry point of the command line."""
    run_command(command, args)


if __name__ == '__main__':
    main()
