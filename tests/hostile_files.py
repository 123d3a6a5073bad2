# SPDX-License-Identifier: Apache-2.0
"""Small files that would cost much to read: each repeats what it holds once, or claims what it has not."""
import io
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import tensorflow_files
import torch

from training import networks

SET = b'cbuiltins\nset\n'
ORDERED = b'ccollections\nOrderedDict\n'
ARRAY = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR'
NUMBER_TYPE = b'cnumpy\ndtype\nX\x02\0\0\0u1\x85R'
LOAD = b'ctorch.storage\n_load_from_bytes\n'


def text(size):
    """A pickled text of `size` characters."""
    return b'X' + struct.pack('<I', size) + b'x' * size


def repeated_states(size=4 << 20, count=2000):
    """BUILD again and again with one text, each of which becomes bytes."""
    state = b'(K\x01J' + struct.pack('<i', size) + b'\x85' + NUMBER_TYPE + b'\x89h\x01tb'
    return b'\x80\x02' + text(size) + b'q\x010](' + (ARRAY + state) * count + b'e.'


def repeated_dicts(pairs=20_000, count=100_000, opcode=b'\x81'):
    """NEWOBJ or REDUCE of an OrderedDict with one list of pairs, again and again."""
    one = b'(X\x01\0\0\0aK\x01l'
    return (b'\x80\x02](' + one * pairs + b'eq\x01\x85q\x020' + ORDERED + b'q\x030]('
            + (b'h\x03h\x02' + opcode) * count + b'e.')


def repeated_storages(count=400_000):
    """The bytes of one storage, loaded again and again."""
    arguments = (argument for _, argument, _ in pickletools.genops(pickle.dumps(torch.zeros(1), protocol=4)))
    data = next(argument for argument in arguments if isinstance(argument, bytes))
    return (b'\x80\x02' + b'B' + struct.pack('<I', len(data)) + data + b'\x85q\x010' + LOAD + b'q\x020]('
            + b'h\x02h\x01R' * count + b'e.')


def repeated_array(size=1 << 20, layers=150):
    """A TensorFlow network of many large layers, all of them one array of two megabytes."""
    side = int(size ** 0.5)
    weight = np.zeros([side, side], np.float16)
    variables = [(f'mapping/Dense{i}/weight', weight) for i in range(layers)]
    sizes = {'latent_size': side, 'dlatent_size': side, 'mapping_layers': layers}
    static = {**tensorflow_files.G_STATIC, **sizes}
    network = tensorflow_files.network(static, variables)
    return tensorflow_files.tensorflow_pickle(network, network, network)


def overlapping_members(size=8 << 20, count=1000):
    """A checkpoint whose storages are all one member of the archive, under many names."""
    stream = io.BytesIO()
    torch.save({f't{i}': torch.zeros(size // 4 if i == 0 else 1) for i in range(count)}, stream)
    with zipfile.ZipFile(stream) as archive:
        main = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        named = archive.read(main).replace(b'K\x01t', b'J' + struct.pack('<i', size // 4) + b't')
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('archive/data.pkl', named)
        archive.writestr('archive/data/0', bytes(size))
        first = archive.getinfo('archive/data/0')
        for i in range(1, count):
            # Another name for the same place.
            twin = zipfile.ZipInfo(f'archive/data/{i}')
            for name in ('header_offset', 'file_size', 'compress_size', 'CRC', 'create_system'):
                setattr(twin, name, getattr(first, name))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    return out.getvalue()


def huge_claim(side=16384):
    """A complete generator of few numbers for images of side x side."""
    with torch.device('meta'):
        G = networks.Generator(
            z_dim=2, c_dim=0, w_dim=2, img_resolution=side, img_channels=3, mapping_kwargs={'num_layers': 1},
            synthesis_kwargs={'channel_base': side, 'channel_max': 1, 'use_noise': False})
    return G.to_empty(device='cpu')
