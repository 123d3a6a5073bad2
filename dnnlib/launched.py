# SPDX-License-Identifier: Apache-2.0
"""Whether a launcher such as torchrun has started this process, as one of several."""
import os
from collections.abc import Mapping

from dnnlib.util import UserError

STOPPED = 75  # exit status of a run that was asked to stop: "try again later" of sysexits.h
PLACE = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or a similar launcher has started this process and set its rank.

    Raises UserError if only some of the variables are set: every process would train its own run.
    """
    missing = [name for name in PLACE if name not in environment]
    if not missing:
        return True
    size = environment.get('WORLD_SIZE', '1')
    if 'RANK' in environment and size != '1':
        raise UserError(f'RANK and WORLD_SIZE={size} are set as by a launcher, but not '
                        f'{" and ".join(missing)}; start with torchrun, or unset them')
    return False
