# SPDX-License-Identifier: Apache-2.0
"""Optional live statistics of a run: TensorBoard and Weights & Biases."""
import contextlib
import inspect
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import PIL.Image

from dnnlib import progress
from dnnlib.util import UserError, replace_file
from training.report.page import read_options

WANDB_PROJECT = 'stylegan2-ada'  # unless WANDB_PROJECT names another
WANDB_SHEET_PX = 1280  # longest side of the sheets that are sent
WANDB_ID_FILE = 'wandb_id.txt'


class Sink(Protocol):
    """A destination of statistics, besides stats.jsonl."""

    def add_scalars(self, scalars: Mapping[str, float], cur_nimg: int, now: float) -> None:
        """Show values measured after cur_nimg images, at `now` (seconds since the epoch)."""

    def add_sheet(self, path: str | os.PathLike, cur_nimg: int) -> None:
        """Show a sheet of generated images that was saved as `path`."""

    def close(self) -> None:
        """Write out everything."""


def open_sinks(run_dir: str | os.PathLike, start_time: float, *, wandb: bool) -> list[Sink]:
    """TensorBoard if it is installed, and Weights & Biases if requested.

    Raises UserError if wandb is requested and missing.
    """
    # The one that can fail comes first: nothing is left open then.
    sinks: list[Sink] = [WandbSink(run_dir)] if wandb else []
    tensorboard = _import_tensorboard()
    if tensorboard is not None:
        sinks.append(TensorBoardSink(tensorboard.SummaryWriter(str(run_dir)), start_time))
    return sinks


class TensorBoardSink:
    """TensorBoard events in the run directory, with times relative to start_time."""

    def __init__(self, writer: Any, start_time: float) -> None:
        self._writer, self._start_time = writer, start_time

    def add_scalars(self, scalars: Mapping[str, float], cur_nimg: int, now: float) -> None:
        """See Sink."""
        for name, value in scalars.items():
            self._writer.add_scalar(
                name, value, global_step=int(cur_nimg / 1000), walltime=now - self._start_time)
        self._writer.flush()

    def add_sheet(self, path: str | os.PathLike, cur_nimg: int) -> None:
        """Does nothing: the image file is in the same directory."""

    def close(self) -> None:
        """See Sink."""
        self._writer.close()


class WandbSink:
    """A W&B run with the name of the run directory and its training options; resumed with the run.

    Never prompts for a login: without an API key it records offline, as with WANDB_MODE=offline. Later
    failures do not affect training. Raises UserError if wandb is not installed.
    """

    def __init__(self, run_dir: str | os.PathLike) -> None:
        self._wandb = _import_wandb()
        self._errors = (OSError, RuntimeError, ValueError, getattr(self._wandb, 'Error', OSError))
        self._has_failed = False
        self._run = self._start(Path(run_dir))
        # Steps may decrease when a run is resumed, which W&B refuses for its own axis.
        self._try(lambda: self._run.define_metric('*', step_metric='kimg'))

    def _start(self, run_dir: Path) -> Any:
        project = None if 'WANDB_PROJECT' in os.environ else WANDB_PROJECT
        settings = {'project': project, 'name': run_dir.resolve().name, 'dir': str(run_dir),
                    'id': _run_id(run_dir), 'config': read_options(run_dir),
                    # log.txt has all output; two redirections of the streams would interfere.
                    'settings': {'console': 'off'}}
        mode = self._mode()
        if mode == 'offline':
            return self._wandb.init(**settings, mode=mode)
        try:
            return self._wandb.init(**settings, mode=mode, resume='allow')
        except self._errors as error:
            progress.write(f'W&B cannot be reached ({_one_line(error)}): recording offline; send it later '
                           'with wandb sync')
            return self._wandb.init(**settings, mode='offline')

    def _mode(self) -> str | None:
        """None leaves the choice to W&B, which knows WANDB_MODE."""
        if 'WANDB_MODE' in os.environ:
            return 'offline' if os.environ['WANDB_MODE'] == 'offline' else None
        if _is_logged_in(self._wandb):
            return None
        progress.write('W&B: not logged in, so this run is recorded offline; wandb login, then wandb sync '
                       'sends it')
        return 'offline'

    def add_scalars(self, scalars: Mapping[str, float], cur_nimg: int, now: float) -> None:
        """See Sink."""
        self._try(lambda: self._run.log({**scalars, 'kimg': cur_nimg / 1000}))

    def add_sheet(self, path: str | os.PathLike, cur_nimg: int) -> None:
        """Send the sheet, downscaled."""
        def send() -> None:
            with PIL.Image.open(path) as sheet:
                sheet.thumbnail((WANDB_SHEET_PX, WANDB_SHEET_PX))
                self._run.log({'fakes': self._wandb.Image(sheet), 'kimg': cur_nimg / 1000})
        self._try(send)

    def close(self) -> None:
        """See Sink."""
        self._try(self._run.finish)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except self._errors as error:
            # Only once: an unreachable server would fill the log.
            if not self._has_failed:
                progress.write(f'W&B: not everything was recorded ({_one_line(error)}); training continues')
            self._has_failed = True


def _is_logged_in(wandb: ModuleType) -> bool:
    # Newer releases can check without a prompt; older ones have the key in an attribute.
    if 'prompt' in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


def _run_id(run_dir: Path) -> str:
    """Id of the W&B run, kept in the run directory for resuming."""
    path = run_dir / WANDB_ID_FILE
    with contextlib.suppress(OSError):
        kept = path.read_text(encoding='utf-8').strip()
        if kept:
            return kept
    fresh = uuid.uuid4().hex[:16]
    with replace_file(path) as temporary:
        temporary.write_text(fresh + '\n', encoding='utf-8')
    return fresh


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__


def _import_tensorboard() -> ModuleType | None:
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        progress.write(f'No TensorBoard events ({error}); for them: pip install tensorboard')
        return None
    return tensorboard


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f'--wandb=1: {error}; pip install wandb, or omit --wandb') from error
    return wandb
