"""AdamW with the winner's parameter groups, the learning rate as a function of the epoch, and a guarded update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from engine.config import Optimizer, Phase


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and filters decay, 1-D parameters (biases, norms) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW.  An update whose `found_inf` attribute (a [1] float32 tensor on the parameters' device) is 1 is
    skipped on the device, without the host waiting to look at it: the protocol of torch.amp.GradScaler."""
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas,
                             eps=config.eps, fused=True)


def phase_rates(phase: Phase, config: Optimizer) -> tuple[float, float]:
    """(first, lowest) learning rate of a phase; the lowest defaults to the winner's max(lr / 10, 5e-5)."""
    lr = phase.lr if phase.lr is not None else config.lr
    return lr, min(lr, phase.min_lr if phase.min_lr is not None else max(lr / 10, 5e-5))


def learning_rate(phase: Phase, config: Optimizer, epoch: int) -> float:
    """Cosine per epoch (Loshchilov & Hutter 2017, without restarts): constant within an epoch."""
    lr, low = phase_rates(phase, config)
    return low + (lr - low) * (1 + math.cos(math.pi * epoch / phase.epochs)) / 2


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
