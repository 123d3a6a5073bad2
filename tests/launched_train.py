# SPDX-License-Identifier: Apache-2.0
"""train.py as the launcher starts it in tests: without what takes more time than the training."""
from resume_cases import leave_out_images

import train
from torch_utils import distributed


def main():
    """train.py with the arguments of this process."""
    leave_out_images()
    # On one machine the launcher is quick to see who is gone.
    distributed.GRACE_SEC = 1.0
    train.main()
