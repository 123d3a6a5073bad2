# SPDX-License-Identifier: Apache-2.0
"""The most that a device does: bytes of a copy, matrix products, convolutions, by datatype.

python benchmarks/ceilings.py --device=cuda --json=ceilings.json
"""
import statistics
import time

import click
import common
import torch
import torch.nn.functional as F

from dnnlib.cli import run_command
from torch_utils.misc import pick_device, set_gpu_arithmetic

SECONDS, MIN_RUNS = 0.05, 3  # of each measurement
COPY_BYTES = {'cuda': 2 ** 31, 'cpu': 2 ** 27}
PRODUCT_SIDE = {'cuda': 8192, 'cpu': 512}
# Batch, channels, side of 3x3 convolutions: levels of --cfg=auto at 256x256, batch 16.
CONVOLUTIONS = {'cuda': ((16, 64, 256), (16, 128, 128), (16, 256, 64), (16, 512, 32), (16, 512, 16)),
                'cpu': ((2, 32, 32),)}
PEAK_SHAPES = ((16, 64, 32), (1, 512, 32))  # of which a CPU convolves the fastest
# (name, dtype, whether NHWC)
KINDS = {'cuda': (('fp16', torch.float16, True), ('tf32', torch.float32, True),
                  ('fp32', torch.float32, False)),
         'cpu': (('fp32', torch.float32, True),)}


def seconds(run, device):
    """Median time of a run, after two to warm up."""
    for _ in range(2):
        run()
    common.synchronize(device)
    times, start = [], time.perf_counter()
    while len(times) < MIN_RUNS or time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        run()
        common.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_row(device):
    """Bytes read and written per second."""
    source = torch.randint(256, [COPY_BYTES[device.type]], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sec = seconds(lambda: target.copy_(source), device)
    return {'what': 'copy', 'ms': 1e3 * sec, 'per_sec': 2 * len(source) / sec / 1e12, 'unit': 'TB/s'}


def product_row(name, dtype, device):
    """A square matrix product on random numbers."""
    side = PRODUCT_SIDE[device.type]
    a, b = (torch.randn([side, side], device=device).to(dtype) for _ in range(2))
    sec = seconds(lambda: a @ b, device)
    rate = 2 * side ** 3 / sec / 1e12
    return {'what': f'product {name}', 'ms': 1e3 * sec, 'per_sec': rate, 'unit': 'TFLOP/s'}


def convolution_rows(name, dtype, is_nhwc, shape, device):
    """A 3x3 convolution, and the gradients of its input and weight."""
    n, channels, side = shape
    layout = torch.channels_last if is_nhwc else torch.contiguous_format
    x = torch.randn([n, channels, side, side], device=device).to(dtype=dtype, memory_format=layout)
    w = torch.randn([channels, channels, 3, 3], device=device).to(dtype=dtype, memory_format=layout)
    y = F.conv2d(x, w, padding=1)
    flop = 2 * 9 * n * channels ** 2 * side ** 2

    def grad(mask):
        return lambda: torch.ops.aten.convolution_backward(
            y, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)  # noqa: FBT003 (torch's signature)

    parts = {'fprop': lambda: F.conv2d(x, w, padding=1), 'dgrad': grad([True, False, False]),
             'wgrad': grad([False, True, False])}
    for part, run in parts.items():
        sec = seconds(run, device)
        yield {'what': f'{part} {name} {"nhwc" if is_nhwc else "nchw"} {n}x{channels}x{side}x{side}',
               'ms': 1e3 * sec, 'per_sec': flop / sec / 1e12, 'unit': 'TFLOP/s'}


def convolution_peak(device):
    """The most FLOP/s of a float32 convolution or one of its gradients; None on a GPU, which has several."""
    if device.type != 'cpu':
        return None
    rows = [row for shape in PEAK_SHAPES for row in convolution_rows(*KINDS['cpu'][0], shape, device)]
    return max(row['per_sec'] for row in rows) * 1e12


def measure(device):
    """All rows."""
    yield copy_row(device)
    products = set()
    for name, dtype, is_nhwc in KINDS[device.type]:
        set_gpu_arithmetic(cudnn_benchmark=True, allow_tf32=name == 'tf32')
        if name not in products:
            products.add(name)
            yield product_row(name, dtype, device)
        # In float32 proper only the low levels compute.
        for shape in CONVOLUTIONS[device.type][0 if name == 'fp16' else -2:]:
            yield from convolution_rows(name, dtype, is_nhwc, shape, device)


@click.command(context_settings={'show_default': True})
@click.option('--device', default='auto', type=click.Choice(['auto', 'cuda', 'cpu']))
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def main(device, json_path):
    """Print what a device does at most."""
    device = pick_device(device)
    rows = []
    for row in measure(device):
        rows.append(row)
        common.write_json(json_path, device, rows)  # whoever stops it keeps what there is
    common.print_table(rows)


if __name__ == '__main__':
    run_command(main)
