# SPDX-License-Identifier: Apache-2.0
"""Machine code of the hot kernels in NHWC and 16 bits, for the H100 and without one: 128-bit access, no local
memory, and few enough instructions an element that memory, not arithmetic, is the limit.

An H100 moves 3.3 TB/s and issues 29e12 instructions a thread a second: 35 for every 4 bytes.
"""
import pytest
import sass
import torch

from torch_utils.kernels import nvrtc
from torch_utils.ops import bias_act_cuda, epilogue_cuda, pixel_product_cuda, upfirdn2d_cuda, variants

ARCH, VEC = 'sm_90', 8
ROWS = 32  # that a thread walks down
UNITS = upfirdn2d_cuda.PIXEL_STRIPS[0]
PLAIN, DOWN, UP, UP_SHIFTED = variants._layer_geometries()
EPILOGUE = (*variants.EPILOGUE, ('NOISE', 1))
every_dtype = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])


@pytest.fixture
def code_of(tmp_path):
    """The disassembled code of a kernel that keeps to registers and moves elements by whole vectors."""
    if sass.find_nvdisasm() is None or nvrtc.problem():
        pytest.skip('reading machine code needs NVRTC and nvdisasm (pip install nvidia-cuda-nvdisasm)')

    def make(kernel, stores_vectors=True):
        code = sass.Code(kernel, ARCH, tmp_path)
        assert not code.opcodes('LDL', 'STL'), f'{kernel} keeps variables in local memory'
        narrow = code.opcodes('STG.E.U16', 'STG.E.64')
        assert not (stores_vectors and narrow), f'{kernel} stores less than 128 bits'
        return code
    return make


@every_dtype
@pytest.mark.parametrize('geometry, epilogue, budget', [
    pytest.param(PLAIN, (), 19, id='plain'), pytest.param(PLAIN, EPILOGUE, 28, id='epilogue'),
    pytest.param(PLAIN, variants.PRELUDE, 34, id='prelude'),
    pytest.param(PLAIN, variants.OF_ACTIVATION, 21, id='of_activation'),
    pytest.param(PLAIN, variants.OF_SCALING, 21, id='of_scaling'),
    pytest.param(UP, variants.ADDEND, 15, id='addend'), pytest.param(DOWN, (), 30, id='down'),
    pytest.param(UP, (), 12, id='up'),
    pytest.param(UP_SHIFTED, (), 12, id='up_shifted')])
def test_filters_with_all_that_a_thread_does_for_a_strip(dtype, geometry, epilogue, budget, code_of):
    kernel = upfirdn2d_cuda.pixel_kernel(dtype, geometry, VEC, epilogue)
    across = upfirdn2d_cuda.pixel_across(dtype, geometry, VEC)
    (wide, _), outputs = geometry.unit, UNITS * geometry.unit[1]
    rows, columns = geometry.span(outputs, 1), geometry.span(across * wide, 0)
    stores = outputs * across * wide
    used = code_of(kernel).shortest(rows * columns, stores)
    assert used <= budget * stores * VEC, f'{used / stores / VEC:.1f} instructions an output'


@every_dtype
@pytest.mark.parametrize('act', ['linear', 'lrelu'])
@pytest.mark.parametrize('entry, loads, budget', [('epilogue', 1, 15), ('epilogue_grad', 3, 20)])
def test_the_epilogue_and_its_gradient(dtype, act, entry, loads, budget, code_of):
    # The shortest path of the gradient is that without optional parts: noise sums, and the slope of y.
    is_full = act == 'lrelu' and entry == 'epilogue'
    kernel = epilogue_cuda.epilogue_kernel(entry, dtype, True, VEC, act, is_full, is_full)
    used = code_of(kernel).shortest(loads * ROWS, ROWS)
    assert used <= budget * ROWS * VEC, f'{used / ROWS / VEC:.1f} instructions an element'


@every_dtype
@pytest.mark.parametrize('entry, act, loads, budget', [
    ('few_to_many', 'lrelu', 0, 14), ('few_to_many', None, 0, 9), ('few_by_many', None, 1, 5),
    ('few_to_many_grad', 'lrelu', 2, 22), ('many_to_few', 'linear', 1, 10)])
def test_layers_from_and_to_images(dtype, entry, act, loads, budget, code_of):
    # The shortest path of the gradient is that without dx.
    stores = ROWS if entry == 'few_to_many' else 0
    kernel = pixel_product_cuda.product_kernel(entry, dtype, VEC, 3, act)
    used = code_of(kernel, entry == 'few_to_many').shortest(loads * ROWS, stores)
    assert used <= budget * ROWS * VEC, f'{used / ROWS / VEC:.1f} instructions an element'


@every_dtype
@pytest.mark.parametrize('entry, bias', [
    ('bias_act', bias_act_cuda.BIAS_ALONG_VECTOR), ('bias_act_grad', bias_act_cuda.NO_BIAS)])
def test_bias_and_activation(dtype, entry, bias, code_of):
    kernel = bias_act_cuda.bias_act_kernel(entry, dtype, 'lrelu', VEC, bias)
    used = code_of(kernel).shortest(2, 1)
    assert used <= 18 * VEC, f'{used / VEC:.1f} instructions an element'
