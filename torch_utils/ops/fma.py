# SPDX-License-Identifier: Apache-2.0
"""Fused multiply-add with broadcasting."""
import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c, broadcast against one another; gradients are summed back to each shape, to any order."""
    return torch.addcmul(c, a, b)
