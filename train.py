# SPDX-License-Identifier: Apache-2.0
"""Train a GAN on a directory or zip of images: python train.py --outdir=runs --data=images.zip"""
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import run_command
from dnnlib.launched import is_launched
from dnnlib.util import UserError
from training import config as cfg
from training.config.changes import check_changes
from training.run.folder import (
    FLAGS_FILE,
    OPTIONS_FILE,
    RunLock,
    claim_run_dir,
    discard_unstarted,
    next_run_number,
    read_json,
    save_options,
)

if TYPE_CHECKING:
    from training.run.resume import ResumeRequest

CLICK_TYPES = {int: click.INT, float: click.FLOAT, bool: click.BOOL, str: click.STRING}
METAVARS = {int: 'INT', float: 'FLOAT', bool: 'BOOL', str: 'TEXT'}


class TrainCommand(click.Command):
    """The command; its help lists options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group of options."""
        groups = {option.key: option.group for option in cfg.OPTIONS}
        for group in dict.fromkeys([*groups.values(), 'Other']):
            rows = [param.get_help_record(ctx) for param in self.get_params(ctx)
                    if groups.get(param.name or '', 'Other') == group]
            with formatter.section(group):
                formatter.write_dl([row for row in rows if row is not None])


def click_option(option: cfg.Option) -> click.Option:
    """The click option for a row of cfg.OPTIONS."""
    text = f'{option.help}  [default: {option.default}]' if option.default else option.help
    # Checked later: a resumed run does not need it again.
    text += '  [required]' if option.required else ''
    is_choice = isinstance(option.kind, tuple)
    return click.Option(
        [f'--{option.name}'], help=text,
        metavar=None if is_choice else METAVARS[option.kind],
        type=click.Choice(option.kind) if is_choice else CLICK_TYPES[option.kind])


