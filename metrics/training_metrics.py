# SPDX-License-Identifier: Apache-2.0
"""The metrics of a training run: computed on snapshots, reported, never a reason for training to stop."""
from collections.abc import Callable, Sequence

import torch

from dnnlib.util import UserError
from metrics import metric_main
from training.dataset import Dataset


class TrainingMetrics:
    """Computes the metrics of a run and appends them to metric-*.jsonl in its folder.

    names: as on the command line. What a metric computes of the training pictures is kept from one call to
    the next.
    """

    def __init__(self, names: Sequence[str], dataset: Dataset, run_dir: str):
        self.names, self.run_dir = list(names), run_dir
        self._cache: dict[str, object] = {}
        self._dataset = dataset

    def compute(
        self, G_ema: torch.nn.Module, device: torch.device, snapshot_pkl: str, say: Callable[[str], None],
    ) -> dict[str, float]:
        """Result name -> value for every metric that can be had. say(line): one that cannot is named once."""
        results: dict[str, float] = {}
        for name in list(self.names):
            try:
                result = metric_main.calc_metric(
                    name, G=G_ema, dataset=self._dataset, device=device, cache=self._cache)
            except UserError as error:
                say(f'Metric {name} is left out: {error}')
                self.names.remove(name)
                continue
            metric_main.report_metric(result, run_dir=self.run_dir, snapshot_pkl=snapshot_pkl)
            results.update(result['results'])
        return results
