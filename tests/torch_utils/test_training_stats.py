# SPDX-License-Identifier: Apache-2.0
"""Statistics: what is reported is what collectors show, per update, device and process."""
import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from golden_cases import index

from torch_utils import distributed, training_stats
from torch_utils.training_stats import Collector, Store


def assert_moments(collector, expected):
    assert set(collector.as_dict()) == set(expected)
    for name, moments in expected.items():
        assert collector.num(name) == moments['num']
        for key in ('mean', 'std'):
            actual = collector.as_dict()[name][key]
            assert actual == pytest.approx(float(moments[key]), rel=1e-6, abs=1e-9, nan_ok=True), (name, key)
        assert collector[name] == pytest.approx(collector.mean(name), nan_ok=True)


@pytest.mark.parametrize('operations', index('loop_misc').get('statistics', []))
def test_golden_sequences_of_reports_and_updates(operations):
    store, collectors = Store(), {}
    for op in operations:
        if op['op'] == 'report':
            assert store.report(op['name'], op['value']) is op['value']
        elif op['op'] == 'new_collector':
            collectors[op['collector']] = Collector(op['regex'], op['keep_previous'], store=store)
        else:
            collectors[op['collector']].update()
            assert_moments(collectors[op['collector']], op['expected'])


@pytest.mark.parametrize(('value', 'num'), [
    (3, 1), (3.0, 1), ([1, 2, 6], 3), (np.array([[1.5, 4.5]]), 2), (np.float64(3), 1), (torch.tensor(3), 1),
    (torch.full([2, 3], 3.0, dtype=torch.float16), 6), (torch.full([2], 3.0, requires_grad=True) * 1, 2)])
def test_scalars_lists_arrays_and_tensors_of_any_type_are_accepted(value, num):
    store = Store()
    collector = Collector(store=store)
    assert store.report('x', value) is value
    collector.update()
    assert (collector.num('x'), collector.mean('x')) == (num, 3)


def test_a_value_changed_in_place_afterwards_counts_as_it_was():
    store, x = Store(), torch.ones(4)
    collector = Collector(store=store)
    store.report('x', x)
    x.zero_()
    collector.update()
    assert collector.mean('x') == 1


def test_values_pass_through_float32_and_sums_do_not():
    store = Store()
    collector = Collector(store=store)
    store.report('small', 0.004)
    for _ in range(3):
        store.report('large', [1e8, 1.0])
    collector.update()
    assert collector.mean('small') == 0.004000000189989805 and collector.std('small') == 0
    assert collector.mean('large') == 50000000.5


def test_empty_and_unknown_names_are_nan():
    store = Store()
    collector = Collector(store=store)
    store.report('x', [])
    collector.update()
    assert collector.names() == ['x'] and collector.num('x') == 0
    assert math.isnan(collector.mean('x')) and math.isnan(collector.std('other'))


def test_a_non_finite_value_spoils_its_own_update_only():
    store = Store()
    collector = Collector(store=store)
    store.report('x', [1.0, math.nan])
    store.report('y', math.inf)
    collector.update()
    assert math.isnan(collector.mean('x')) and math.isnan(collector.std('x')) and collector.num('x') == 2
    assert collector.mean('y') == math.inf and math.isnan(collector.std('y'))
    store.report('x', [1.0, 3.0])
    collector.update()
    assert (collector.mean('x'), collector.std('x')) == (2, 1)


def test_expressions_must_match_the_whole_name():
    store = Store()
    collector = Collector('Loss/signs/real', store=store)
    for name in ('Loss/signs/real', 'Loss/signs/real2', 'x/Loss/signs/real'):
        store.report(name, 1)
    collector.update()
    assert collector.names() == ['Loss/signs/real']
    with pytest.raises(AssertionError, match='real2'):
        collector.mean('Loss/signs/real2')


def test_reports_before_a_collector_go_to_older_collectors_only():
    store = Store()
    old = Collector(store=store)
    store.report('x', 1)
    new = Collector(store=store)
    store.report('x', 3)
    for collector in (new, old):
        collector.update()
    assert (old.num('x'), old.mean('x'), new.num('x'), new.mean('x')) == (2, 2, 1, 3)


def test_more_names_than_a_table_holds_keep_their_order():
    store = Store()
    collector = Collector(store=store)
    names = [f'n{i}' for i in range(2 * training_stats.TABLE_ROWS + 1)]
    for i, name in enumerate(names):
        store.report(name, i)
    collector.update()
    assert collector.names() == names
    assert [collector.mean(name) for name in names] == list(range(len(names)))


def test_a_second_store_inherits_nothing_and_the_default_store_serves_the_published_functions():
    other, default = Collector(store=Store()), Collector('test_stats/.*')
    try:
        training_stats.init_multiprocessing(rank=1, sync_device=None)
        assert training_stats.report('test_stats/a', 2.0) == 2.0
        assert training_stats.report0('test_stats/b', 5.0) == 5.0
    finally:
        training_stats.init_multiprocessing(rank=0, sync_device=None)
    training_stats.report0('test_stats/c', 7.0)
    for collector in (other, default):
        collector.update()
    assert other.names() == []
    assert {name: default.num(f'test_stats/{name}') for name in 'abc'} == {'a': 1, 'b': 0, 'c': 1}


def test_reports_made_in_inference_mode_count():
    store = Store()
    collector = Collector(store=store)
    with torch.inference_mode():
        store.report('x', torch.ones(2))
    store.report('x', torch.ones(2, requires_grad=True))
    collector.update()
    assert collector.num('x') == 4


def test_values_on_a_device_are_added_to_those_of_the_cpu(device):
    store = Store()
    collector = Collector(store=store)
    store.report('x', torch.tensor([1.0, 2.0], device=device))
    store.report('x', 6.0)
    collector.update()
    assert (collector.num('x'), collector.mean('x')) == (3, 3)


def test_one_process_has_rank_0_and_reduces_to_itself():
    x = torch.ones(2)
    assert distributed.all_reduce_sum(x) is x and x.tolist() == [1, 1]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def _run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    store = Store(rank=rank, sync_device=torch.device('cpu'))
    collector = Collector(store=store)
    store.report('all', [1.0, 2.0] if rank == 0 else [6.0])
    store.report0('first', 10.0 + rank)
    collector.update()
    result = {'stats': collector.as_dict(), 'rank': distributed.rank(), 'size': distributed.world_size()}
    torch.save(result, f'{folder}/{rank}.pt')
    # Who leaves last removes the file that they met in, so nobody leaves before both have met.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_updates_sum_over_processes(tmp_path):
    mp.start_processes(_run_rank, args=(str(tmp_path),), nprocs=2, start_method='fork')
    for rank in range(2):
        result = torch.load(tmp_path / f'{rank}.pt')
        assert (result['rank'], result['size']) == (rank, 2)
        assert result['stats']['all'] == {'num': 3, 'mean': 3.0, 'std': pytest.approx((14 / 3) ** 0.5)}
        assert result['stats']['first'] == {'num': 1, 'mean': 10.0, 'std': 0.0}
