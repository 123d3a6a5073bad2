# SPDX-License-Identifier: Apache-2.0
"""On a GPU: that kernels are what runs, and that they count past 2^31 elements. The contract and the recorded
calls run there as well, by the fixture `device`.
"""
import pytest
import torch
from contract.samples import SAMPLES
from contract.test_op_contract import results

from torch_utils import custom_ops
from torch_utils.ops import bias_act, epilogue, upfirdn2d

pytestmark = pytest.mark.gpu
CUDA = torch.device('cuda')
LARGE = (2 ** 31 // (64 * 1024 * 1024) + 1, 64, 1024, 1024)  # a little more than 2^31 elements


@pytest.fixture
def native():
    if not custom_ops.is_available(CUDA):
        pytest.skip('kernels cannot be compiled here')


def need_memory(tensors):
    wanted = tensors * 2 * torch.Size(LARGE).numel()
    if torch.cuda.mem_get_info()[0] < wanted * 1.1:
        pytest.skip(f'needs {wanted / 2 ** 30:.0f} GiB of free GPU memory')


@pytest.mark.parametrize('sample', [pytest.param(s, id=s.name) for s in SAMPLES])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_kernels_agree_with_references_on_the_same_device(native, sample, dtype):
    args = sample.make(dtype, CUDA)
    if sample.op.native is None or not sample.has_kernel:
        pytest.skip('has no kernel')
    value = sample.op.native(*args)
    if value is None:
        pytest.skip('the kernel leaves this to the reference')
    for actual, expected in zip(results(value), results(sample.op.reference(*args)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_more_elements_than_an_int_can_count(native, layout):
    need_memory(3)
    x = torch.ones(LARGE, dtype=torch.float16, device=CUDA).contiguous(memory_format=layout)
    x[-1, -1, -1, -1] = 3
    b = torch.full([64], 0.5, dtype=torch.float16, device=CUDA)
    y = bias_act.bias_act(x, b, act='lrelu', gain=2.0)
    assert y[-1, -1, -1, -1] == 7 and y[0, 0, 0, 0] == 3 and y[-1, -1, -1, -2] == 3
    del y
    y = upfirdn2d.upfirdn2d(x, torch.ones(2, 2, device=CUDA), padding=[0, 1, 0, 1])
    assert y[-1, -1, -1, -1] == 3 and y[-1, -1, -2, -2] == 6 and y[0, 0, 0, 0] == 4
    del y
    d = torch.full(LARGE[:2], 2.0, dtype=torch.float16, device=CUDA)
    y = epilogue.epilogue(x, d, None, b, 'lrelu', 0.2, 1.0, -1.0)
    assert y[-1, -1, -1, -1] == 6.5 and y[-1, -1, -1, -2] == 2.5
