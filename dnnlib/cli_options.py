# SPDX-License-Identifier: Apache-2.0
"""Command-line options that several scripts share: lists of numbers, and how a generator is opened."""
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dnnlib.util import UserError

MAX_SEED = 2 ** 32 - 1  # of NumPy's RandomState, which turns a seed into a latent


class NumberList(click.ParamType):
    """`a-b` (both included; empty if b < a) or `a,b,c`: whole numbers from 0 to `maximum`."""

    name = 'a-b or a,b,c'

    def __init__(self, maximum: int = MAX_SEED):
        self.maximum = maximum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> Sequence[int]:
        """The numbers, in the order given; a usage error if the text has another form."""
        if not isinstance(value, str):
            return value
        span = re.fullmatch(r'(\d+)-(\d+)', value.strip(), re.ASCII)
        if span is not None:
            first, last = int(span[1]), int(span[2])
            # Not a list: a range typed with some zeros too many must not fill the memory.
            numbers: Sequence[int] = range(first, last + 1)
            largest = max(first, last)
        elif re.fullmatch(r'\s*\d+\s*(,\s*\d+\s*)*', value, re.ASCII):
            numbers = [int(text) for text in value.split(',')]
            largest = max(numbers)
        else:
            self.fail(f'{value!r} is neither a range such as 0-15 nor a list such as 3,7,85', param, ctx)
        if largest > self.maximum:
            self.fail(f'{value!r}: numbers go from 0 to {self.maximum}', param, ctx)
        return numbers


def generator_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the options of every script that opens a generator and writes pictures."""
    options = [
        click.option('--network', required=True, metavar='FILE|URL',
                     help='Network file (its G_ema): .pkl, .safetensors or .pt.'),
        click.option('--outdir', required=True, metavar='DIR', help='Where the pictures go.'),
        click.option('--trunc', type=float, default=1, show_default=True, metavar='PSI',
                     help='Truncation psi: below 1 more typical pictures, above 1 more varied ones.'),
        click.option('--class', 'class_idx', type=int, metavar='INDEX',
                     help='Class label; required by conditional networks.'),
        click.option('--noise-mode', type=click.Choice(['const', 'random', 'none']), default='const',
                     show_default=True, help='Noise: as saved with the network, drawn per seed, or none.'),
        click.option('--device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto',
                     show_default=True, help='auto: the GPU if there is one.'),
        click.option('--batch', type=click.IntRange(min=1), default=1, show_default=True, metavar='N',
                     help='Pictures made at once: more is faster; some pixels may round differently.'),
        click.option('--trust-pickle', is_flag=True,
                     help='Run the code inside the network file. Only for files whose origin you trust.')]
    for option in reversed(options):
        command = option(command)
    return command


def make_folder(path: str | os.PathLike) -> Path:
    """Create the folder of --outdir where it does not exist. Raises UserError if that cannot be."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={path}: cannot be made ({error.strerror}); choose another') from error
    # Better now than after the first picture was made.
    if not os.access(path, os.W_OK):
        raise UserError(f'--outdir={path}: cannot be written to; choose another or change its permissions')
    return Path(path)
