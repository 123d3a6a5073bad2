# SPDX-License-Identifier: Apache-2.0
"""--cuda-graphs for generators: repeated calls are replayed as captured CUDA graphs."""
import itertools
from collections.abc import Callable
from typing import Any

import torch

from dnnlib.progress import write
from torch_utils.cuda_graphs import Backend, Captures, CudaBackend, GraphedFunction


class GraphedNetwork:
    """Calls a network, through a CUDA graph once a kind of call repeats; the results are identical.

    warn(line): called once if a capture fails; from then on the network runs eagerly.
    """

    def __init__(self, module: torch.nn.Module, backend: Backend, warn: Callable[[str], object] = write):
        self.module, self._backend = module, backend
        self._run = GraphedFunction(self._call, Captures(backend, warn))

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        """module(*args, **options), where args are tensors or hashable, and options hashable."""
        if torch.is_grad_enabled():
            return self.module(*args, **options)
        # A graph reads weights and buffers at fixed addresses; other tensors are another kind of call.
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        places = tuple(tensor.data_ptr() for tensor in tensors)
        state = self._backend.get_state()
        try:
            return self._run((places, tuple(sorted(options.items()))), *args)
        except torch.OutOfMemoryError as error:
            if self._run.num_graphs == 0:
                raise
            # Free the memory pools of the graphs, then try again.
            self._run.captures.give_up(error)
            self._backend.set_state(state)
        return self._run((places, tuple(sorted(options.items()))), *args)

    def _call(self, kind: tuple, *args: Any) -> torch.Tensor:
        return self.module(*args, **dict(kind[1]))


def by_graphs(module: torch.nn.Module, device: torch.device, cuda_graphs: str) -> Callable[..., torch.Tensor]:
    """The network, on a GPU through CUDA graphs unless cuda_graphs is 'off'.

    module: already on the device, in eval mode.
    """
    if device.type != 'cuda' or cuda_graphs == 'off':
        return module
    return GraphedNetwork(module, CudaBackend(device))
