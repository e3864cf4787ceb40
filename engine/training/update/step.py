"""One optimizer step: forward and backward of its micro-batches, and an update that is left out, on all ranks alike and
without the host waiting to see it, where the loss of any chip or the gradient is not finite.

At ZeRO stage 0 the optimizer looks at a flag on the device; DeepSpeed's other stages look at the norm on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.base.distributed import rank
from engine.base.sections import HERE
from engine.config import Config
from engine.data.batch import Batch
from engine.data.plan import Sharding
from engine.training.losses import Loss
from engine.training.update.batchnorm import RunningStatistics
from engine.training.update.loss_scale import LossScale
from engine.training.update.reduction import Reducer


class Taken(NamedTuple):
    loss: Tensor  # [] float32: mean over this rank's micro-batches
    norm: Tensor | float  # of the gradient of all ranks, before clipping
    chips: list[str]  # ids of this rank's


class Step:
    """Takes steps with DeepSpeed's `engine`.  around: entered with a micro-batch's number of kept months."""

    def __init__(self, engine: Any, reducer: Reducer | None, loss: Loss, config: Config, sharding: Sharding,
                 scale: LossScale, around: Callable[[int], AbstractContextManager[Any]]):
        self.engine, self._reducer, self._loss = engine, reducer, loss
        self._config, self._sharding, self._scale, self._around = config, sharding, scale, around
        self._statistics = RunningStatistics(engine.module)
        self.loss_scale = 1.0  # of the last step

    def take(self, number: int, batches: Iterable[Batch]) -> Taken:
        """Step `number` of the run, on `Sharding.accumulate` micro-batches."""
        # Stochastic layers draw from the step's number, so that a resume needs no generator state
        torch.manual_seed(seed_of(self._config, number, rank()))
        engine, train = self.engine, self._config.train
        losses, chips = [], []
        norm: Tensor | float = 0.0
        scale = self.loss_scale = self._scale.value if train.precision == "fp16" else 1.0
        if train.zero_stage and train.precision == "fp16":
            engine.optimizer.override_loss_scale(scale)
        self._statistics.remember()
        for turn, batch in enumerate(batches, 1):
            HERE.enter("step")
            reducer = self._reducer if turn == self._sharding.accumulate else None
            with self._around(int((~batch.dropped).sum())):
                loss = self._loss(engine(batch.images, batch.dropped), batch.label)
                if reducer is not None:
                    reducer.begin()
                engine.backward(seen_in_gradient(loss if train.zero_stage else loss * scale))
                if reducer is not None:
                    reducer.finish()
            losses.append(loss.detach())
            chips += [chip.id for chip in batch.chips]
            if engine.is_gradient_accumulation_boundary() and train.zero_stage == 0:
                norm = self._clip(scale)
            engine.step()
        if train.zero_stage:
            norm = engine.get_global_grad_norm()
        self._statistics.forget_unless(norm)
        if train.precision == "fp16":
            norm = float(norm)
            self._scale.update(norm)
        return Taken(torch.stack(losses).mean(), norm, chips)

    def _clip(self, scale: float) -> Tensor:
        """Clip at ZeRO stage 0, and have the optimizer skip the update on the device if the norm is not finite."""
        optimizer = self.engine.optimizer
        clip = (self._config.optimizer.clip or float("inf")) * scale
        norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), clip, foreach=True)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        # Said again where fp16's has come down to 1: the optimizer keeps what it was told last
        optimizer.grad_scale = None if scale == 1.0 else torch.tensor(scale, device=norm.device)
        return norm / scale


def seed_of(config: Config, step: int, rank: int) -> int:
    """Of torch's generator, as a rank begins a step."""
    return ((config.run.seed << 40) + (step << 12) + rank) % 2**63  # torch takes no larger ones


def seen_in_gradient(loss: Tensor) -> Tensor:
    """`loss`; where it is not finite its gradient is NaN, which the sum over ranks carries to all."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
