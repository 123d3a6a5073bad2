# SPDX-License-Identifier: Apache-2.0
"""Kernel table of a step, and totals by phase, layer, operation and kind, as text, CSV and JSON."""
import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.profiling.ops import CONVOLUTION, OPTIMISER, group_of
from training.profiling.record import StepRecord
from training.profiling.trace import OPTIMISER as OPTIMISER_DIRECTION
from training.profiling.trace import ProfiledKernel, is_named

SIZES = ('N', 'C', 'H', 'W', 'K', 'P', 'Q', 'R', 'S', 'padding', 'stride', 'dilation', 'groups')
COLUMNS = ('index', 'direction', 'phase', 'where', 'op', 'own_op', 'group', 'parameters', *SIZES,
           'transposed', 'gradients', 'dtype', 'kernel', 'start_us', 'us', 'flop', 'share_of_peak')
CONVOLUTION_OPS = {'': 'convolution', 'data': 'data gradient of convolution',
                   'weight': 'weight gradient of convolution'}
MAX_CELL = 76  # characters of a kernel's name in the text; template names can be very long
Row = dict[str, Any]


@dataclass(frozen=True)
class Total:
    """A sum over kernels with the same name."""

    name: str
    kernels: int
    us: float


class ProfileReport:
    """Report on a record.  rows: one per kernel, with keys from COLUMNS (sizes only for convolutions).

    accounted: fraction of the step's time spent in kernels.  named: fraction of the kernels whose layer or
    part of the step is known.
    """

    def __init__(self, record: StepRecord):
        self.record = record
        self.rows = [self._row(i, kernel) for i, kernel in enumerate(record.kernels)]
        self.kernel_us = sum(kernel.microseconds for kernel in record.kernels)
        self.accounted = self.kernel_us / record.step_us
        self.named = sum(map(is_named, record.kernels)) / max(len(record.kernels), 1)

    def totals(self, key: str) -> list[Total]:
        """Totals by a column, largest first."""
        return sum_by(self.rows, lambda row: row[key] or 'outside of phases')

    def phase_totals(self) -> list[Row]:
        """Totals by phase, and the average cost per iteration, since lazy phases do not run in each."""
        intervals = {info.name: info.interval for info in self.record.phases}
        return [{'name': total.name, 'kernels': total.kernels, 'us': total.us,
                 'every': intervals.get(total.name, 1),
                 'us_per_iteration': total.us / intervals.get(total.name, 1)}
                for total in self.totals('phase')]

    def layer_convolutions(self) -> list[Row]:
        """Per place with convolutions: number of kernels of the forward pass and of both gradients."""
        counts: dict[str, dict[str, int]] = defaultdict(lambda: {'forward': 0, 'data': 0, 'weight': 0})
        for row in (row for row in self.rows if row['group'] == CONVOLUTION and 'N' in row):
            count = counts[row['where']]
            for kind in {*(row['gradients'] or 'forward').split('+')} & set(count):
                count[kind] += 1
        return [{'where': where, **count} for where, count in counts.items()]

    def _row(self, index: int, kernel: ProfiledKernel) -> Row:
        convolution = kernel.convolution
        is_optimiser = kernel.direction == OPTIMISER_DIRECTION
        row = {
            'index': index, 'direction': kernel.direction, 'phase': kernel.phase,
            'where': self.record.naming(kernel), 'op': kernel.op, 'own_op': kernel.own_op,
            'group': OPTIMISER if is_optimiser else group_of(kernel.op, kernel.kernel, kernel.own_op),
            'parameters': kernel.parameters, 'dtype': kernel.dtype, 'kernel': kernel.kernel,
            'start_us': round(kernel.start_us, 3), 'us': round(kernel.microseconds, 3)}
        if convolution is not None:
            row |= {**convolution.sizes(), 'gradients': '+'.join(convolution.gradients),
                    'transposed': convolution.is_transposed, 'flop': convolution.flop}
            kind = next((g for g in convolution.gradients if g in CONVOLUTION_OPS), '')
            row['op'] = CONVOLUTION_OPS[kind]
            peak = self.record.peaks.get(kernel.dtype)
            if peak and kernel.microseconds > 0:
                row['share_of_peak'] = round(convolution.flop / (kernel.microseconds * 1e-6) / peak, 4)
        return row


