# SPDX-License-Identifier: Apache-2.0
"""Transfer learning: copies weights between networks, also of different shapes, and reports it as a table."""
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dnnlib.resolution import Size, height_width
from dnnlib.util import UserError, replace_file
from torch_utils import distributed, misc
from training.config import TrainConfig
from training.formats.load import NETWORKS, load_network
from training.systems.table import SYSTEMS
from training.transfer.rules import Pair, fit_tensor

ACTIONS = KEPT, RESIZED, FRESH, NOT_USED = 'kept', 'resized', 'fresh', 'not used'
# Used instead if a file lacks one of these.
SUBSTITUTES = {'G': 'G_ema', 'G_ema': 'G'}
MAX_NAME = 44  # characters
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """A tensor in the table. source, here: shapes, None if missing.  action: one of ACTIONS.  how: details,
    may be empty.
    """

    network: str
    name: str
    source: Shape | None
    here: Shape | None
    action: str
    how: str = ''


def transfer(
    path_or_url: str, into: Mapping[str, torch.nn.Module], run_dir: str | os.PathLike | None = None,
) -> list[Record]:
    """Copy the weights of a network file into the modules of the same key, as far as they fit.

    Rank 0 prints a summary table, and writes the table of all tensors to transfer.txt in run_dir. A network
    that the file lacks stays fresh. Returns the whole table. Raises UserError if the file is not a network
    file, or nothing in it fits.
    """
    source = load_network(path_or_url, only=NETWORKS)
    records = transfer_networks(source, into)
    if not any(record.action in (KEPT, RESIZED) for record in records):
        raise UserError(f'--resume={path_or_url}: {_misfit(source, into)}')
    if distributed.rank() == 0:
        heading = f'Transfer from {path_or_url}: {_describe(source)} -> {_describe(into)}'
        notes = [f'NOTE: {note}' for note in transfer_notes(source, into)]
        print('\n'.join(['', heading, *summary_lines(records), *notes, '']))
        if run_dir is not None:
            lines = [heading, *notes, '', *full_lines(records)]
            with replace_file(Path(run_dir, 'transfer.txt')) as temporary:
                temporary.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return records


def check_source(path_or_url: str, config: TrainConfig, label_dim: int, channels: int) -> None:
    """Raise the UserError with which transfer() would end a run of this configuration.

    label_dim, channels: of the dataset.
    """
    source = load_network(path_or_url, only=NETWORKS)
    with torch.device('meta'):
        G, D = SYSTEMS[config.system].networks(config, label_dim, channels)
    into = {'G': G, 'D': D, 'G_ema': G}
    for key, target in into.items():
        found = _source_of(source, key)
        if found is not None and {*found.state_dict()} & {*target.state_dict()}:
            return
    raise UserError(f'--resume={path_or_url}: {_misfit(source, into)}')


def _misfit(source: Mapping[str, torch.nn.Module | None], into: Mapping[str, torch.nn.Module]) -> str:
    """Why nothing of the file can be used, and what to do."""
    found = [type(source[key]).__name__ for key in into if source.get(key) is not None]
    if not found:
        return f'contains none of {", ".join(into)}; give a snapshot of train.py'
    wanted = [type(module).__name__ for module in into.values()]
    return (f'nothing in {", ".join(dict.fromkeys(found))} fits {", ".join(dict.fromkeys(wanted))}; train '
            'with the --cfg that the file was trained with, or start without --resume')


def transfer_networks(
    source: Mapping[str, torch.nn.Module | None], into: Mapping[str, torch.nn.Module],
) -> list[Record]:
    """Copy what fits from the networks of `source` into those of the same key; on any device.

    Tensors are matched by name, and blocks are named by level, so networks of different resolutions share
    their lower levels. Other shapes are fitted by training.transfer.rules.
    """
    records = []
    for key, target in into.items():
        found = _source_of(source, key)
        if found is None:
            records += [Record(key, name, None, tuple(tensor.shape), FRESH)
                        for name, tensor in misc.named_params_and_buffers(target)]
        else:
            records += _transfer_network(key, found, target)
    return records


def _source_of(source: Mapping[str, torch.nn.Module | None], key: str) -> torch.nn.Module | None:
    found = source.get(key)
    return source.get(SUBSTITUTES[key]) if found is None and key in SUBSTITUTES else found


def _transfer_network(key: str, source: torch.nn.Module, target: torch.nn.Module) -> list[Record]:
    theirs, ours = (dict(misc.named_params_and_buffers(net)) for net in (source, target))
    records = []
    for name, tensor in ours.items():
        shape = tuple(tensor.shape)
        if name not in theirs:
            records.append(Record(key, name, None, shape, FRESH, _start_new(name, tensor, theirs)))
            continue
        fit = fit_tensor(Pair(name, theirs[name].detach().cpu(), tensor.detach().cpu(), source, target))
        if fit.value is not None:
            tensor.detach().copy_(fit.value)
        action = FRESH if fit.value is None else RESIZED if fit.how else KEPT
        records.append(Record(key, name, tuple(theirs[name].shape), shape, action, fit.how))
    return records + [Record(key, name, tuple(tensor.shape), None, NOT_USED)
                      for name, tensor in theirs.items() if name not in ours]


def _start_new(name: str, tensor: torch.Tensor, theirs: Mapping[str, torch.Tensor]) -> str:
    """Prepare a tensor without counterpart; returns its description.

    A new level adds detail to the upsampled image of the levels below. Its torgb starts at 0, so that G still
    generates the images that it has learned.
    """
    first = 'synthesis.b4.torgb.weight'
    if not name.endswith('torgb.weight') or first not in theirs:
        return ''
    tensor.detach().zero_()
    return 'starts at 0'


