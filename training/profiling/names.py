# SPDX-License-Identifier: Apache-2.0
"""What the places in a profile are called: Gmain:synthesis.b32.conv1, or Part1:Real:D:Conv2 for DCGAN."""
import re
from collections.abc import Callable, Mapping

from training.profiling.trace import UNKNOWN, Kernel

Naming = Callable[[Kernel], str]
# The parts of a step as textbooks count them; by phase and pass.
PARTS = {('Dmain', 0): 'Part1:Real', ('Dmain', 1): 'Part1:Fake', ('Gmain', 0): 'Part2:Fake'}
STEPS = {'Dmain': 'Part1', 'Gmain': 'Part2'}
LAYERS = {'conv': 'Conv', 'bn': 'BN'}
FUNCTIONS = {'aten::relu': 'ReLU', 'aten::leaky_relu': 'LeakyReLU', 'aten::tanh': 'Tanh',
             'aten::contiguous': 'Layout', 'aten::flatten': 'Flatten', 'aten::to': 'Layout'}


def naming_of(system: str, own_network: Mapping[str, str]) -> Naming:
    """The way of naming that fits.  system: 'dcgan' has names of its own.

    own_network: phase -> name of the network that it trains, which is left out of the names of StyleGAN.
    """
    return textbook_name if system == 'dcgan' else lambda kernel: dotted_name(kernel, own_network)


def dotted_name(kernel: Kernel, own_network: Mapping[str, str]) -> str:
    """phase:path of the module, with the network before the path if the phase trains another one."""
    place = kernel.place
    is_own = place.network == own_network.get(kernel.phase)
    path = '.'.join(part for part in ('' if is_own else place.network, place.path) if part)
    # The whole of the own network has no path.
    return ':'.join(part for part in (kernel.phase, path or place.network) if part)


def textbook_name(kernel: Kernel) -> str:
    """Part1 trains D on a real and on a fake batch, Part2 trains G; layers bear their numbers.

    What a network computes between layers bears the number of the layer before.
    """
    place = kernel.place
    part = PARTS.get((kernel.phase, kernel.pass_index), STEPS.get(kernel.phase, kernel.phase))
    layer = (_layer(place.path) or _function(kernel)) if place.network else place.path
    return ':'.join(name for name in (part, place.network, layer) if name)


def is_named(kernel: Kernel) -> bool:
    """Whether a layer or another part of the step is known to be what the kernel is for."""
    return kernel.place.path != UNKNOWN


def _layer(path: str) -> str:
    """'Conv2' for synthesis.conv2; '' for what is no numbered layer."""
    found = re.fullmatch(r'([a-z]+)(\d+)', path.rpartition('.')[2])
    return LAYERS.get(found[1], found[1]) + found[2] if found else ''


def _function(kernel: Kernel) -> str:
    name = FUNCTIONS.get(kernel.place.op, kernel.place.op.rpartition('::')[2])
    number = re.search(r'\d+$', kernel.place.after)
    return name + (number[0] if number else '')
