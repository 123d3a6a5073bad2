# SPDX-License-Identifier: Apache-2.0
"""All kernels that training and generation with the presets can use, to be built ahead of time.

Other settings (another filter, more taps, odd numbers of channels) compile theirs at first use.
"""
import itertools
from collections.abc import Iterator

import torch

from torch_utils.custom_ops import Kernel
from torch_utils.ops import (
    bias_act_cuda,
    epilogue_cuda,
    native,
    pixel_product_cuda,
    upfirdn2d_cuda,
    warp_cuda,
)
from torch_utils.ops.scaled_cast import scaled_cast_kernel
from torch_utils.ops.upfirdn2d_cuda import Geometry

LAYERS = [torch.float32, torch.float16, torch.bfloat16]  # element types of network layers
LAYER_TAPS, IMAGE_TAPS = 4, 12  # of the networks' resampling filter [1, 3, 3, 1] and of the augmentation's
PHASES = [(0, 0), (1, 1)]  # of up-sampling by 2, forward and as a gradient
MOST_CHANNELS = 512  # of a layer
ACTS = ['linear', 'lrelu']  # of the presets
IMAGE_VECTORS = [1, 2, 4]  # pixels or channels at once, where there are too few for 16 bytes
EPILOGUE = (('ACT', bias_act_cuda.ACT_NUMBERS['lrelu']), ('BIAS', 1), ('EPILOGUE', 1))

ADDEND = (('ADDEND', 1),)  # of gradients that come back to the input of a discriminator's block
# Of a discriminator's conv0, whose activation conv1's filter applies; and of up-sampling in the generator.
PRELUDE = (('ACT', bias_act_cuda.ACT_NUMBERS['lrelu']), ('PRELUDE', 1))
OF_ACTIVATION = (('ACT', bias_act_cuda.ACT_NUMBERS['lrelu']), ('BIAS', 1), ('GRADIENT', 1))
OF_SCALING = (('GRADIENT', 2),)


def all_variants() -> list[Kernel]:
    """Each kernel once, the hot ones first."""
    return list(dict.fromkeys([
        *HOT, *_bias_act(), *_filters(), *_epilogues(), *_weights(), *_casts(), *_warps(),
        *_image_layers()]))


def widest(dtype: torch.dtype) -> int:
    """Elements in one 16-byte access."""
    return native.VECTOR_BYTES // dtype.itemsize


def _layer_geometries() -> list[Geometry]:
    size, one, two = (LAYER_TAPS, LAYER_TAPS), (1, 1), (2, 2)
    return [Geometry(one, one, size, (0, 0)), Geometry(one, two, size, (0, 0)),
            *[Geometry(two, one, size, phase) for phase in PHASES]]


def _tiles(dtype: torch.dtype, geometry: Geometry, epilogue: tuple = ()) -> Iterator[Kernel]:
    for is_wide in (True, False):
        tile = upfirdn2d_cuda.tile_for(geometry, is_wide)
        yield upfirdn2d_cuda.tile_kernel(dtype, geometry, tile, epilogue)


def _filters() -> Iterator[Kernel]:
    for dtype, geometry in itertools.product(LAYERS, _layer_geometries()):
        yield from _tiles(dtype, geometry)
        yield upfirdn2d_cuda.pixel_kernel(dtype, geometry, widest(dtype))
    for dtype in LAYERS:
        yield from _tiles(dtype, _layer_geometries()[2], ADDEND)
        yield upfirdn2d_cuda.pixel_kernel(dtype, _layer_geometries()[2], widest(dtype), ADDEND)
        # Not hot: for Blackwell the path of filters that are no outer product spills.
        yield upfirdn2d_cuda.pixel_kernel(dtype, _layer_geometries()[0], widest(dtype), OF_SCALING)
    for phase, (up, down) in itertools.product(PHASES, [(2, 1), (1, 2)]):
        size = (IMAGE_TAPS, IMAGE_TAPS)
        phase = phase if up == 2 else (0, 0)
        yield from _tiles(torch.float32, Geometry((up, up), (down, down), size, phase, separable=True))
    for dtype, last in itertools.product(LAYERS, (False, True)):
        yield upfirdn2d_cuda.general_kernel(dtype, last)


def _hot_filters() -> Iterator[Kernel]:
    plain, down, up, _ = _layer_geometries()
    for dtype, noise, scaled in itertools.product(LAYERS, (1, 0), ((('NEXT', 1),), ())):
        epilogue = (*EPILOGUE, ('NOISE', noise), *scaled)
        yield from _tiles(dtype, plain, epilogue)
        yield upfirdn2d_cuda.pixel_kernel(dtype, plain, widest(dtype), epilogue)
    for dtype in LAYERS:
        yield upfirdn2d_cuda.pixel_kernel(dtype, up, widest(dtype), ADDEND)
        for fused in (PRELUDE, OF_ACTIVATION):
            yield upfirdn2d_cuda.pixel_kernel(dtype, plain, widest(dtype), fused)
    for dtype, geometry in itertools.product(LAYERS, (plain, down)):
        yield next(_tiles(dtype, geometry))
        yield upfirdn2d_cuda.pixel_kernel(dtype, geometry, widest(dtype))


