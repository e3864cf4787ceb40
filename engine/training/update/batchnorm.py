"""BatchNorm's running statistics over several ranks.

Each rank normalises by the statistics of its own micro-batches, as any number of ranks does at one `train.micro_batch`.
Running statistics are a moving average, linear in those of each micro-batch, and all ranks make the same number of
updates: so their mean over ranks, taken when it is wanted, is what averaging at every step would have given.

What that mean is not: the statistics of all ranks' images as one batch.  The variance between micro-batches is not in
it (nor is it in the average that one rank keeps over its micro-batches), and every micro-batch weighs the same, however
many months it kept: those of a step are dealt by kept months (`engine.data.plan`), which differ by a few percent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.base.distributed import average_, world


def keep_horizon(model: nn.Module, ranks: int) -> None:
    """Have the running statistics forget per chip what one rank would.

    A step of k micro-batches takes one rank k updates, which leave (1 − m)^k of what was; R ranks make k / R updates
    each, with 1 − (1 − m)^R in the place of the momentum m.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = 1 - (1 - module.momentum) ** ranks


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Set the running statistics of every rank to their mean over ranks (a collective)."""
    if world() == 1:
        return
    buffers = running(model)
    if not buffers:
        return
    flat = average_(torch.cat([b.flatten() for b in buffers]))
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers])):
        buffer.copy_(mean.view_as(buffer))


def running(model: nn.Module) -> list[Tensor]:
    """The running means and variances of a model."""
    return [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


class RunningStatistics:
    """Those of a model, which a step that is not finite may not change: an average that was NaN once stays NaN.

    They lie in one tensor from here on, so that a step's look back is two copies and not some hundreds.
    """

    def __init__(self, model: nn.Module):
        buffers = running(model)
        self._now = torch.cat([b.flatten() for b in buffers]) if buffers else torch.empty(0)
        for buffer, place in zip(buffers, self._now.split([b.numel() for b in buffers])):
            buffer.data = place.view_as(buffer)
        self._before = torch.empty_like(self._now)

    def remember(self) -> None:
        self._before.copy_(self._now)

    def forget_unless(self, norm: Tensor | float) -> None:
        """Back to what `remember` saw if `norm` is not finite; on the device, which nobody waits for."""
        finite = torch.as_tensor(norm).isfinite().to(self._now.device, non_blocking=True)
        torch.where(finite, self._now, self._before, out=self._now)