def transfer_notes(
    source: Mapping[str, torch.nn.Module | None], into: Mapping[str, torch.nn.Module],
) -> list[str]:
    """Notes on what the user may not expect: missing networks, different latents."""
    notes = []
    for key in into:
        if source.get(key) is None:
            consequence = (
                'starts from random weights, so images will get worse at first; snapshots of train.py '
                'contain all networks' if _source_of(source, key) is None
                else f'takes the weights of {SUBSTITUTES[key]}')
            notes.append(f'the file contains no {key}: that of this run {consequence}')
    old, new = _source_of(source, 'G_ema'), into.get('G_ema', into.get('G'))
    if old is not None and new is not None:
        notes += _latent_notes(old, new)
    return notes


def _latent_notes(old: torch.nn.Module, new: torch.nn.Module) -> list[str]:
    notes = []
    # A part of a mapping network is useless.
    for name, label in (('z_dim', 'z'), ('w_dim', 'w')):
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            notes.append(f'{name} is {b}, but {a} in the file: layers that read {label} start from random '
                         'weights, and styles must be learned again; choose a preset with the same sizes')
    a, b = old.mapping.num_layers, new.mapping.num_layers
    if a != b:
        notes.append(f'the mapping network has {b} layers, but {a} in the file: a part of the layers does '
                     f'not compute what the whole did; --map-depth={a} keeps all of them')
    return notes


def summary_lines(records: list[Record]) -> list[str]:
    """The table, with layers of equal results in one row, and the totals of each network."""
    rows, networks = [], _by_network(records)
    for network, group in networks.items():
        # G_ema has the shapes of G, so usually the same table.
        if network == 'G_ema' and _without_network(group) == _without_network(networks.get('G', [])):
            rows.append([network, '(as G)', '', '', ''])
            continue
        rows += [[network if i == 0 else '', *row] for i, row in enumerate(_summarise(group, ''))]
    return [*_columns([['Network', 'Tensors', 'Source', 'Here', 'Result'], *rows]), *_totals(networks)]


def full_lines(records: list[Record]) -> list[str]:
    """The table with one row per tensor."""
    rows = [[r.network, r.name, _text(r.source), _text(r.here), _result(r)] for r in records]
    header = ['Network', 'Tensor', 'Source', 'Here', 'Result']
    return [*_columns([header, *rows]), *_totals(_by_network(records))]


def _by_network(records: list[Record]) -> dict[str, list[Record]]:
    return {network: list(group) for network, group in itertools.groupby(records, lambda r: r.network)}


def _without_network(records: list[Record]) -> list[tuple]:
    return [(r.name, r.source, r.here, r.action, r.how) for r in records]


def _totals(networks: Mapping[str, list[Record]]) -> Iterator[str]:
    for network, records in networks.items():
        counts = {action: sum(r.action == action for r in records) for action in ACTIONS}
        taken = counts[KEPT] + counts[RESIZED]
        yield (f'{network}: {taken} of {taken + counts[FRESH]} tensors taken ({counts[KEPT]} kept, '
               f'{counts[RESIZED]} resized), {counts[FRESH]} fresh; {counts[NOT_USED]} of the file not used')


def _summarise(records: list[Record], prefix: str) -> Iterator[list[str]]:
    """Rows [tensors, source, here, result] of the records whose names begin with `prefix`."""
    if len(records) == 1:
        record = records[0]
        yield [record.name, _text(record.source), _text(record.here), _result(record)]
        return
    if _is_uniform(records):
        yield [f'{prefix}* ({len(records)})', '', '', _result(records[0])]
        return
    # Parts with one result share a row, at the position of the first.
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(record.name.removeprefix(prefix).split('.')[0], []).append(record)
    fates: dict[str, list[str]] = {}
    for name, part in parts.items():
        fates.setdefault(_result(part[0]) if _is_uniform(part) else f'mixed {name}', []).append(name)
    for names in fates.values():
        group = [record for name in names for record in parts[name]]
        if len(names) > 1:
            yield [f'{prefix}{_join(names)} ({len(group)})', '', '', _result(group[0])]
        else:
            yield from _summarise(group, f'{prefix}{names[0]}.')


def _is_uniform(records: list[Record]) -> bool:
    return len({(record.action, record.how) for record in records}) == 1


def _join(names: list[str]) -> str:
    text = '{' + ', '.join(names) + '}'
    return text if len(text) <= MAX_NAME else f'{{{names[0]}, {names[1]}, ..., {names[-1]}}}'


def _result(record: Record) -> str:
    return f'{record.action}: {record.how}' if record.how else record.action


def _columns(rows: Iterable[list[str]]) -> list[str]:
    """Lines with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ['  '.join(row).rstrip() for row in padded]


def _text(shape: Shape | None) -> str:
    return '-' if shape is None else 'x'.join(map(str, shape)) or '1'


def _describe(networks: Mapping[str, torch.nn.Module | None]) -> str:
    """Such as '256x256 images of 3 channels, no labels'."""
    net = next(networks[key] for key in NETWORKS if networks.get(key) is not None)
    labels = f'{net.c_dim} labels' if net.c_dim else 'no labels'
    plural = 's' if net.img_channels > 1 else ''
    return f'{_size_text(net.img_resolution)} images with {net.img_channels} channel{plural}, {labels}'


def _size_text(size: Size) -> str:
    height, width = height_width(size)
    return f'{width}x{height}'
