# SPDX-License-Identifier: Apache-2.0
"""Feature networks: where they are found, what is refused, which images they see."""
import hashlib
import shutil

import pytest
import torch
from local_server import local_server
from metrics_stand_in import write_detectors

from dnnlib import download, util
from dnnlib.util import UserError
from metrics import detectors
from metrics.detectors import FILES, INCEPTION, DetectorMissingError, detector_path, load_detector, to_rgb

CPU = torch.device('cpu')


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """Puts the publisher's files into a folder, and the cache into another; lists what was fetched."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    folder, fetched = tmp_path / 'publisher', []

    def open_url(url, **_):
        fetched.append(url)
        path = folder / url.rpartition('/')[2]
        if not path.is_file():
            raise UserError(f'{url}: cannot be downloaded')
        return str(path)
    monkeypatch.setattr(util, 'open_url', open_url)
    return folder, fetched


def test_a_given_folder_comes_first_then_the_cache_then_the_publisher(publisher, tmp_path):
    folder, fetched = publisher
    write_detectors(folder)
    cached = detector_path(INCEPTION)
    assert cached == tmp_path / 'cache' / 'detectors' / INCEPTION and len(fetched) == 1
    assert detector_path(INCEPTION) == cached == detector_path(INCEPTION, str(tmp_path))
    assert len(fetched) == 1, 'the second and third time nothing'
    assert detector_path(INCEPTION, str(folder)) == folder / INCEPTION
    assert not list(cached.parent.glob('.*'))


def test_one_line_says_how_to_provide_what_cannot_be_had(publisher, tmp_path):
    (tmp_path / 'mine').mkdir()
    with pytest.raises(DetectorMissingError, match=r'vgg16\.pt is not in.*--offline-bundle=DIR') as caught:
        load_detector('vgg16.pt', CPU, str(tmp_path / 'mine'))
    assert '\n' not in str(caught.value) and str(tmp_path / 'mine') in str(caught.value)


def test_what_is_no_network_is_refused_and_not_cached(publisher, tmp_path):
    folder, _ = publisher
    folder.mkdir()
    (folder / INCEPTION).write_text('<html>come back later</html>')
    with pytest.raises(DetectorMissingError, match='not a TorchScript network'):
        detector_path(INCEPTION)
    assert not (tmp_path / 'cache').exists()


def test_a_bundle_brings_its_checksums_and_damage_is_noticed(publisher, tmp_path):
    folder, fetched = publisher
    write_detectors(folder)
    bundle = tmp_path / 'bundle'
    assert [path.name for path in detectors.write_bundle(bundle)] == list(FILES)
    shutil.rmtree(tmp_path / 'cache')
    fetched.clear()
    detector = load_detector(INCEPTION, CPU, str(bundle))
    assert not fetched and detector.sha256 in (bundle / f'{INCEPTION}.sha256').read_text()
    features = detector(torch.zeros([2, 1, 9, 5], dtype=torch.uint8), return_features=True)
    assert features.shape == (2, 6) and features.dtype == torch.float32
    (bundle / INCEPTION).write_bytes((bundle / INCEPTION).read_bytes() + b'x')
    with pytest.raises(DetectorMissingError, match='does not match the checksum'):
        load_detector(INCEPTION, CPU, str(bundle))


def test_a_download_over_http_survives_failures_and_is_kept_with_its_checksum(tmp_path, monkeypatch, capsys):
    pytest.importorskip('requests')
    write_detectors(tmp_path / 'publisher')
    content = (tmp_path / 'publisher' / INCEPTION).read_bytes()
    half, headers = len(content) // 128 * 64, {'Accept-Ranges': 'bytes', 'ETag': '"1"'}
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    for name, value in {'MAX_PAUSE_SEC': 0.0, 'SHOW_BYTES': 100, 'CHUNK_BYTES': 64}.items():
        monkeypatch.setattr(download, name, value)
    with local_server() as server:
        monkeypatch.setattr(detectors, 'DETECTOR_URL', f'{server.url}/')
        server.answers[f'/{INCEPTION}'] = [
            (503, {}, b'busy'),
            (200, {**headers, 'Content-Length': str(len(content))}, content[:half]),
            (206, {'Content-Range': f'bytes {half}-'}, content[half:])]
        path = detector_path(INCEPTION)
    assert path.read_bytes() == content and server.ranges[-1][0] == f'bytes={half}-'
    digest = hashlib.sha256(content).hexdigest()
    assert path.with_name(f'{INCEPTION}.sha256').read_text().split() == [digest, INCEPTION]
    out, err = capsys.readouterr()
    assert out.count('trying again') == 2 and f'Downloading {INCEPTION}: ' in err and '(100%)' in err


def test_gray_is_repeated_and_alpha_laid_over_white():
    gray = torch.tensor([7, 9], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert to_rgb(gray).flatten(1).tolist() == [[7] * 3, [9] * 3]
    rows = [[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]
    colour = torch.tensor(rows, dtype=torch.uint8)[:, :, None, None]
    assert to_rgb(colour).flatten(1).tolist() == [[10, 20, 30], [255] * 3, [204] * 3]
    assert to_rgb(colour[:, 2:].float()).flatten(1).tolist() == [[30] * 3, [255] * 3, [204] * 3]
    assert to_rgb(colour[:, :3]).dtype == torch.uint8 and to_rgb(colour[:, :3]).flatten(1)[0, 0] == 10
    with pytest.raises(UserError, match='1 to 4 channels, not 5'):
        to_rgb(torch.zeros([1, 5, 2, 2]))
