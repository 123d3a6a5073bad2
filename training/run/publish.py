# SPDX-License-Identifier: Apache-2.0
"""A network as a repository of the Hugging Face Hub: weights, config.json, and a model card of its run."""
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import safetensors
import torch

from dnnlib import image_io
from dnnlib.util import UserError
from torch_utils.misc import pick_device
from training.formats import hub, safetensors_file
from training.formats.load import load_network
from training.report.curves import read_jsonl
from training.report.page import read_options, run_facts
from training.report.ticks import nimg_of_name
from training.sampling.output import sheet_columns
from training.sampling.sampler import Sampler
from training.sampling.sources import SeedSource

CONFIG_FILE, CARD_FILE, SAMPLES_FILE = 'config.json', 'README.md', 'samples.png'
NUM_SAMPLES = 16
LICENSE = re.compile(r'[a-z0-9][a-z0-9.-]*')  # identifiers of the Hub
CARD = jinja2.Environment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
).from_string('''---
{% if license %}
license: {{ license }}
{% endif %}
library_name: stylegan2-ada-clean
pipeline_tag: unconditional-image-generation
tags:
- gan
- stylegan2-ada
---
# {{ title }}

Generates images of {{ width }}x{{ height }} pixels, {{ G.img_channels }} channels
{%- if G.c_dim %}, {{ G.c_dim }} classes{% endif %}.
{% if samples %}

![Seeds 0 to {{ num_samples - 1 }}, without truncation]({{ samples }})
{% endif %}

## How to use it

With stylegan2-ada-clean, which executes nothing in the files of this repository:

```
python generate.py --network={{ name }} --seeds=0-35 --grid{{ " --class=0" if G.c_dim }} --outdir=out
python train.py --resume={{ name }} --data=DATASET --outdir=runs
```

```python
import torch
from legacy import load_network

G = load_network('{{ name }}').G_ema
img = G(torch.randn(1, G.z_dim), {{ "torch.eye(G.c_dim)[:1]" if G.c_dim else "None" }})  # NCHW in [-1, 1]
```

`{{ weights }}` holds the weights, `{{ config }}` the arguments of the networks and the training options.
{% for title, rows in tables.items() if rows %}

## {{ title }}

| | |
|---|---|
{% for key, value in rows.items() %}
| {{ key }} | {{ value }} |
{% endfor %}
{% endfor %}

## Licence

{{ license or "Not stated" }}.
''')


def push_to_hub(
    source: str | os.PathLike, dest: str | os.PathLike, *, license: str | None = None, private: bool = False,
) -> str:
    """Publish a network on the Hub, or write the files for that to a folder; returns the URL or the folder.

    source: a network file, whose run directory provides options and metrics; or a folder written by this
    function, which is uploaded as it is.  dest: hf://user/repo[@branch], or a new folder.  license: its
    identifier on the Hub, such as 'cc-by-4.0'.  private: makes a repository that does not exist yet private.
    Raises UserError.
    """
    source, dest = str(source), str(dest)
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(f'--license={license}: give an identifier of the Hub, such as cc-by-4.0 or other')
    if os.path.isdir(source):
        _check_prepared(source, dest, license)
        return hub.upload(source, dest, private=private)
    if not hub.is_hub_name(dest):
        write_model_folder(Path(dest), source, hub.NETWORK_FILE, license)
        return dest
    hub.check_destination(dest)  # before images are generated
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, 'model')
        write_model_folder(folder, source, dest, license)
        return hub.upload(folder, dest, private=private)


