# SPDX-License-Identifier: Apache-2.0
"""Copies by name."""
import contextlib


def params_and_buffers(module):
    """All tensors."""
    return list(module.parameters()) + list(module.buffers())


def named_params_and_buffers(module):
    """All tensors with their names."""
    return list(module.named_parameters()) + list(module.named_buffers())


def copy_params_and_buffers(src_module, dst_module, require_all=False):
    """Copy the tensors of equal names."""
    src = dict(named_params_and_buffers(src_module))
    for name, tensor in named_params_and_buffers(dst_module):
        assert name in src or not require_all, name
        if name in src:
            tensor.copy_(src[name].detach()).requires_grad_(tensor.requires_grad)


def assert_shape(tensor, ref_shape):
    """Compare shapes; None matches all."""
    assert tensor.ndim == len(ref_shape)
    assert all(a in (None, b) for a, b in zip(ref_shape, tensor.shape, strict=True))


def profiled_function(fn):
    """The function."""
    return fn


suppress_tracer_warnings = contextlib.nullcontext
