"""Predictions that validation shows as pictures."""

from __future__ import annotations

import numpy as np
import torch

from engine.base.distributed import average_, world
from engine.data.batch import Batch


class Shown:
    """Predictions of the first `n` chips, gathered from whichever rank has them: [n, H, W]."""

    def __init__(self, n: int, device: torch.device):
        self._n, self._device = n, device
        self._maps: torch.Tensor | None = None

    def add(self, batch: Batch, prediction: torch.Tensor) -> None:
        if self._maps is None:
            self._maps = torch.zeros(self._n + 1, *prediction.shape[2:], device=self._device)
        # Rows beyond the shown ones, and padding, fall into the last place, which is thrown away
        place = torch.where(batch.valid & (batch.rows < self._n), batch.rows, self._n)
        self._maps[place] = prediction[:, 0]

    def reduce(self) -> np.ndarray:
        assert self._maps is not None
        self._maps[self._n] = 0
        return (average_(self._maps) * world())[:self._n].cpu().numpy()