def write_model_folder(folder: Path, source: str, name: str, license: str | None) -> None:
    """Write model.safetensors, config.json, samples.png and README.md, all or none of them.

    source: network file.  name: of the network in the commands of the card.  Raises UserError if the folder
    has contents or cannot be written, or the source has no G_ema.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f'--dest={folder}: exists; give a new folder')
    found = load_network(source)
    if found.G_ema is None:
        raise UserError(f'{source}: holds no G_ema; give a snapshot with an averaged generator')
    run_dir = Path(source).parent
    options = _without_paths(read_options(run_dir))
    partial = folder.with_name(f'.{uuid.uuid4().hex}.tmp')
    try:
        partial.mkdir(parents=True)
        _write_weights(partial, found, options)
        has_samples = _write_samples(partial / SAMPLES_FILE, found.G_ema)
        tables = {'Training': _training_rows(source, options), 'Metrics': _metrics(source, run_dir)}
        card = _card(found.G_ema, name, license, tables, has_samples=has_samples)
        (partial / CARD_FILE).write_text(card, encoding='utf-8')
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f'--dest={folder}: cannot be written ({error.strerror or error}); check the folder, '
                        'its permissions and the free space') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_prepared(source: str, dest: str, license: str | None) -> None:
    """Raise UserError unless a folder can be uploaded as it is."""
    if not Path(source, hub.NETWORK_FILE).is_file():
        raise UserError(f'--source={source}: a folder without {hub.NETWORK_FILE}; give a network file, or a '
                        'folder that push wrote')
    if not hub.is_hub_name(dest):
        raise UserError(f'--dest={dest}: a folder is uploaded; give hf://user/repo')
    if license is not None:
        raise UserError(f'--license={license}: the card is uploaded as it is; edit {source}/{CARD_FILE}')


def _write_weights(folder: Path, found: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    contents = {**found, 'training_set_kwargs': _without_paths(found['training_set_kwargs'])}
    path = safetensors_file.write(folder / hub.NETWORK_FILE, contents)
    with safetensors.safe_open(path, 'pt') as file:
        metadata = file.metadata()
    config = {'format': metadata['format'], 'networks': json.loads(metadata['networks']),
              'training_options': options}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _without_paths(value: Any) -> Any:
    """JSON values with paths reduced to their last part, so that no folder of this machine is published."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return re.split(r'[/\\]', value.rstrip('/\\'))[-1] if isinstance(value, str) else value


def _write_samples(path: Path, G: torch.nn.Module) -> bool:
    """Write a sheet of seeds 0 to 15; False if PNG does not support the number of channels."""
    if G.img_channels not in image_io.MODES:
        return False
    device = pick_device('auto')
    sampler = Sampler(G.to(device), device)
    source = SeedSource(sampler, range(NUM_SAMPLES), range(G.c_dim) or (None,))
    images = [sampler.images(source.ws([i]), [i])[0] for i in range(NUM_SAMPLES)]
    columns = sheet_columns(NUM_SAMPLES, images[0].shape)
    sheet = image_io.ContactSheet(columns, -(-NUM_SAMPLES // columns), images[0].shape)
    for index, pixels in enumerate(images):
        sheet.put(index % columns, index // columns, pixels)
    sheet.save(path)
    return True


def _training_rows(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    nimg = nimg_of_name(source, 'network-snapshot-')
    length = {} if nimg is None else {'Images shown': f'{nimg / 1000:g} kimg'}
    return {**length, **run_facts(options)} if options else length


def _metrics(source: str, run_dir: Path) -> dict[str, str]:
    """The latest results of the snapshot, by name; of all its formats."""
    found = {}
    for path in sorted(run_dir.glob('metric-*.jsonl')):
        for row in read_jsonl(path):
            is_same = Path(str(row.get('snapshot_pkl'))).stem == Path(source).stem
            if is_same and isinstance(row.get('results'), dict):
                found.update({name: f'{value:.4g}' for name, value in row['results'].items()
                              if isinstance(value, (int, float))})
    return found


def _card(
    G: torch.nn.Module, name: str, license: str | None, tables: Mapping[str, Mapping[str, Any]], *,
    has_samples: bool,
) -> str:
    height, width = (G.img_resolution,) * 2 if isinstance(G.img_resolution, int) else G.img_resolution
    # A bar would end the cell of a table.
    cells = {title: {key: str(value).replace('|', '\\|') for key, value in rows.items()}
             for title, rows in tables.items()}
    return CARD.render(
        G=G, name=name, license=license, tables=cells, width=width, height=height, num_samples=NUM_SAMPLES,
        title=name.removeprefix(hub.PREFIX) if hub.is_hub_name(name) else 'Generator',
        samples=SAMPLES_FILE if has_samples else None, weights=hub.NETWORK_FILE, config=CONFIG_FILE)
