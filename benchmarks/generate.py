# SPDX-License-Identifier: Apache-2.0
"""Time the generator alone: images per second for several batch sizes, fused or not.

python benchmarks/generate.py --cfg=auto --resolution=256 --device=cuda --batch=1,8
"""
import statistics
import time

import click
import common
import torch
from ceilings import convolution_peak
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.cli import run_command
from torch_utils.misc import keep_freed_memory, pick_device
from training.config import DatasetInfo, resolve
from training.networks import Generator
from training.sampling.graphs import by_graphs

SECONDS = 1.5  # of measurement a row


@torch.inference_mode()
def images_per_second(G, z, device, fused):
    """Median over batches, after some to warm up."""
    seconds = []
    start = time.perf_counter()
    while len(seconds) < 7 or time.perf_counter() - start < SECONDS:
        common.synchronize(device)
        begin = time.perf_counter()
        G(z, None, noise_mode='const', fused_modconv=fused)
        common.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return len(z) / statistics.median(seconds[4:])


@torch.inference_mode()
def flop_per_image(G, z, fused):
    """Of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        G(z, None, noise_mode='const', fused_modconv=fused)
    return counter.get_total_flops() / len(z)


@click.command(context_settings={'show_default': True})
@click.option('--cfg', default='auto', help='Preset of train.py.')
@click.option('--resolution', default=256, help='Side of the images.')
@click.option('--device', default='auto', type=click.Choice(['auto', 'cuda', 'cpu']))
@click.option('--precision', default='auto', help='auto, fp32, fp16 or bf16.')
@click.option('--batch', default='1,8,32', help='Batch sizes, separated by commas.')
@click.option('--json', 'json_path', type=click.Path(), help='Write the measurement here.')
def main(cfg, resolution, device, precision, batch, json_path):
    """Print images per second."""
    device = pick_device(device)
    keep_freed_memory(device)  # as generate.py does
    flags = {'outdir': 'unused', 'data': 'random', 'cfg': cfg, 'precision': precision}
    config = resolve(flags, DatasetInfo('random', 10000, resolution, resolution, 3)).for_device(device.type)
    torch.manual_seed(0)
    G = Generator(**config.G_kwargs(), c_dim=0, img_resolution=resolution, img_channels=3)
    G = G.eval().requires_grad_(requires_grad=False).to(device)
    variants, rows = [('default', G, None), ('fused', G, True), ('unfused', G, False)], []
    if device.type == 'cuda':
        variants.append(('graphs', by_graphs(G, device, 'auto'), None))
    peak = convolution_peak(device)
    for size in map(int, batch.split(',')):
        z = torch.randn([size, G.z_dim], device=device)
        for name, call, fused in variants:
            speed = images_per_second(call, z, device, fused)
            share = None if peak is None else round(speed * flop_per_image(G, z, fused) / peak, 4)
            rows.append({'cfg': cfg, 'resolution': resolution, 'variant': f'{name} x{size}',
                         'img_per_sec': speed, 'peak_share': share})
    common.write_json(json_path, device, rows)
    common.print_table(rows)


if __name__ == '__main__':
    run_command(main)
