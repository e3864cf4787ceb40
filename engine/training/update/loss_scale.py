"""Dynamic loss scaling for fp16, the same at every ZeRO stage.

DeepSpeed 0.19 scales losses itself under fp16 `torch_autocast`, but from ZeRO stage 1 on it then clips by the norm
of the scaled gradients (seen: a norm of 323,245 where 4.3 was meant) and never lowers a scale that overflows.  So
its scalers are taken out and this one used: the policy of torch.amp.GradScaler, whose state is two numbers that
checkpoints keep.  Looking at the norm makes the host wait for the device, in fp16 only; bf16 needs no scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GROWTH_INTERVAL = 2000  # finite updates after which the scale doubles (GradScaler's default)


@dataclass
class LossScale:
    value: float = 2.0**16
    finite_updates: int = 0

    def update(self, norm: float) -> None:
        """After a step with this gradient norm: halve the scale if it is not finite, double it after a long time."""
        if not math.isfinite(norm):
            self.value, self.finite_updates = max(self.value / 2, 1.0), 0
        else:
            self.finite_updates += 1
            if self.finite_updates == GROWTH_INTERVAL:
                self.value, self.finite_updates = self.value * 2, 0


def take_over(engine: Any) -> None:
    """Remove DeepSpeed's own scalers from `engine`."""
    engine.torch_autocast_z0_gradscaler = None
    if engine.zero_optimization_stage() > 0:
        engine.optimizer.torch_autocast_gradscaler = None
