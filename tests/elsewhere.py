# SPDX-License-Identifier: Apache-2.0
"""A Python that has torch_utils and dnnlib, and nothing else of this project."""
import io
import os
import subprocess
import sys

import torch
from golden_cases import ROOT

HIDE = '''
import pickle, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('training', 'legacy', 'metrics'):
            raise ImportError(f'{name} is hidden')
sys.meta_path.insert(0, Hide())
import torch
'''
OPEN_ELSEWHERE = HIDE + '''
with open(sys.argv[1], 'rb') as file:
    snapshot = pickle.load(file)
images = snapshot['G_ema'](torch.zeros(2, snapshot['G_ema'].z_dim), None, noise_mode='const')
snapshot['augment_pipe'](images)
assert not any(name.partition('.')[0] == 'training' for name in sys.modules)
torch.save({'images': images, 'logits': snapshot['D'](images, None)}, sys.argv[2])
'''


def open_elsewhere(path, folder):
    """What a snapshot with networks of unlabelled images and augmentation computes there.

    images: of two zero latents.  logits: of these images.  folder: becomes that Python's only path.
    """
    for package in ('torch_utils', 'dnnlib'):
        (folder / package).symlink_to(ROOT / package)
    subprocess.run(
        [sys.executable, '-c', OPEN_ELSEWHERE, path, folder / 'out.pt'],
        cwd=folder, env={**os.environ, 'PYTHONPATH': str(folder)}, check=True)
    return torch.load(io.BytesIO((folder / 'out.pt').read_bytes()), weights_only=True)