def find_run(flags: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """(training state or None, flags) of the run that --resume names.

    Flags that are not given are those of the run directory.
    """
    from training.run.resume import find_state
    state, notes = find_state(flags['resume'], flags.get('outdir'))
    for note in notes:
        click.echo(f'Note: {note}')
    if state is None:
        return None, {**flags, 'resume': None}
    before = read_json(state.parent / FLAGS_FILE)
    given = {name: value for name, value in flags.items() if value is not None}
    # --resume of the first start, if it was fine-tuned from weights, remains an option of the run.
    return state, {**dict.fromkeys(flags), **before, **given, 'resume': before.get('resume')}


def resolve_run(flags: dict[str, Any], dataset: cfg.DatasetInfo, state: Path | None) -> cfg.TrainConfig:
    """The configuration of the run. Raises UserError if that of a resumed run has changed."""
    config = cfg.resolve(flags, dataset)
    before = read_json(state.parent / OPTIONS_FILE) if state is not None else None
    if before and not flags.get('allow_changes'):
        check_changes(cfg.TrainConfig.from_options(before), config)
    return config


def check_launch(config: cfg.TrainConfig) -> None:
    """Raise UserError for missing files and devices, which a dry run ignores."""
    from torch_utils.misc import pick_device
    if pick_device(config.device).type == 'cuda':
        import torch
        available = torch.cuda.device_count()
        # Under torchrun, each node checks its own devices.
        if available < int(os.environ.get('LOCAL_WORLD_SIZE', config.num_gpus)):
            raise UserError(f'--gpus={config.num_gpus}: this machine has {available}; use '
                            f'--gpus={available}, or torchrun for several nodes')
    from training.formats.load import find_network
    source = config.resume_pkl
    if source is not None and '://' not in source and not os.path.isfile(find_network(source)):
        raise UserError(f'--resume={source}: no such file; give a network .pkl, a URL, or a name from --help')


def run_training(dry_run: bool, **flags: Any) -> None:
    """Train StyleGAN2-ADA on the images in --data. Results go to a new run directory in --outdir.

    BOOL is 1 or 0, yes or no, true or false, on or off. A kimg is a thousand images shown to the
    discriminator.
    """
    if is_launched():
        train_as_launched(dry_run, flags)
        return
    plan = plan_training(dry_run, flags, flags)
    if plan is None:
        return
    try:
        start_training(*plan)
    except UserError:
        if plan[1] is None:
            discard_unstarted(plan[0].run_dir)
        raise


def train_as_launched(dry_run: bool, flags: dict[str, Any]) -> None:
    """Train as one of the processes of torchrun."""
    from torch_utils import distributed
    from training.run import torchrun
    from training.training_loop import train
    with distributed.Reporting():
        plan = torchrun.plan_together(
            lambda size: plan_training(dry_run, torchrun.with_world_size(flags, size), flags))
        if plan is not None:
            train(*plan)


def plan_training(
    dry_run: bool, flags: dict[str, Any], given: dict[str, Any],
) -> tuple[cfg.TrainConfig, 'ResumeRequest | None'] | None:
    """Check everything, create the run directory and print the plan: (configuration, what to resume).

    given: flags of this command line.  None for a dry run.
    """
    # Importing torch takes seconds, so whatever needs no torch is checked first.
    cfg.check_flags(flags, before='data')
    state = None
    if cfg.continues(flags.get('resume') or 'noresume'):
        state, flags = find_run(flags)
    for name in ('data',) if state is not None else ('outdir', 'data'):
        if flags.get(name) is None:
            raise UserError(f'--{name} is missing; see --help')
    # Late imports, here and below: --help does not need torch.
    from training.capacity import dry_run as needs
    dataset, label_text = needs.open_dataset(flags['data'], bool(flags.get('cond')))
    config = resolve_run(flags, dataset, state)
    run_dir = pick_run_dir(config, flags, dataset, state, dry_run=dry_run)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    click.echo(needs.summarise_options(config))
    if dry_run:
        click.echo(needs.summarise_needs(config, dataset))
    if label_text is not None:
        click.echo(f'\n{label_text}\n')
    for note in [*(cfg.notes(flags, dataset, config) if state is None else ()), *needs.notes(config)]:
        click.echo(f'Note: {note}')
    if state is not None:
        click.echo(f'Note: Resuming from {state}.')
    if dry_run:
        click.echo('Dry run; exiting.')
        return None
    # Another process may be training in the run directory of a resumed run.
    with contextlib.nullcontext() if state is None else RunLock(config.run_dir):
        save_options(config, flags)
    if state is None:
        return config, None
    from training.run.resume import ResumeRequest
    return config, ResumeRequest(
        str(state), bool(given.get('allow_changes')),
        frozenset(name for name, value in given.items() if value is not None))


def pick_run_dir(
    config: cfg.TrainConfig, flags: dict[str, Any], dataset: cfg.DatasetInfo, state: Path | None, *,
    dry_run: bool,
) -> Path:
    """The run directory; created unless this is a dry run."""
    if not dry_run:
        check_launch(config)
    if state is not None:
        return state.parent
    outdir, description = Path(flags['outdir']), cfg.run_description(flags, dataset)
    if dry_run:
        return outdir / f'{next_run_number(outdir):05d}-{description}'
    return claim_run_dir(outdir, description)


def start_training(config: cfg.TrainConfig, request: 'ResumeRequest | None') -> None:
    """Train in config.num_gpus processes."""
    from torch_utils import distributed
    from training.run.interrupt import STOPPED
    from training.training_loop import train
    arguments = (config,) if request is None else (config, request)
    if config.num_gpus == 1:
        train(*arguments)
    else:
        distributed.launch(train, arguments, config.num_gpus, STOPPED)


command = TrainCommand(
    'train', callback=run_training, help=run_training.__doc__, context_settings={'terminal_width': 110},
    params=[*map(click_option, cfg.OPTIONS),
            click.Option(
                ['-n', '--dry-run'], is_flag=True,
                help='Check options and data, print configuration, memory and time estimates, then exit.')])


def main(args: list[str] | None = None) -> None:
    """Entry point of the command line."""
    run_command(command, args)


if __name__ == '__main__':
    main()
