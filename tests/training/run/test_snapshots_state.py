# SPDX-License-Identifier: Apache-2.0
"""Training states: what goes in comes out, anything can read them, and damage is never read."""
import errno
import io
import zipfile

import pytest
import torch

from dnnlib.util import UserError
from training.run.snapshots import COMMENT_SIZE, FORMAT, make_payload, read_state, write_state


def payload():
    run = {'G': {'w': torch.randn(30, 50), 'half': torch.ones(3, dtype=torch.float16)}, 'none': None,
           'opt': {'state': {0: {'step': torch.tensor(3.0)}}, 'betas': (0.0, 0.99)}, 'nimg': 2 ** 40}
    return make_payload({'batch_size': 4}, run, {'tick': 3}, {'statistics': [{'names': ['a']}]})


@pytest.fixture
def path(tmp_path):
    """A file with the payload."""
    torch.manual_seed(0)
    with open(tmp_path / 'training-state-000001.pt', 'wb') as file:
        write_state(file, payload())
    return tmp_path / 'training-state-000001.pt'


def test_everything_comes_back(path):
    torch.manual_seed(0)
    expected, found = payload(), read_state(path)
    assert torch.equal(found['run']['G'].pop('w'), expected['run']['G'].pop('w'))
    assert str(found) == str(expected) and found['format'] == FORMAT
    assert set(found['versions']) == {'python', 'torch', 'numpy'}


def test_anybody_can_read_it_with_torch_alone(path):
    assert torch.load(path, weights_only=True)['loop'] == {'tick': 3}
    assert zipfile.ZipFile(path).testzip() is None
    assert len(zipfile.ZipFile(path).comment) == COMMENT_SIZE


@pytest.mark.parametrize('place', [
    0, 100, 0.3, 0.5, 0.9, -1, -20, -COMMENT_SIZE, -COMMENT_SIZE - 1, -COMMENT_SIZE - 9])
def test_a_flipped_bit_anywhere_is_noticed(path, place):
    data = bytearray(path.read_bytes())
    data[place if isinstance(place, int) else int(place * len(data))] ^= 8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r'training-state-000001\.pt: damaged or incomplete'):
        read_state(path)


@pytest.mark.parametrize('share', [0, 0.001, 0.5, 0.99])
def test_half_a_file_is_noticed(path, share):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(UserError, match='damaged or incomplete'):
        read_state(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({'a': 1}, tmp_path / 'a.pt')
    with pytest.raises(UserError, match='damaged or incomplete'):
        read_state(tmp_path / 'a.pt')
    with open(tmp_path / 'b.pt', 'wb') as file:
        write_state(file, {'a': 1})
    with pytest.raises(UserError, match=r'b\.pt: not a training state'):
        read_state(tmp_path / 'b.pt')
    with pytest.raises(UserError, match=r'c\.pt: cannot be read \(No such file'):
        read_state(tmp_path / 'c.pt')


def test_a_later_format_is_refused(tmp_path):
    with open(tmp_path / 'a.pt', 'wb') as file:
        write_state(file, payload() | {'format': FORMAT + 1})
    with pytest.raises(UserError, match=f'format {FORMAT + 1}, but this program reads {FORMAT}'):
        read_state(tmp_path / 'a.pt')


def test_code_in_a_file_is_not_run(tmp_path):
    with open(tmp_path / 'a.pt', 'wb') as file:
        write_state(file, payload() | {'extra': io.StringIO})
    with pytest.raises(UserError, match='not a training state'):
        read_state(tmp_path / 'a.pt')


def test_a_full_disk_is_an_ordinary_error():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 2000:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return super().write(data)
    with pytest.raises(OSError, match='No space left'):
        write_state(Full(), payload())
