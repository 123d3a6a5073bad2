# SPDX-License-Identifier: Apache-2.0
"""The work of profile_step.py: the run to measure, and its report or timeline."""
import platform
from typing import Any

import click
import torch

from dnnlib.progress import write
from dnnlib.util import UserError, replace_file
from torch_utils import custom_ops
from torch_utils.misc import keep_freed_memory, pick_device
from training import config as cfg
from training.capacity import dry_run
from training.dataset import ImageFolderDataset
from training.profiling import CHANNELS, MICRO
from training.profiling.record import ProfiledRun, micro_config, record_step
from training.profiling.report import ProfileReport, to_csv, to_json, to_text
from training.profiling.timeline import time_steps, timeline_header, timeline_line, timeline_summary
from training.systems.micro import RESOLUTION as MICRO_RESOLUTION

DEFAULT_RESOLUTION = 32


def build_run(name: str, flags: dict[str, Any]) -> ProfiledRun:
    """The run to measure.  name: of the preset.  flags: the other options of the command line."""
    flags = {option: value for option, value in flags.items() if value is not None}
    custom_ops.set_mode(flags.get('ops') or 'auto')
    # Errors about the command line come first.
    device = pick_device(flags.get('device', 'auto'))
    keep_freed_memory(device)  # as train.py does
    side, channels = flags.pop('resolution', None), flags.pop('channels', None)
    if 'data' in flags:
        return _run_on_images(name, flags, device, {'resolution': side, 'channels': channels})
    if name == MICRO:
        _check_micro({**flags, 'resolution': None if side == MICRO_RESOLUTION else side})
        return ProfiledRun(micro_config(flags), device, channels=channels or CHANNELS, is_micro=True)
    side = side or (64 if name == 'dcgan' else DEFAULT_RESOLUTION)
    info = cfg.DatasetInfo('random', 10000, side, side, channels or CHANNELS)
    config = cfg.resolve({**flags, 'cfg': name, 'data': 'random'}, info)
    return ProfiledRun(config, device, channels=info.channels)


def _run_on_images(
    name: str, flags: dict[str, Any], device: torch.device, refused: dict[str, int | None],
) -> ProfiledRun:
    for option, value in refused.items():
        if value is not None:
            raise UserError(f'--{option}={value} is for random images and cannot be combined with --data')
    if name == MICRO:
        _check_micro(flags)
    info, _ = dry_run.open_dataset(flags['data'], bool(flags.get('cond')))
    config = cfg.resolve({**flags, 'cfg': name}, info)
    return ProfiledRun(config, device, dataset=ImageFolderDataset(**config.data.kwargs()))


def _check_micro(flags: dict[str, Any]) -> None:
    """Raise UserError for options that --cfg=micro does not support."""
    for option in ('data', 'resolution', 'aug', 'p', 'augpipe'):
        if flags.get(option) is not None:
            raise UserError(
                f'--{option}={flags[option]}: --cfg=micro always uses random images of '
                f'{MICRO_RESOLUTION}x{MICRO_RESOLUTION} without augmentation; choose another --cfg')


def print_timeline(run: ProfiledRun, name: str, num_steps: int) -> None:
    """Print a header, one line per iteration, and medians."""
    write(timeline_header(run, name, num_steps, device_name(run.device)))
    steps = []
    for step in time_steps(run, num_steps):
        write(timeline_line(len(steps), step))
        steps.append(step)
    write(timeline_summary(steps))


def print_profile(run: ProfiledRun, name: str, rows: int | None, files: dict[str, str | None]) -> None:
    """Profile a step, print the report and write the requested files."""
    report = ProfileReport(record_step(run, files['trace']))
    height, width = run.config.data.size
    environment = {
        'cfg': name, 'resolution': f'{width}x{height}', 'batch': run.config.batch_size,
        'batch_gpu': run.config.batch_gpu, 'device': device_name(run.device), 'torch': torch.__version__,
        'kernels': 'GPU kernels' if report.record.on_gpu else 'CPU operations'}
    header = 'One training step: ' + ', '.join(f'{key} {value}' for key, value in environment.items())
    click.echo(to_text(report, header, rows))
    contents = {'text': lambda: to_text(report, header), 'csv': lambda: to_csv(report),
                'json': lambda: to_json(report, environment)}
    for option, content in contents.items():
        path = files[option]
        if path is not None:
            with replace_file(path) as temporary:
                temporary.write_text(content(), encoding='utf-8')


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU's architecture with the number of threads in use."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU ({platform.machine()}, {torch.get_num_threads()} threads)'
