# SPDX-License-Identifier: Apache-2.0
"""A network of a class that nobody knows; alone in a module, because its source is pickled with it."""
import torch

from torch_utils import persistence


@persistence.persistent_class
class Impostor(torch.nn.Module):
    """A class that nobody knows."""
