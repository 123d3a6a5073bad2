# SPDX-License-Identifier: Apache-2.0
"""calc_metrics.py as torchrun starts it in tests: with so few generated images that a test can wait."""
import functools

import calc_metrics
from metrics import metric_main

FEW = functools.partial(metric_main.fid, name='fid5k_full', num_generated=200)

if __name__ == '__main__':
    metric_main._METRICS['fid5k_full'] = FEW
    calc_metrics.main()
