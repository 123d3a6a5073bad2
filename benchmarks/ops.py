# SPDX-License-Identifier: Apache-2.0
"""Time every operator by its kernel and by its reference, against a plain copy of as many bytes.

python benchmarks/ops.py --device=cuda --json=ops.json
python benchmarks/ops.py --compare old.json new.json

Without a GPU only the references run.
"""
import contextlib
import itertools
import os
import re
import statistics
import tempfile
import time
from unittest import mock

import click
import common
import torch
from op_cases import CASES, DTYPES, LAYOUTS, Maker

from dnnlib.cli import run_command
from dnnlib.progress import progress
from dnnlib.util import UserError
from torch_utils import custom_ops
from torch_utils.misc import pick_device

# Of the highest layers of --cfg=auto: 256x256 with 16 images a GPU, 1024x1024 with 4.
SIZES = {'cuda': '16x64x256x256,4x32x1024x1024', 'cpu': '2x64x128x128'}
SECONDS = 0.1  # of measurement for each of the times in a row
MIN_RUNS, MAX_RUNS = 5, 50
# Read before each run, so that nothing of the arguments is left in a cache. On a GPU that takes longer than
# the host needs to queue the run, so that the events around the run see no gap.
FLUSH_BYTES = {'cuda': 2 ** 29, 'cpu': 2 ** 26}
SHOWN_KERNELS = 5  # slowest to compile
TABLE = ('case', 'by', 'us', 'MB', 'GB_per_sec', 'copy_percent', 'reference_us', 'speedup')


class Clock:
    """Median times on one device, each run with cold caches."""

    def __init__(self, device):
        self.device, self.copies = device, {}
        self.flushed = torch.zeros(FLUSH_BYTES[device.type] // 4, device=device)

    def microseconds(self, run):
        """The median over as many runs as the time allows."""
        run()  # what the first call does besides is not measured
        common.synchronize(self.device)
        start = time.perf_counter()
        measure = self._by_events if self.device.type == 'cuda' else self._by_host
        measure(run, 1)
        count = int(SECONDS / (time.perf_counter() - start))
        return statistics.median(measure(run, min(max(count, MIN_RUNS), MAX_RUNS)))

    def copy_microseconds(self, num_bytes):
        """Of a copy that reads half of the bytes and writes the other half."""
        if num_bytes not in self.copies:
            source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self.copies[num_bytes] = self.microseconds(lambda: target.copy_(source))
        return self.copies[num_bytes]

    def _by_events(self, run, count):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self.flushed.sum()
            start.record()
            run()
            end.record()
        common.synchronize(self.device)
        return [1000 * start.elapsed_time(end) for start, end in pairs]

    def _by_host(self, run, count):
        times = []
        for _ in range(count):
            self.flushed.sum()
            start = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - start))
        return times


@contextlib.contextmanager
def references_only():
    """Within this context no operator runs by a kernel, nor do those inside a reference."""
    mode = custom_ops.get_mode()
    custom_ops.set_mode('torch')
    try:
        yield
    finally:
        custom_ops.set_mode(mode)


@contextlib.contextmanager
def cold_kernels():
    """An empty cache of compiled kernels; gives {kernel: seconds of its first call} that fills up."""
    seconds, load = {}, custom_ops._load

    def timed(kernel, device):
        start = time.perf_counter()
        function = load(kernel, device)
        seconds[str(kernel)] = time.perf_counter() - start
        return function

    with tempfile.TemporaryDirectory(prefix='kernels-') as folder:
        with mock.patch.dict(os.environ, DNNLIB_CACHE_DIR=folder), \
                mock.patch.object(custom_ops, '_load', timed):
            yield seconds


def tensors_in(values):
    """The tensors among arguments or results."""
    return [v for v in ((values,) if isinstance(values, torch.Tensor) else values) if torch.is_tensor(v)]


def moved_bytes(arguments, results):
    """What must move: every argument read once, every result written once."""
    return sum(t.numel() * t.element_size() for t in tensors_in(arguments) + tensors_in(results))


def native_result(op, arguments):
    """The result by the kernel; None where there is none for this call."""
    if op.native is None or not custom_ops.is_available(arguments[0].device):
        return None
    try:
        return op.native(*arguments)
    except custom_ops.CompileError:  # has been warned of
        return None


