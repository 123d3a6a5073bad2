# SPDX-License-Identifier: Apache-2.0
"""The script behind the bundled dataset: halves images, keeps labels, repeatable to the byte."""
import json
import zipfile

import numpy as np
from dataset_cases import encode, make_image, write_zip

from scripts.make_emoji32 import CLASS_NAMES, main, shrink_dataset
from training.dataset import ImageFolderDataset


def test_shrinking_averages_and_is_repeatable(tmp_path):
    labels = {'labels': [[f'00000/img0000000{i}.png', i] for i in range(3)]}
    files = {name: encode(make_image(label, 64, 64)) for name, label in labels['labels']}
    source = write_zip(tmp_path / 'in.zip', files | {'dataset.json': labels})
    assert shrink_dataset(source, str(tmp_path / 'a.zip')) == 3
    shrink_dataset(source, str(tmp_path / 'b.zip'))
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()
    dataset = ImageFolderDataset(str(tmp_path / 'a.zip'), resolution=32, use_labels=True)
    mean = make_image(1, 64, 64).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(dataset[1][0] - mean).max() <= 1  # both passes of the filter round
    assert dataset.label_dim == 3
    with zipfile.ZipFile(tmp_path / 'a.zip') as archive:
        assert json.loads(archive.read('dataset.json')) == {**labels, 'class_names': list(CLASS_NAMES)}


def test_the_script_reports_mistakes(tmp_path, capsys):
    assert main(['--help']) == 2 and 'python -m scripts.make_emoji32' in capsys.readouterr().err
    assert main([]) == 2 and main([str(tmp_path / 'no.zip'), str(tmp_path / 'out.zip')]) == 2
    assert 'no.zip: no such folder or zip' in capsys.readouterr().err and not (tmp_path / 'out.zip').exists()
