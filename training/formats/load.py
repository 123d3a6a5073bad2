# SPDX-License-Identifier: Apache-2.0
"""Opens network files of every kind, without running any code in them."""
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

import dnnlib
from dnnlib.util import UserError, find_bundled
from training.formats.rebuild import KEYS, MODULES, NETWORKS

__all__ = ['KEYS', 'NETWORKS', 'check_truncation', 'fate_of_download', 'find_network', 'load_bytes',
           'load_network', 'load_network_pkl', 'local_path', 'network_path', 'read_file']
HUB = 'hf://'  # of names on the Hugging Face Hub
# Files of a run with networks, the last being preferred among those of the same images.
SNAPSHOT_NAMES = (
    ('training-state-', '.pt'), ('network-snapshot-', '.safetensors'), ('network-snapshot-', '.pkl'))
NETWORK_FOLDER = Path(__file__).resolve().parent


def find_network(name_or_path: str) -> str:
    """The path of the bundled network ('emoji32'); anything else is returned unchanged."""
    return find_bundled(name_or_path, NETWORK_FOLDER, ('.safetensors',))


def load_network(
    path_or_url: str, *, trust_pickle: bool = False, force_fp16: bool = False, only: Collection[str] = KEYS,
) -> dnnlib.EasyDict:
    """Contents of a network file or URL: G, D, G_ema, training_set_kwargs, augment_pipe; None where missing.

    The file: a pickle (official, own, or TensorFlow), .safetensors, a training state, a module of torch.save,
    or a rosinality checkpoint; of a folder, the newest snapshot; emoji32, the bundled one; of the Hugging
    Face Hub, as hf://user/repo[@revision][/file]. Networks are on the CPU, in eval mode, without gradients.
    Nothing in the file is executed unless trust_pickle, which is for files of your own or from a source that
    you trust, and refused for the Hub.
    force_fp16: build G, D and G_ema with num_fp16_res=4 and conv_clamp=256.  only: build just these keys.
    Raises UserError naming the file if it is missing, is no network file, or asks for anything else.
    """
    path_or_url = network_path(str(path_or_url))
    if trust_pickle and path_or_url.startswith(HUB):
        raise UserError(f'{path_or_url}: --trust-pickle is for files of your own; nothing of the Hub is '
                        'executed')
    data, local = read_file(path_or_url)
    try:
        return load_bytes(data, path_or_url, trust_pickle=trust_pickle, force_fp16=force_fp16, only=only)
    except UserError as error:
        fate = fate_of_download(path_or_url, local, data)
        if fate is None:
            raise
        raise UserError(f'{error}; {fate}') from error


def network_path(path_or_url: str) -> str:
    """The file or URL to open: in place of a folder, such as that of a run, its newest snapshot; in
    place of emoji32 the bundled network.

    Raises UserError if the folder has none.
    """
    if not os.path.isdir(path_or_url):
        return find_network(path_or_url)
    from training.report.ticks import nimg_of_name
    found = [(number, kind, path) for path in Path(path_or_url).iterdir() if path.is_file()
             for kind, (prefix, suffix) in enumerate(SNAPSHOT_NAMES) if path.suffix == suffix
             for number in [nimg_of_name(path.name, f'^{prefix}')] if number is not None]
    if found:
        return str(max(found)[-1])
    runs = sorted(path.name for path in Path(path_or_url).iterdir()
                  if (path / 'training_options.json').is_file())
    hint = f'; it holds runs, such as {runs[-1]}: give the folder of one of them' if runs else ''
    raise UserError(f'{path_or_url}: a folder without network-snapshot-*.pkl or training-state-*.pt{hint}')


def read_file(path_or_url: str) -> tuple[bytes, str]:
    """(the content of a path, URL or hf:// name, its local path). Raises UserError."""
    local = local_path(path_or_url)
    with dnnlib.util.open_url(local) as file:
        return file.read(), local


def local_path(path_or_url: str) -> str:
    """The local path of a path, URL or hf:// name, downloaded if necessary. Raises UserError."""
    if path_or_url.startswith(HUB):
        from training.formats import hub
        return hub.fetch(path_or_url)
    return dnnlib.util.open_url(path_or_url, return_filename=True)


def fate_of_download(path_or_url: str, local: str, data: bytes) -> str | None:
    """What becomes of a download that could not be loaded; None if it is the user's own file.

    It is deleted from the cache unless it is a network, of a kind that is not supported.
    """
    from training.formats import inspection
    if '://' not in path_or_url or path_or_url.startswith(('file://', HUB)):
        return None
    if inspection.looks_like_network(data):
        return f'the download is kept as {local}'
    Path(local).unlink(missing_ok=True)
    return f'the download, {local}, has been deleted'


def load_network_pkl(f: BinaryIO, force_fp16: bool = False) -> dnnlib.EasyDict:
    """Like load_network, from an open binary file; nothing in it is executed."""
    return load_bytes(f.read(), str(getattr(f, 'name', 'network pickle')), force_fp16=force_fp16)


def load_bytes(
    data: bytes, name: str, *, trust_pickle: bool = False, force_fp16: bool = False,
    only: Collection[str] = KEYS,
) -> dnnlib.EasyDict:
    """Like load_network, from the bytes of a file.  name: what error messages call it."""
    # Imported late: scripts import this module, and few of them read every kind of file.
    from training.formats import kinds, pickled

    problem = kinds.foreign(data)
    if problem is not None:
        raise UserError(f'{name}: {problem}')
    if trust_pickle and force_fp16:
        raise UserError('--trust-pickle cannot be combined with a change to fp16: the file brings its own '
                        'classes')
    if trust_pickle and _has_code(data, name):
        return pickled.load_by_execution(data, name)
    recipes, training_set_kwargs = _recipes(data, name)
    # Recipes are inert: from here on only our own classes are constructed.
    found = dnnlib.EasyDict(dict.fromkeys(KEYS))
    for key in MODULES:
        if key in recipes and key in only:
            found[key] = recipes[key].build(force_fp16 and key in NETWORKS)
    if isinstance(training_set_kwargs, dict):
        found.training_set_kwargs = training_set_kwargs
    return found


def _recipes(data: bytes, name: str) -> tuple[Mapping[str, Any], Any]:
    """(key -> what builds that network, training_set_kwargs) of a file of any kind."""
    from torch_utils.pickles import torch_file
    from training.formats import pickled, rosinality, safetensors_file, states

    if safetensors_file.is_safetensors(data):
        return safetensors_file.read(data, name)
    if not torch_file.is_torch_file(data):
        return pickled.read(data, name)
    held = torch_file.load(data, name)
    if states.is_state(held):
        return states.read(held, name)
    return pickled.contents(name, held) if pickled.has_modules(held) else (rosinality.read(held, name), None)


def _has_code(data: bytes, name: str) -> bool:
    """Whether a file can be unpickled and contains more than tensors."""
    from torch_utils.pickles import torch_file
    from training.formats import kinds, pickled

    kind = kinds.kind_of(data)
    if kind != 'torch checkpoint':
        return kind == 'pickle'
    try:
        return pickled.has_modules(torch_file.load(data, name))
    except UserError:
        return True


def check_truncation(G: torch.nn.Module, psi: float, option: str) -> None:
    """Raise UserError, naming the option, unless psi is finite, and 1 if the network has no average w."""
    if not math.isfinite(psi):
        raise UserError(f'{option}={psi}: must be a finite number')
    if psi != 1 and G.mapping.w_avg_beta is None:
        raise UserError(f'{option}={psi:g}: this network has no w_avg; only --trunc=1 works')