def measure(label, case, maker, clock):
    """A row: times, bytes, and the share of the speed of a copy that the faster way in force reaches."""
    arguments = case.arguments(maker)
    with references_only():
        num_bytes = moved_bytes(arguments, case.op.reference(*arguments))
        reference_us = clock.microseconds(lambda: case.op.reference(*arguments))
    has_kernel = native_result(case.op, arguments) is not None
    us = clock.microseconds(lambda: case.op.native(*arguments)) if has_kernel else reference_us
    copy_us = clock.copy_microseconds(num_bytes)
    return {
        'case': label, 'by': 'kernel' if has_kernel else 'reference', 'us': us, 'bytes': num_bytes,
        'MB': num_bytes / 1e6, 'GB_per_sec': num_bytes / us / 1e3, 'copy_us': copy_us,
        'copy_percent': 100 * copy_us / us, 'reference_us': reference_us, 'speedup': reference_us / us}


def plan(names, sizes, dtypes, device):
    """(label, case, maker) of everything to be measured."""
    for size, dtype, layout, name in itertools.product(sizes, dtypes, LAYOUTS, names):
        if CASES[name].has_layout:
            label = f'{name} {"x".join(map(str, size))} {dtype} {layout}'
            yield label, CASES[name], Maker(size, DTYPES[dtype], LAYOUTS[layout], device)
    # The weights of a layer have neither the layout nor the size of images.
    for n, name in itertools.product(sorted({size[0] for size in sizes}), names):
        if not CASES[name].has_layout:
            maker = Maker((n, 1, 1, 1), torch.float32, torch.contiguous_format, device)
            yield f'{name} x{n}', CASES[name], maker


def parse_sizes(text):
    """'16x64x256x256,...' as tuples. Raises UserError."""
    sizes = []
    for part in text.split(','):
        size = tuple(map(int, part.split('x'))) if re.fullmatch(r'[1-9]\d*(x[1-9]\d*){3}', part) else ()
        if not size or size[2] % 2 or size[3] % 2 or min(size[2:]) < 8:
            raise UserError(f'--size={text}: {part or "nothing"} is not NxCxHxW with even H and W of at '
                            f'least 8; give such as {SIZES["cuda"]}')
        sizes.append(size)
    return sizes


def parse_names(option, text, known):
    """'a,b' as a list of known names. Raises UserError."""
    names = text.split(',')
    wrong = [name for name in names if name not in known]
    if wrong:
        raise UserError(f'--{option}={text}: {wrong[0] or "nothing"} is unknown; '
                        f'choose from {", ".join(known)}')
    return names


def show_kernels(seconds):
    """Print how long the first calls took; returns them as rows."""
    slowest = sorted(seconds, key=seconds.get, reverse=True)
    print(f'\n{len(seconds)} kernels compiled and loaded in {sum(seconds.values()):.2f} s')
    for kernel in slowest[:SHOWN_KERNELS]:
        print(f'{seconds[kernel]:6.2f} s  {kernel}')
    return [{'case': f'first call: {kernel}', 'us': 1e6 * seconds[kernel]} for kernel in slowest]


def compare(old, new):
    """Print old and new times. Raises UserError for a file that this program did not write."""
    try:
        common.compare(old, new, 'case', 'us')
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f'--compare {old} {new}: not both are results of benchmarks/ops.py ({error!r}); '
                        f'write them with --json') from error


@click.command(context_settings={'show_default': True})
@click.option('--device', default='auto', type=click.Choice(['auto', 'cuda', 'cpu']))
@click.option('--dtype', help='fp16, bf16, fp32, or several, with commas  [default: fp32; GPU: fp16,fp32]')
@click.option('--size', help='NxCxHxW of the larger image, or several  [default: on a GPU of --cfg=auto]')
@click.option('--only', help=f'Cases, separated by commas, of: {", ".join(CASES)}.')
@click.option('--json', 'json_path', type=click.Path(dir_okay=False), help='Write the measurement here.')
@click.option('--compare', 'files', nargs=2, type=click.Path(exists=True, dir_okay=False),
              metavar='OLD NEW', help='Measure nothing, but compare two such files.')
def command(device, dtype, size, only, json_path, files):
    """Print time, bytes, and share of the copy bandwidth for each operator."""
    if files:
        return compare(*files)
    device = pick_device(device)
    sizes = parse_sizes(size or SIZES[device.type])
    dtypes = parse_names('dtype', dtype or ('fp16,fp32' if device.type == 'cuda' else 'fp32'), DTYPES)
    names = parse_names('only', only, CASES) if only else list(CASES)
    clock, rows = Clock(device), []
    with cold_kernels() as seconds, torch.inference_mode():
        for one in progress(list(plan(names, sizes, dtypes, device)), desc='Measuring', unit='case'):
            rows.append(measure(*one, clock))
            # After each row: whoever stops a long measurement keeps what there is.
            common.write_json(json_path, device, rows)
    common.print_table([{column: row[column] for column in TABLE} for row in rows])
    common.write_json(json_path, device, rows + show_kernels(seconds))


if __name__ == '__main__':
    run_command(command)
