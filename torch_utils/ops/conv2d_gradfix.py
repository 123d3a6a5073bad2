# SPDX-License-Identifier: Apache-2.0
"""Convolutions under the names that code embedded in official pickles imports.

torch's own convolutions have gradients of every order, and autograd.grad(inputs=[x]) computes no weight
gradients, so there is nothing left to fix; `enabled` and no_weight_gradients() are kept for the callers that
set them.
"""
import contextlib
from collections.abc import Iterator

from torch.nn.functional import conv2d, conv_transpose2d

__all__ = ['conv2d', 'conv_transpose2d', 'enabled', 'no_weight_gradients']

enabled = False


@contextlib.contextmanager
def no_weight_gradients() -> Iterator[None]:
    """Has no effect: see above."""
    yield
