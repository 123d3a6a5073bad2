# SPDX-License-Identifier: Apache-2.0
"""train.py as torchrun starts it in tests: without what takes more time than the training."""
import os
import sys

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(__file__)]

from resume_cases import leave_out_pictures

import train

if __name__ == '__main__':
    leave_out_pictures()
    train.main()
