# SPDX-License-Identifier: Apache-2.0
"""--compile: networks as torch.compile makes them, for losses that are differentiated once.

Path lengths and R1 differentiate a gradient, which compiled code cannot; they run as ever.
"""
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from dnnlib.util import UserError
from torch_utils.kernels.nvrtc import first_line

# Noise from the generators that the other phases and --compile=0 use, so that the numbers are the same.
OPTIONS = {'fallback_random': True}


class CompiledNetwork:
    """Calls a network in its compiled form, made at the first call for each shape of pictures.

    options: further settings of torch.compile.
    """

    def __init__(self, module: torch.nn.Module, **options: Any):
        self.module = module
        self._compiled = torch.compile(module, dynamic=False, **({'options': OPTIONS} | options))

    def __call__(self, *args: Any) -> torch.Tensor:
        """module(*args). Raises UserError if it cannot be compiled here."""
        # Compiled code calls no hooks; whoever has set some, as an examination does, wants to see each layer.
        if self.module._forward_hooks:
            return self.module(*args)
        try:
            return self._compiled(*args)
        except TorchDynamoException as error:
            cause = getattr(error, 'inner_exception', error)  # what the compiler proper said
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from error
            raise UserError(f'--compile=1: torch.compile fails here ({first_line(cause)}); it needs a C++ '
                            'compiler, and Triton for a GPU. --compile=0 does without') from error


def compile_networks(loss: Any, **options: Any) -> None:
    """Let the losses that are differentiated once call compiled networks.

    loss: StyleGAN2Loss or DCGANLoss.  options: as CompiledNetwork.
    """
    loss.compiled = {
        name: CompiledNetwork(module, **options) for name, module in loss.differentiated_once().items()}
