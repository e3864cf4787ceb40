"""An exponential moving average of the weights: a second model, often better than the one that trains, for 4 bytes a
parameter and one pass over them a step.

average ← d · average + (1 − d) · weights after each step, with d = min(decay, (1 + n) / (10 + n)) after n steps of the
phase, so that the first steps do not weigh for ever (tf.train.ExponentialMovingAverage with num_updates).  Running
statistics of BatchNorm are averaged like weights.  At ZeRO stage 3 each rank averages its part of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.training.update.batchnorm import average_statistics, running


class Ema:
    """Of the model in DeepSpeed's `engine`, as it stands now; on its device."""

    def __init__(self, engine: Any, decay: float):
        self._engine, self._decay = engine, decay
        self._parted = engine.zero_optimization_stage() == 3
        self._average = [tensor.clone() for tensor in self._tensors()]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """After the `n`-th step of the phase."""
        decay = min(self._decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self._average, self._tensors(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands in the place of the weights, and these in its own: to evaluate, save and load it.  A
        collective; nothing may train meanwhile."""
        self._exchange()
        try:
            average_statistics(self._engine.module)
            yield
        finally:
            self._exchange()

    def _tensors(self) -> list[Tensor]:
        module = self._engine.module
        parameters = [p.ds_tensor if self._parted else p for p in module.parameters() if p.requires_grad]
        return [p.detach() for p in parameters] + running(module)

    @torch.no_grad()
    def _exchange(self) -> None:
        # What is whole somewhere would not change with its parts.  Whoever needs it next gathers it: a message here
        # would keep a rank that fails inside `in_place` from saying so
        if self._parted:
            self._engine.optimizer._partition_all_parameters()
        for ours, theirs in zip(self._average, self._tensors()):
            before = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(before)
