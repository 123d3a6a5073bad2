# SPDX-License-Identifier: Apache-2.0
"""Whether processes notice that one of them has another state."""
import pytest
import torch

from dnnlib.util import UserError
from torch_utils import distributed
from torch_utils.processes import consistency
from torch_utils.processes.consistency import check_agreement, checksums, named_tensors


def state():
    torch.manual_seed(0)
    return {'G': {'a.weight': torch.randn(3, 4).T, 'a.bias': torch.zeros(2)}, 'cur_nimg': 4,
            'opt': {'state': {0: {'step': torch.tensor(1.0), 'exp_avg': torch.randn(2, 3, 4, 4)}}},
            'more': [torch.ones(3, dtype=torch.bool), torch.tensor([2 ** 40]), torch.ones(3).half()]}


def flip(tensor, index):
    """Change the lowest bit of an element."""
    flat = tensor.view(torch.int32).reshape(-1)
    flat[index] ^= 1


def test_tensors_of_nested_containers_have_dotted_names():
    assert [name for name, _ in named_tensors(state())] == [
        'G.a.weight', 'G.a.bias', 'opt.state.0.step', 'opt.state.0.exp_avg', 'more.0', 'more.1', 'more.2']


def test_one_bit_changes_the_sum_of_its_tensor_alone():
    tree = state()
    tensors = [tensor for _, tensor in named_tensors(tree)]
    before = checksums(tensors)
    flip(tree['opt']['state'][0]['exp_avg'], 50)
    assert before.dtype == torch.int64
    assert (checksums(tensors) != before).nonzero().flatten().tolist() == [3]
    # Zeros of either sign are equal numbers, but not equal bits.
    tree['G']['a.bias'].neg_()
    assert (checksums(tensors) != before).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize(('size', 'wrong'), [(2, 1), (3, 0), (4, 2)])
def test_the_process_and_the_first_tensor_that_differ_are_named(size, wrong, monkeypatch):
    monkeypatch.setattr(distributed, 'world_size', lambda: size)
    others = state()
    monkeypatch.setattr(consistency.distributed, 'gather_values', lambda sums: [sums] * size)
    check_agreement(others)
    right = checksums([tensor for _, tensor in named_tensors(others)])
    flip(others['G']['a.bias'], 1)
    flip(others['opt']['state'][0]['exp_avg'], 0)
    monkeypatch.setattr(consistency.distributed, 'gather_values',
                        lambda sums: [sums if rank == wrong else right for rank in range(size)])
    with pytest.raises(UserError, match=rf'^G\.a\.bias differs on process {wrong}, ') as caught:
        check_agreement(others)
    assert '\n' not in str(caught.value) and '--resume=latest' in str(caught.value)


def test_a_single_process_agrees_with_itself():
    check_agreement({})