def sum_by(rows: Iterable[Row], key: Callable[[Row], str]) -> list[Total]:
    """Total microseconds of rows with the same key, largest first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row['us'])
    totals = [Total(name, len(times), sum(times)) for name, times in groups.items()]
    return sorted(totals, key=lambda total: -total.us)


def to_text(report: ProfileReport, header: str, max_rows: int | None = None) -> str:
    """The full report as text.  header: what was measured.  max_rows: list only the slowest kernels."""
    rows = report.rows
    if max_rows is not None and max_rows < len(rows):
        slowest = sorted(rows, key=lambda row: -row['us'])[:max_rows]
        rows = sorted(slowest, key=lambda row: row['index'])
    note = '' if rows is report.rows else f', the {len(rows)} slowest shown'
    sections = [header, f'Kernels: {len(report.rows)}{note}']
    if rows:
        sections.append(table([_shown(row) for row in rows]))
    sections += [summary(report), *_totals_text(report)]
    return '\n\n'.join(sections) + '\n'


def summary(report: ProfileReport) -> str:
    """Fraction of the time that is accounted for, and speed of convolutions."""
    record = report.record
    between = max(record.step_us - report.kernel_us, 0)
    kind = 'kernels' if record.on_gpu else 'operations'
    idle = 'without a kernel' if record.on_gpu else 'Python, autograd and calls between operations'
    lines = [
        f'Step: {_ms(record.step_us)} ms with the profiler, {_ms(record.plain_step_us)} ms without.',
        f'In {kind}: {_ms(report.kernel_us)} ms, {report.accounted:.1%} of the step; {idle}: '
        f'{_ms(between)} ms.',
        f'Place known: {report.named:.1%} of {len(report.rows)} {kind}.']
    for name, peak in sorted(record.peaks.items()):
        done = [row for row in report.rows if row['dtype'] == name and 'flop' in row and row['us'] > 0]
        seconds = sum(row['us'] for row in done) * 1e-6
        rate = sum(row['flop'] for row in done) / seconds if seconds else 0.0
        lines.append(f'Convolutions of {name}: {rate / 1e9:.1f} GFLOP/s, {rate / peak:.1%} of the '
                     f'{peak / 1e9:.1f} measured as peak of the device.')
    return '\n'.join(lines)


def _totals_text(report: ProfileReport) -> list[str]:
    share = report.record.step_us / 100
    sections = [titled('By phase', [
        {'phase': row['name'], 'kernels': row['kernels'], 'ms': _ms(row['us']),
         '% of step': f'{row["us"] / share:.1f}', 'every': row['every'],
         'ms per iteration': _ms(row['us_per_iteration'])} for row in report.phase_totals()])]
    for title, key in (('By kind', 'group'), ('By direction', 'direction'), ('By operation', 'op'),
                       ('By layer', 'where')):
        sections.append(titled(title, [
            {key: total.name, 'kernels': total.kernels, 'ms': _ms(total.us),
             '% of step': f'{total.us / share:.1f}'} for total in report.totals(key)]))
    convolutions = report.layer_convolutions()
    if convolutions:
        sections.append(titled('Convolution kernels by layer', convolutions))
    return sections


def titled(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a heading."""
    return f'{title}\n{table(rows)}'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned columns, numbers right-aligned. Needs at least one row."""
    cells = [[str(value) for value in row.values()] for row in rows]
    names = list(rows[0])
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    is_number = [not isinstance(value, str) or _is_number(value) for value in rows[0].values()]

    def line(values: Sequence[str]) -> str:
        return '  '.join(value.rjust(width) if right else value.ljust(width)
                         for value, width, right in zip(values, widths, is_number, strict=True)).rstrip()
    return '\n'.join([line(names), *map(line, cells)])


def to_csv(report: ProfileReport) -> str:
    """One line per kernel, with COLUMNS as header; empty where a column does not apply."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(report.rows)
    return file.getvalue()


def to_json(report: ProfileReport, environment: Mapping[str, Any]) -> str:
    """The kernels, all totals, and the environment of the measurement."""
    record = report.record
    totals = {key: [vars(total) for total in report.totals(key)]
              for key in ('group', 'direction', 'op', 'where')}
    return json.dumps({
        'environment': dict(environment), 'step_us': record.step_us, 'plain_step_us': record.plain_step_us,
        'kernel_us': report.kernel_us, 'accounted': report.accounted, 'named': report.named,
        'peak_flop_per_sec': record.peaks, 'totals': {'phase': report.phase_totals(), **totals},
        'convolutions': report.layer_convolutions(), 'kernels': report.rows}, indent=1) + '\n'


def _shown(row: Row) -> Row:
    """The columns of the text table."""
    op = row['op'].removeprefix('aten::')
    kernel = row['kernel']
    if len(kernel) > MAX_CELL:
        kernel = kernel[:MAX_CELL - 3] + '...'
    peak = row.get('share_of_peak')
    return {
        '#': row['index'], 'direction': row['direction'], 'where': row['where'],
        'op': f'{row["own_op"]}/{op}' if row['own_op'] else op, 'parameters': row['parameters'],
        'kernel': kernel, 'us': f'{row["us"]:.1f}', '% of peak': '' if peak is None else f'{peak * 100:.1f}'}


def _is_number(text: str) -> bool:
    return text.replace('.', '', 1).isdigit()


def _ms(us: float) -> str:
    return f'{us / 1000:.3f}'
