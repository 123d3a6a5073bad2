# SPDX-License-Identifier: Apache-2.0
"""train.py as torchrun starts it in tests: without what takes more time than the training."""
from resume_cases import leave_out_pictures

import train

if __name__ == '__main__':
    leave_out_pictures()
    train.main()
