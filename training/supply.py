# SPDX-License-Identifier: Apache-2.0
"""Real batches ahead of their use, so that processes can stop together before one of them has none."""
from collections import deque
from collections.abc import Iterator

import torch

from dnnlib.util import UserError

Batch = tuple[torch.Tensor, torch.Tensor]
AHEAD = 2  # Interrupt.should_stop() answers two iterations after the last batch that it knows of was taken


class Supply:
    """Takes batches from an iterator, `ahead` of them early.

    error: why the iterator ended, None as long as there are batches.
    """

    def __init__(self, batches: Iterator[Batch], ahead: int = 0) -> None:
        self._batches, self._ahead = batches, ahead
        self._waiting: deque[Batch] = deque()
        self.error: UserError | None = None

    def take(self) -> Batch:
        """The next batch. Raises the iterator's UserError once there is none left."""
        while self.error is None and len(self._waiting) <= self._ahead:
            try:
                self._waiting.append(next(self._batches))
            except UserError as error:
                self.error = error
        if not self._waiting:
            raise self.error
        return self._waiting.popleft()
