# SPDX-License-Identifier: Apache-2.0
"""Train a GAN on a directory or zip of images: python train.py --outdir=runs --data=images.zip"""
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import run_command
from dnnlib.cli_options import GroupedCommand, setting
from dnnlib.launched import STOPPED, is_launched
from dnnlib.util import Logger, UserError, printable
from training import config as cfg
from training.run.folder import (
    claim_run_dir,
    discard_unstarted,
    next_run_number,
    read_flags,
    save_options,
)

if TYPE_CHECKING:
    from training.run.resume import ResumeRequest

def find_run(flags: dict[str, Any]) -> tuple['ResumeRequest | None', dict[str, Any]]:
    """(what to resume or None, flags) of the run that --resume names.

    Flags that are not given are those of the run directory.
    """
    from training.run.resume import find_state
    request, notes = find_state(flags['resume'], flags.get('outdir'))
    for note in notes:
        click.echo(f'Note: {printable(note)}')
    if request is None:
        return None, {**flags, 'resume': None}
    before = read_flags(request.run_dir)
    given = {name: value for name, value in flags.items() if value is not None}
    # --resume of the first start, if it was fine-tuned from weights, remains an option of the run.
    return request, {**dict.fromkeys(flags), **before, **given, 'resume': before.get('resume')}


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
        raise UserError(f'--resume={source}: no such file; give a network file, a URL, or a name from --help')


def check_weights(config: cfg.TrainConfig, dataset: cfg.DatasetInfo) -> None:
    """Raise UserError in a dry run if the weights of --resume are unusable, as far as they are here."""
    from training.formats.load import find_network
    source = config.resume_pkl
    if source is None:
        return
    source = find_network(source)
    # A dry run may precede a run on another machine.
    if '://' in source or not Path(source).parent.is_dir():
        click.echo(f'Note: --resume={source} is not on this machine and was not checked.')
        return
    from training.transfer.weights import check_source
    check_source(source, config, dataset.label_dim, dataset.channels)


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
    except (UserError, SystemExit):
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
    request = None
    if cfg.continues(flags.get('resume') or 'noresume'):
        request, flags = find_run(flags)
    for name in ('data',) if request is not None else ('outdir', 'data'):
        if flags.get(name) is None:
            raise UserError(f'--{name} is missing; see --help')
    # Late imports, here and below: --help does not need torch.
    from training.capacity import dry_run as needs
    from training.capacity.estimate import check_memory
    dataset, label_text = needs.open_dataset(
        flags['data'], bool(flags.get('cond')), flags.get('cfg'), strict=bool(flags.get('strict')))
    config = cfg.resolve(flags, dataset)
    if request is None:
        notes = cfg.notes(flags, dataset, config)
    else:
        config, request, notes = fit_to_run(config, request, given)
    check_memory(config, dataset, is_dry=dry_run)
    run_dir = pick_run_dir(config, flags, dataset, request, dry_run=dry_run)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    click.echo(needs.summarise(config, dataset, label_text, is_full=dry_run or config.verbose))
    is_estimated = dry_run or config.verbose or request is not None
    for note in [*notes, *needs.notes(config, dataset, is_estimated=is_estimated)]:
        click.echo(f'Note: {printable(note)}')
    if dry_run:
        if request is None:
            check_weights(config, dataset)
        click.echo('Dry run; exiting.')
        return None
    if request is None:
        save_options(config, flags)
        return config, None
    # Saved once the run directory is locked: another process may be training there.
    return config, dataclasses.replace(request, flags=flags)


def fit_to_run(
    config: cfg.TrainConfig, request: 'ResumeRequest', given: dict[str, Any],
) -> tuple[cfg.TrainConfig, 'ResumeRequest', list[str]]:
    """(configuration, request, notes) of a run to be resumed.

    Raises UserError for changes that affect training.
    """
    from metrics.data_key import training_key
    from training.capacity.estimate import local_device
    from training.dataset import ImageFolderDataset
    device = local_device(config)
    names = [name for name, value in given.items() if value not in (None, False)]
    config = request.fit(config, 'cuda' if device is None else device.type, names)
    key = training_key(ImageFolderDataset(**config.data.kwargs()))
    notes = request.check_data(key, allow_changes='allow_changes' in names)
    request = dataclasses.replace(request, data_key=key)
    return config, request, [*notes, f'Resuming from {request.state_path}.']


def pick_run_dir(
    config: cfg.TrainConfig, flags: dict[str, Any], dataset: cfg.DatasetInfo,
    request: 'ResumeRequest | None', *, dry_run: bool,
) -> Path:
    """The run directory; created unless this is a dry run."""
    if not dry_run:
        check_launch(config)
    if request is not None:
        return request.run_dir
    outdir, description = Path(flags['outdir']), cfg.run_description(flags, dataset)
    if dry_run:
        return outdir / f'{next_run_number(outdir):05d}-{description}'
    return claim_run_dir(outdir, description)


def start_training(config: cfg.TrainConfig, request: 'ResumeRequest | None') -> None:
    """Train in config.num_gpus processes."""
    from torch_utils import distributed
    from training.training_loop import train
    arguments = (config,) if request is None else (config, request)
    if config.num_gpus == 1:
        train(*arguments)
    else:
        distributed.launch(train, arguments, config.num_gpus, STOPPED)


command = GroupedCommand(
    'train', callback=run_training, help=run_training.__doc__,
    params=[*map(setting, cfg.OPTIONS),
            click.Option(
                ['-n', '--dry-run'], is_flag=True,
                help='Check options and data, print configuration, memory and time estimates, then exit.')])


def limit_spinning() -> None:
    """Let threads that wait for others soon leave their core, unless the environment says otherwise.

    By default OpenMP's threads spin for milliseconds: with another program on the cores, each of the
    thousands of waits of a step then lasts until that one is preempted. Not to spin at all costs a third of
    the speed of an idle machine. Has no effect once torch is imported.
    """
    if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & os.environ.keys():
        os.environ['GOMP_SPINCOUNT'] = '1000'


def stop_early(number: int, _: object) -> None:
    """Handler of signals until the training sets its own: nothing has been trained, so nothing is lost."""
    # Not print(), which may be interrupted itself.
    os.write(2, f'Stopped by {signal.Signals(number).name} before training began.\n'.encode())
    sys.exit(STOPPED)


def main(args: list[str] | None = None) -> None:
    """Entry point of the command line."""
    for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop_early)
    limit_spinning()
    # A reader of the output that is gone must not end a run.
    with Logger():
        run_command(command, args)


if __name__ == '__main__':
    main()
