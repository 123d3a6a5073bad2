# SPDX-License-Identifier: Apache-2.0
"""The metrics of a training run: evaluated on snapshots and reported; a failure does not stop training."""
from collections.abc import Callable, Sequence

import torch

from dnnlib.util import UserError
from metrics import metric_main
from metrics.metric_utils import FittingBatch, Share
from training.dataset import Dataset

EARLY_METRICS = ('swd',)  # cheap enough for an untrained network


class TrainingMetrics:
    """Computes the metrics of a run and appends them to metric-*.jsonl in the run directory.

    names: as on the command line. What a metric computes of the training images is kept from one call to
    the next, as is the batch size that fits.  share: of this process; by default the one that calls works
    alone, otherwise all processes of the run must call.
    """

    def __init__(
        self, names: Sequence[str], dataset: Dataset, run_dir: str, *, share: Share | None = None,
        detector_dir: str | None = None, cuda_graphs: str = 'auto',
    ):
        self.names, self.run_dir = list(names), run_dir
        self._share = share or Share()
        self._kept = {'dataset': dataset, 'detector_dir': detector_dir, 'share': self._share, 'cache': {},
                      'batch': FittingBatch(), 'cuda_graphs': cuda_graphs}

    def compute(
        self, G_ema: torch.nn.Module, device: torch.device, snapshot_pkl: str, say: Callable[[str], None],
        is_untrained: bool = False,
    ) -> dict[str, float]:
        """Result name -> value for every available metric. say(line): called once for each unavailable one.

        is_untrained: only the EARLY_METRICS; the published system spends hours on noise.
        """
        results: dict[str, float] = {}
        for name in list(self.names):
            if not is_untrained or name in EARLY_METRICS:
                results.update(self._compute_one(name, G_ema, device, snapshot_pkl, say))
        return results

    def _compute_one(
        self, name: str, G_ema: torch.nn.Module, device: torch.device, snapshot_pkl: str,
        say: Callable[[str], None],
    ) -> dict[str, float]:
        try:
            result = metric_main.calc_metric(name, G=G_ema, device=device, **self._kept)
            if self._share.rank == 0:
                metric_main.report_metric(result, run_dir=self.run_dir, snapshot_pkl=snapshot_pkl)
        except UserError as error:
            say(f'Metric {name} is skipped: {error}')
            self.names.remove(name)
            return {}
        except (RuntimeError, ValueError, OSError, ArithmeticError, LookupError) as error:
            # A failed metric must not end a run; it may work for the next snapshot.
            text = (str(error).splitlines() or [''])[0]
            say(f'Metric {name} failed, training continues: {type(error).__name__}: {text}')
            return {}
        return result['results']
