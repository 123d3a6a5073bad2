# SPDX-License-Identifier: Apache-2.0
"""Values of draws in one piece of memory."""
import torch

from torch_utils.host_draws import ALIGNMENT, Block, Draw


def draws(seed):
    torch.manual_seed(seed)
    return [Draw('a', (torch.rand(3, 1, 2) < 0.5, torch.randn(5, dtype=torch.float64))), Draw('b'),
            Draw(('c', 1), (torch.randint(9, []), torch.randn(1, 3).expand(2, 3), torch.zeros(0, 4)))]


def assert_has(block, wanted):
    assert [form for form, _ in block.taken] == [draw.form for draw in wanted]
    for (_, places), draw in zip(block.taken, wanted, strict=True):
        for place, value in zip(places, draw.values, strict=True):
            assert place.dtype == value.dtype and torch.equal(place, value)


def test_a_block_takes_other_draws_to_the_same_aligned_places(device):
    block = Block(draws(1), device)
    addresses = [place.data_ptr() for _, places in block.taken for place in places if place.numel()]
    assert_has(block, [Draw(d.form, tuple(v.to(device) for v in d.values)) for d in draws(1)])
    block.write(draws(2))
    assert_has(block, [Draw(d.form, tuple(v.to(device) for v in d.values)) for d in draws(2)])
    assert addresses == [place.data_ptr() for _, places in block.taken for place in places if place.numel()]
    assert all((address - addresses[0]) % ALIGNMENT == 0 for address in addresses)


def test_a_block_of_nothing_has_only_forms():
    block = Block([Draw('a'), Draw()], torch.device('cpu'))
    block.write([Draw('a'), Draw()])
    assert block.taken == [('a', []), ((), [])] and Block([], torch.device('cpu')).taken == []
