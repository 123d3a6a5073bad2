# SPDX-License-Identifier: Apache-2.0
"""Writes networks in the format given by the suffix of the file."""
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.util import UserError
from training.formats import exported, pickled, rosinality, safetensors_file
from training.formats.load import check_truncation


@dataclass(frozen=True)
class Choices:
    """Settings of some formats. truncation_psi, noise_mode: of an exported generator.

    network: the generator to export; None: G_ema, or G if it is missing.
    """

    truncation_psi: float = 1
    noise_mode: str = 'const'
    network: str | None = None


def write_snapshot(
    path: str | os.PathLike, snapshot: Mapping[str, Any], formats: Sequence[str] = ('pkl',),
) -> list[Path]:
    """Write what pickled.copy_networks() gave beside each other: `path` with the suffix of each format.

    formats: of training.config.values.SNAPSHOT_FORMATS. Returns the paths. Raises UserError if a file cannot
    be written.
    """
    writers: dict[str, Callable[..., Path]] = {
        'pkl': pickled.write_networks, 'safetensors': safetensors_file.write}
    return [writers[kind](Path(path).with_suffix(f'.{kind}'), snapshot) for kind in formats]


def write(path: str | os.PathLike, contents: Mapping[str, Any], choices: Choices) -> list[str]:
    """Write networks in the format given by the suffix of `path`; returns notes for the user.

    contents: as returned by load_network(). Raises UserError for an unknown suffix or unsuitable contents.
    """
    suffix = check_suffix(path)
    parent = Path(path).parent
    if not parent.is_dir():
        raise UserError(f'--dest={path}: the folder {parent} does not exist; create it first')
    return WRITERS[suffix](Path(path), contents, choices)


def check_suffix(path: str | os.PathLike) -> str:
    """The suffix of a file that write() knows. Raises UserError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise UserError(f'--dest={path}: the name must end in one of {", ".join(WRITERS)}')
    return suffix


def _write_pickle(path: Path, contents: Mapping[str, Any], _: Choices) -> list[str]:
    keys = (*pickled.EXPORTED, 'training_set_kwargs')
    pickled.write_networks(path, {key: contents.get(key) for key in keys})
    return []


def _write_safetensors(path: Path, contents: Mapping[str, Any], _: Choices) -> list[str]:
    safetensors_file.write(path, contents)
    return []


def _write_rosinality(path: Path, contents: Mapping[str, Any], _: Choices) -> list[str]:
    return [*rosinality.write(path, contents), rosinality.program_note(contents)]


def _write_onnx(path: Path, contents: Mapping[str, Any], choices: Choices) -> list[str]:
    difference = exported.write_onnx(path, _generator_of(path, contents, choices))
    if difference is None:
        return ['The file was not compared with the network; to do so: pip install onnxruntime']
    return [_agreement('onnxruntime', difference)]


def _write_torch_export(path: Path, contents: Mapping[str, Any], choices: Choices) -> list[str]:
    difference = exported.write_torch_export(path, _generator_of(path, contents, choices))
    return [_agreement('torch.export', difference)]


def _generator_of(path: Path, contents: Mapping[str, Any], choices: Choices) -> exported.ExportedGenerator:
    keys = ['G_ema', 'G'] if choices.network is None else [choices.network]
    G = next((contents[key] for key in keys if contents.get(key) is not None), None)
    if G is None:
        raise UserError(f'{path}: the source has no {" and no ".join(keys)} to export')
    check_truncation(G, choices.truncation_psi, '--trunc')
    return exported.ExportedGenerator(G, choices.truncation_psi, choices.noise_mode)


def _agreement(runtime: str, difference: float) -> str:
    batches = ' and '.join(map(str, exported.BATCH_SIZES))
    return (f'Compared in {runtime} with the network in float32, batches of {batches}: '
            f'largest difference {difference:.3g}')


WRITERS: dict[str, Callable[[Path, Mapping[str, Any], Choices], list[str]]] = {
    '.pkl': _write_pickle, '.safetensors': _write_safetensors, '.pt': _write_rosinality,
    '.onnx': _write_onnx, '.pt2': _write_torch_export}