def _bias_act() -> Iterator[Kernel]:
    modes = [bias_act_cuda.NO_BIAS, bias_act_cuda.BIAS_PER_VECTOR, bias_act_cuda.BIAS_ALONG_VECTOR]
    for dtype, act in itertools.product(LAYERS, ACTS):
        for vec in {*IMAGE_VECTORS, widest(dtype)}:
            yield bias_act_cuda.bias_act_kernel('bias_act_grad', dtype, act, vec)
            yield from (bias_act_cuda.bias_act_kernel('bias_act', dtype, act, vec, mode) for mode in modes)


def _epilogues() -> Iterator[Kernel]:
    for dtype, last in itertools.product(LAYERS, (False, True)):
        make = epilogue_cuda.epilogue_kernel
        for vec in {1, widest(dtype)}:  # images after a transposed convolution have odd sides
            yield make('epilogue', dtype, last, vec)
            yield make('epilogue_grad', dtype, last, vec)
        for noise in (True, False):
            yield make('epilogue', dtype, last, widest(dtype), 'lrelu', noise, bias=True)
        yield make('epilogue_grad', dtype, last, widest(dtype), 'lrelu')
    yield from map(epilogue_cuda.sums_kernel, LAYERS)


def _weights() -> Iterator[Kernel]:
    for taps in (1, 9):
        yield epilogue_cuda.weight_kernel('demodulation', torch.float32, torch.float32, taps)
        for out in LAYERS:
            yield epilogue_cuda.weight_kernel('modulated_weight', torch.float32, out, taps)
            if out != torch.float32:
                yield from (epilogue_cuda.weight_kernel('modulation', torch.float32, out, taps, last)
                            for last in (False, True))
            for d, last in itertools.product(dict.fromkeys([out, torch.float32]), (False, True)):
                yield epilogue_cuda.modulation_grad_kernel(torch.float32, out, d, taps, last)


def _casts() -> Iterator[Kernel]:
    for half in LAYERS[1:]:
        for vec in (widest(torch.float32), 1):
            yield scaled_cast_kernel(torch.float32, half, vec)
            yield scaled_cast_kernel(half, torch.float32, vec)


def _warps() -> Iterator[Kernel]:
    for entry, channels in itertools.product(('warp', 'warp_adjoint'), (3, 1, 4)):
        yield warp_cuda.warp_kernel(entry, torch.float32, channels)


def _image_layers() -> Iterator[Kernel]:
    """fromrgb and torgb, with 3 channels and 1."""
    make = pixel_product_cuda.product_kernel
    for dtype, few in itertools.product(LAYERS, (3, 1)):
        vec = widest(dtype)
        yield make('few_to_many', dtype, vec, few, 'lrelu')
        yield make('few_to_many_grad', dtype, vec, few, 'lrelu')
        yield make('few_to_many', dtype, vec, few)
        yield make('few_by_many', dtype, vec, few)
        for chunks in range(1, max(MOST_CHANNELS // (epilogue_cuda.WARP * vec), 1) + 1):
            yield make('many_to_few', dtype, vec, few, None, chunks)
            yield make('many_to_few', dtype, vec, few, 'linear', chunks)  # for the clamp


def _hot_elementwise() -> Iterator[Kernel]:
    for dtype, last in itertools.product(LAYERS, (False, True)):
        vec = widest(dtype)
        for entry in ('epilogue', 'epilogue_grad'):
            noise = entry == 'epilogue'
            yield epilogue_cuda.epilogue_kernel(entry, dtype, last, vec, 'lrelu', noise, noise)
            yield epilogue_cuda.epilogue_kernel(entry, dtype, last, vec)
        for of in ('NEXT', 'INPUT'):
            yield epilogue_cuda.epilogue_kernel('epilogue_grad', dtype, last, vec, 'lrelu', of=of)
        mode = bias_act_cuda.BIAS_ALONG_VECTOR if last else bias_act_cuda.BIAS_PER_VECTOR
        for has_addend in (False, True):
            yield bias_act_cuda.bias_act_kernel('bias_act', dtype, 'lrelu', vec, mode, has_addend)
        yield bias_act_cuda.bias_act_kernel('bias_act_grad', dtype, 'lrelu', vec)


def _hot_image_layers() -> Iterator[Kernel]:
    make = pixel_product_cuda.product_kernel
    for dtype in LAYERS:
        vec, few = widest(dtype), 3
        yield make('few_to_many', dtype, vec, few, 'lrelu')
        yield make('few_to_many', dtype, vec, few)
        yield make('many_to_few', dtype, vec, few, 'linear')


HOT = [*_hot_elementwise(), *_hot_filters(), *_hot_image_layers()]  # most of the time of a training step
