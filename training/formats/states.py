# SPDX-License-Identifier: Apache-2.0
"""The networks inside a training state, training-state-*.pt."""
import re
from collections.abc import Mapping
from typing import Any

from dnnlib.util import UserError
from torch_utils.pickles.describe import explained
from torch_utils.pickles.tensors import StoredTensor, make_tensors
from training.config import TrainConfig
from training.formats.rebuild import NETWORKS, Recipe, shown
from training.systems.table import SYSTEMS

PARTS = ('config', 'run', 'loop', 'extra')
FIRST_LAYER_OF_D = re.compile(r'b\d+\.fromrgb\.weight|conv1\.weight')
LABEL_LAYER = 'mapping.embed.weight'


def is_state(held: Any) -> bool:
    """Whether this result of torch_file.load() has the parts of a training state."""
    return isinstance(held, dict) and set(PARTS) <= set(held)


def read(held: Mapping[str, Any], name: str) -> tuple[dict[str, Recipe], Any]:
    """(key -> recipe of that network, training_set_kwargs). Raises UserError if parts are missing."""
    tensors = {key: _tensors(f'{name}: {key}', held['run'], key) for key in NETWORKS}
    first = next((t for key, t in tensors['D'].items() if FIRST_LAYER_OF_D.fullmatch(key)), None)
    if first is None or len(first.shape) < 2:
        raise UserError(f'{name}: its discriminator has no first layer; the training state is damaged')
    labels = tensors['G'].get(LABEL_LAYER)
    config = _config(name, held['config'])
    shape = {'c_dim': 0 if labels is None else labels.shape[-1], 'img_resolution': config.data.resolution,
             'img_channels': first.shape[1]}
    system = SYSTEMS[config.system]
    G, D = ((system.generator, config.G_kwargs()), (system.discriminator, config.D_kwargs()))
    recipes = {}
    for key, (cls, kwargs) in {'G': G, 'D': D, 'G_ema': G}.items():
        with explained(f'{name}: {key}'):
            recipes[key] = Recipe(
                f'{name}: {key}', cls.__name__, {**kwargs, **shape}, make_tensors(tensors[key]))
    return recipes, held['config'].get('training_set_kwargs')


def _config(name: str, options: Any) -> TrainConfig:
    try:
        return TrainConfig.from_options(options)
    except (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f'{name}: the options in this training state cannot be read ({shown(error)}); the '
                        'file is damaged') from error


def _tensors(name: str, run: Any, key: str) -> dict[str, StoredTensor]:
    held = run.get(key) if isinstance(run, dict) else None
    if not isinstance(held, dict) or not all(
            isinstance(k, str) and isinstance(t, StoredTensor) for k, t in held.items()):
        raise UserError(f'{name} is missing in this training state, or no network; the file is damaged')
    return held
