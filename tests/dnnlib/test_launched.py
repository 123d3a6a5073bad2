# SPDX-License-Identifier: Apache-2.0
"""What tells a process that a launcher has started it."""
import pytest

from dnnlib.launched import is_launched
from dnnlib.util import UserError

WHOLE = {'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'm', 'MASTER_PORT': '1'}


def without(*names):
    return {name: value for name, value in WHOLE.items() if name not in names}


def test_a_process_knows_that_it_was_launched_only_from_all_of_the_variables():
    assert is_launched(WHOLE) and not is_launched({})
    # As some systems leave behind, without meaning several processes.
    assert not is_launched(without('RANK')) and not is_launched({'RANK': '0', 'WORLD_SIZE': '1'})


@pytest.mark.parametrize('missing', [('MASTER_ADDR',), ('MASTER_ADDR', 'MASTER_PORT')])
def test_half_of_the_variables_are_no_run_for_each_process(missing):
    words = f'WORLD_SIZE=2 .* but not {" and ".join(missing)}; start with torchrun'
    with pytest.raises(UserError, match=words):
        is_launched(without(*missing))
