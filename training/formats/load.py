# SPDX-License-Identifier: Apache-2.0
"""Opens network files of every kind, without running any code in them."""
import io
import math
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import torch

import dnnlib
from dnnlib.util import UserError, find_bundled
from training.formats import hub
from training.formats.rebuild import KEYS, MODULES, NETWORKS

__all__ = ['KEYS', 'NETWORKS', 'check_truncation', 'find_network', 'load_bytes', 'load_network',
           'load_network_pkl', 'read_network_file']
NETWORK_FOLDER = Path(__file__).resolve().parent


def find_network(name_or_path: str) -> str:
    """The path of the bundled network ('emoji32'); anything else is returned unchanged."""
    return find_bundled(name_or_path, NETWORK_FOLDER, ('.safetensors',))


def load_network(
    path_or_url: str, *, trust_pickle: bool = False, force_fp16: bool = False, only: Collection[str] = KEYS,
) -> dnnlib.EasyDict:
    """Contents of a network file or URL: G, D, G_ema, training_set_kwargs, augment_pipe; None where missing.

    The file: a pickle (official, own, or TensorFlow), .safetensors, or a rosinality checkpoint; also of the
    Hugging Face Hub, as hf://user/repo[@revision][/file]; or emoji32, the bundled one. Networks are on the
    CPU, in eval mode, without gradients. Nothing in the file is executed unless trust_pickle, which is for
    files of your own or from a source that you trust, and refused for the Hub.
    force_fp16: build G, D and G_ema with num_fp16_res=4 and conv_clamp=256.  only: build just these keys.
    Raises UserError naming the file if it is missing, is no network file, or asks for anything else.
    """
    name = str(path_or_url)
    if trust_pickle and hub.is_hub_name(name):
        raise UserError(f'{name}: --trust-pickle is for files of your own; nothing of the Hub is executed')
    return load_bytes(read_network_file(name), name, trust_pickle=trust_pickle, force_fp16=force_fp16,
                      only=only)


def read_network_file(name: str) -> bytes:
    """The bytes of a network file: name, path, URL, or hf://user/repo[@revision][/file]. Raises UserError."""
    path_or_url = hub.fetch(name) if hub.is_hub_name(name) else find_network(name)
    with dnnlib.util.open_url(path_or_url) as file:
        return file.read()


def load_network_pkl(f: BinaryIO, force_fp16: bool = False) -> dnnlib.EasyDict:
    """Like load_network, from an open binary file; nothing in it is executed."""
    return load_bytes(f.read(), str(getattr(f, 'name', 'network pickle')), force_fp16=force_fp16)


def load_bytes(
    data: bytes, name: str, *, trust_pickle: bool = False, force_fp16: bool = False,
    only: Collection[str] = KEYS,
) -> dnnlib.EasyDict:
    """Like load_network, from the bytes of a file.  name: what error messages call it."""
    # Imported late: scripts import this module, and few of them read every kind of file.
    from torch_utils.pickles import torch_file
    from training.formats import pickled, rosinality, safetensors_file

    training_set_kwargs = None
    if safetensors_file.is_safetensors(data):
        recipes, training_set_kwargs = safetensors_file.read(data, name)
    elif torch_file.is_torch_file(data):
        recipes = rosinality.read(data, name)
    elif trust_pickle:
        if force_fp16:
            raise UserError('--trust-pickle cannot be combined with a change to fp16: the file brings its '
                            'own classes')
        return pickled.load_by_execution(io.BytesIO(data), name)
    else:
        recipes, training_set_kwargs = pickled.read(data, name)
    # Recipes are inert: from here on only our own classes are constructed.
    found = dnnlib.EasyDict(dict.fromkeys(KEYS))
    for key in MODULES:
        if key in recipes and key in only:
            found[key] = recipes[key].build(force_fp16 and key in NETWORKS)
    if isinstance(training_set_kwargs, dict):
        found.training_set_kwargs = training_set_kwargs
    return found


def check_truncation(G: torch.nn.Module, psi: float, option: str) -> None:
    """Raise UserError, naming the option, unless psi is finite, and 1 if the network has no average w."""
    if not math.isfinite(psi):
        raise UserError(f'{option}={psi}: must be a finite number')
    if psi != 1 and G.mapping.w_avg_beta is None:
        raise UserError(f'{option}={psi:g}: this network has no w_avg; only --trunc=1 works')
