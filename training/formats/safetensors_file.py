# SPDX-License-Identifier: Apache-2.0
"""Networks in .safetensors: their tensors, and the constructor arguments as JSON in the metadata.

Tensors are named `<network>.<name in its state dict>`, such as `G_ema.mapping.fc0.weight`.
"""
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dnnlib.util import UserError, replace_file
from training.formats.rebuild import MODULES, Recipe, arguments_of, shown

FORMAT = 'stylegan2-ada-clean/1'
MAX_HEADER_BYTES = 50_000_000


def is_safetensors(data: bytes) -> bool:
    """Whether the data begins like a .safetensors file: header length, then a JSON object."""
    return data[8:9] == b'{' and int.from_bytes(data[:8], 'little') <= len(data) - 8


def read(data: bytes, name: str) -> tuple[dict[str, Recipe], Any]:
    """(key -> recipe of that network, training_set_kwargs). Raises UserError if it holds no networks."""
    metadata = header(data, name).get('__metadata__')
    if not isinstance(metadata, dict) or metadata.get('format') != FORMAT:
        raise UserError(f'{name}: safetensors without the constructor arguments of networks ({FORMAT}); only '
                        'files written by legacy.py or --snapshot-format=safetensors can be read')
    described = _parsed(metadata.get('networks'), name)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f'{name}: damaged ({shown(error)}); download or copy it again') from error
    recipes = {}
    for key in MODULES:
        if described.get(key) is not None:
            recipes[key] = _recipe(f'{name}: {key}', described[key], {
                full.removeprefix(f'{key}.'): t for full, t in tensors.items() if full.startswith(f'{key}.')})
    if not recipes:
        raise UserError(f'{name}: holds no networks')
    kwargs = metadata.get('training_set_kwargs')
    return recipes, None if kwargs is None else _parsed(kwargs, name)


def header(data: bytes, name: str) -> dict[str, Any]:
    """The JSON header: name -> {dtype, shape, data_offsets}, and __metadata__. Raises UserError."""
    size = int.from_bytes(data[:8], 'little')
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise UserError(f'{name}: no safetensors file, or cut off; download or copy it again')
    return _parsed(data[8:8 + size], name)


def write(
    path: str | os.PathLike, contents: Mapping[str, Any], remarks: Mapping[str, str] | None = None,
) -> Path:
    """Write the result of load_network() or copy_networks(); returns the path.

    remarks: text by name that is added to the metadata, such as a licence.
    Raises UserError if the file cannot be written, or a network is of a foreign class.
    """
    path, tensors, described = Path(path), {}, {}
    for key in MODULES:
        net = contents.get(key)
        if net is None:
            continue
        kwargs = arguments_of(f'{path}: {key}', net)
        described[key] = {'class_name': type(net).__name__, 'init_kwargs': kwargs}
        # Copies: the format supports neither shared memory nor other memory formats.
        tensors.update({f'{key}.{name}': t.detach().cpu().clone(memory_format=torch.contiguous_format)
                        for name, t in net.state_dict().items()})
    metadata = {**(remarks or {}), 'format': FORMAT, 'networks': json.dumps(described, default=_plain)}
    if contents.get('training_set_kwargs') is not None:
        metadata['training_set_kwargs'] = json.dumps(contents['training_set_kwargs'], default=str)
    # Not save_file(), whose files only the owner can read.
    with replace_file(path, durable=True) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


def _recipe(name: str, described: Any, tensors: dict[str, torch.Tensor]) -> Recipe:
    described = described if isinstance(described, dict) else {}
    class_name, kwargs = described.get('class_name'), described.get('init_kwargs')
    if not isinstance(class_name, str) or not isinstance(kwargs, dict):
        raise UserError(f'{name} has no constructor arguments; the file is damaged')
    # JSON has no tuples, but the network stores its size as one.
    size = kwargs.get('img_resolution')
    kwargs = {**kwargs, 'img_resolution': tuple(size)} if isinstance(size, list) else kwargs
    return Recipe(name, class_name, kwargs, tensors)


def _parsed(text: Any, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f'{name}: metadata is not JSON ({shown(error)}); the file is damaged') from error
    if not isinstance(value, dict):
        raise UserError(f'{name}: metadata is not a JSON object; the file is damaged')
    return value


def _plain(value: Any) -> Any:
    """A NumPy number or array as plain values. Raises TypeError for anything else."""
    if hasattr(value, 'tolist'):
        return value.tolist()
    raise TypeError(f'a {type(value).__name__} among the constructor arguments')
