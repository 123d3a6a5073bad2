# SPDX-License-Identifier: Apache-2.0
"""Every kernel that is built ahead of time compiles for all architectures, the hot ones without spilling."""
import re
import shutil
import subprocess
from unittest import mock

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import modulated_conv2d, upfirdn2d, variants
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.pixel_product import image_layer
from torch_utils.ops.scaled_cast import scaled_cast
from training import networks
from training.networks import DiscriminatorBlock

ARCHITECTURES = ['sm_75', 'sm_80', 'sm_90', 'sm_120']
ALL = variants.all_variants()
# All entry points of a file are compiled with the macros of one; the hot ones come first and stay.
COMPILED = {(kernel.source, kernel.defines): kernel for kernel in reversed(ALL)}
HOT_OF_EACH = list({kernel.entry: kernel for kernel in variants.HOT}.values())
NVCC = shutil.which('nvcc')
MAX_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor
WITH_ANOTHER_IMAGE = 168  # three of 128


def check_nvrtc(kernel, arch):
    """Compile; a hot kernel must not spill."""
    reports = []
    try:
        code = custom_ops.compile_cubin(kernel, arch, report=reports.append)
    except ValueError as error:  # UserError: no compiler here
        pytest.skip(str(error))
    assert code[:4] == b'\x7fELF'
    for each in ALL:
        if (each.source, each.defines) == (kernel.source, kernel.defines):
            assert each.entry.encode() + b'\0' in code, f'{each} is not in the code for {arch}'
    check_resources(kernel, arch, reports[0])


def test_what_is_compiled_for_a_hot_variant_is_checked_as_hot():
    assert all(COMPILED[kernel.source, kernel.defines] in variants.HOT for kernel in variants.HOT)


def check_resources(kernel, arch, report):
    """Read what ptxas says of every entry point of the kernel's file."""
    spilled = [int(n) for n in re.findall(r'(\d+) bytes spill', report)]
    used = [int(n) for n in re.findall(r'Used (\d+) registers', report)]
    assert spilled and used, f'{kernel}: no figures in {report!r}'
    if kernel in variants.HOT:
        reads_two = kernel.entry == 'upfirdn2d_pixel' and {'ADDEND', 'GRADIENT'} & dict(kernel.defines).keys()
        limit = WITH_ANOTHER_IMAGE if reads_two else MAX_REGISTERS
        assert not any(spilled) and max(used) <= limit, f'{kernel} for {arch}: {report}'


def test_each_variant_is_listed_once_and_hot_ones_belong_to_them():
    assert len(set(ALL)) == len(ALL) and set(variants.HOT) <= set(ALL)
    assert all(kernel.defines == tuple(sorted(kernel.defines)) for kernel in ALL)
    assert all((custom_ops.SOURCE_FOLDER / kernel.source).is_file() for kernel in ALL)


# In portions, which several workers can share.
@pytest.mark.parametrize('part', range(4))
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_every_variant_compiles_and_the_hot_ones_do_not_spill(arch, part):
    for kernel in list(COMPILED.values())[part::4]:
        check_nvrtc(kernel, arch)


@pytest.mark.skipif(NVCC is None, reason='there is no nvcc')
@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('kernel', HOT_OF_EACH, ids=lambda kernel: kernel.entry)
def test_nvcc_makes_the_same_of_a_hot_kernel_of_each_entry_point(kernel, arch, tmp_path):
    defines = [f'-D{name}={value}' for name, value in kernel.defines]
    command = [NVCC, '-std=c++17', f'-arch={arch}', '-cubin', '--resource-usage', *defines,
               '-o', str(tmp_path / 'kernel.cubin'), str(custom_ops.SOURCE_FOLDER / kernel.source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    check_resources(kernel, arch, result.stderr + result.stdout)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('up, is_scaled', [(1, False), (2, False), (2, True)])
def test_a_layer_of_the_presets_asks_for_listed_kernels_only(dtype, layout, up, is_scaled, emulated):
    x = torch.randn(2, 8, 16, 16).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight, styles = torch.randn(16, 8, 3, 3, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    layer = modulated_conv2d.Epilogue('lrelu', 0.2, 1.4, 256.0)
    modulation = modulated_conv2d.modulate(weight, styles, dtype)
    next_scale = torch.randn(2, 16).to(dtype).requires_grad_() if is_scaled else None
    y = modulated_conv2d.finished_convolution(
        x, modulation, torch.randn(2, 1, 16 * up, 16 * up), torch.zeros(16), layer, next_scale, f=f, up=up,
        padding=1, flip_weight=up == 1)
    b = torch.zeros(16, dtype=dtype, requires_grad=True)
    small = bias_act(upfirdn2d.downsample2d(y, f), b, act='lrelu')
    cast = scaled_cast(weight, 0.1, torch.bfloat16)
    torch.autograd.grad(small.float().sum() + cast.sum(), [x, weight, styles, b])
    missing = [str(kernel) for kernel in set(emulated) if kernel not in ALL]
    assert not missing, '\n'.join(missing)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_a_block_of_a_discriminator_asks_for_listed_kernels_only(dtype, layout, emulated):
    block = DiscriminatorBlock(
        16, 16, 32, 16, 3, 0, conv_clamp=256, use_fp16=dtype == torch.float16,
        fp16_channels_last=layout is torch.channels_last)
    x = torch.randn(2, 16, 16, 16).to(dtype).contiguous(memory_format=layout).requires_grad_()
    with mock.patch.object(networks, '_compute_format', lambda *_: (dtype, layout)):
        y, _ = block(x, None)
    torch.autograd.grad(y.float().sum(), [x, *block.parameters()])
    used = set(emulated)
    missing = [str(kernel) for kernel in used if kernel not in ALL]
    assert not missing, '\n'.join(missing)
    macros = {name for kernel in used for name, _ in kernel.defines}
    fused = {'PRELUDE', 'GRADIENT'} if layout is torch.channels_last else set()
    assert macros & {'PRELUDE', 'GRADIENT'} == fused and 'INPUT' in macros


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('image_channels, channels', [(3, 32), (3, 512), (1, 64)])
def test_the_layers_of_the_presets_at_images_ask_for_listed_kernels_only(
        dtype, image_channels, channels, emulated):
    image = torch.randn(2, image_channels, 9, 8).to(dtype, memory_format=torch.channels_last).requires_grad_()
    weight, b = torch.randn(channels, image_channels, 1, 1), torch.randn(channels)
    x = image_layer(
        image, weight.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), 'lrelu', 1.4, 256.0)
    y = modulated_conv2d.modulated_product(
        x, torch.randn(image_channels, channels, 1, 1), torch.randn(2, channels, requires_grad=True),
        torch.zeros(image_channels), 256.0)
    (dx,) = torch.autograd.grad(y.float().sum(), image, create_graph=True)
    dx.float().sum().backward()
    missing = [str(kernel) for kernel in set(emulated) if kernel not in ALL]
    assert not missing, '\n'.join(missing)
