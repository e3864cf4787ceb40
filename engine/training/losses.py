"""Training losses, in the target's unit, chosen by name in a recipe's `loss.name` with `loss.options`.

Each takes pred [B,1,H,W] and target [B,H,W] and returns a scalar, in float32 or better whatever autocast does.  Each
can leave out pixels whose target is `ignore_above` or more, by default what the data set's description says: the labels
of BioMassters have outliers to 12,900 t/ha, and the 1st-place solution trained without pixels of 400 t/ha and more.
Where a target is not finite there is none: such pixels are always left out.  All have zero, not undefined, gradient
where nothing is left or the error is exactly zero.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.base.errors import ConfigError
from engine.data.dataset import Target

Loss = Callable[[Tensor, Tensor], Tensor]


def per_chip_rmse(pred: Tensor, target: Tensor, ignore_above: float | None = None) -> Tensor:
    """RMSE of each chip, averaged over the B chips of the batch.

    A chip with no pixel left counts as 0 in that average: so the mean over equal shards of a batch is the batch's.
    With `ignore_above` null it is the challenge's metric.
    """
    error, valid = _errors(pred, target, ignore_above)
    return _sqrt(error.square().sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()


def rmse(pred: Tensor, target: Tensor, ignore_above: float | None = None) -> Tensor:
    """RMSE over all pixels of the batch together."""
    error, valid = _errors(pred, target, ignore_above)
    return _sqrt(error.square().sum() / valid.sum().clamp(min=1))


def mae(pred: Tensor, target: Tensor, ignore_above: float | None = None) -> Tensor:
    """Mean absolute error over all pixels of the batch together."""
    error, valid = _errors(pred, target, ignore_above)
    return error.abs().sum() / valid.sum().clamp(min=1)


def huber(pred: Tensor, target: Tensor, delta: float = 25.0, ignore_above: float | None = None) -> Tensor:
    """Huber's loss over all pixels: error² / 2 up to `delta`, delta · (|error| − delta / 2) beyond."""
    if not delta > 0:
        raise ConfigError(f"loss.options.delta is {delta}: give a number above 0, in the unit of the target")
    error, valid = _errors(pred, target, ignore_above)
    size = error.abs()
    inner = size.clamp(max=delta)
    return (inner * (size - inner / 2)).sum() / valid.sum().clamp(min=1)


def rmse_focal(pred: Tensor, target: Tensor, beta: float = 0.2, weight: float = 0.05,
               ignore_above: float | None = None) -> Tensor:
    """The winner's focal variant: per-chip RMSE + weight · mean of error² · (2 σ(beta · |error|) − 1)."""
    error, valid = _errors(pred, target, ignore_above)
    focus = torch.tanh(error.abs() * (beta / 2))  # = 2 σ(beta · |error|) − 1
    focal = (error.square() * focus).sum() / valid.sum().clamp(min=1)
    return per_chip_rmse(pred, target, ignore_above) + weight * focal


LOSSES: dict[str, Callable[..., Tensor]] = {
    "per_chip_rmse": per_chip_rmse, "rmse": rmse, "mae": mae, "huber": huber, "rmse_focal": rmse_focal,
}


def make_loss(name: str, target: Target, **options: Any) -> Loss:
    """The loss of that name for `target`, with its options set.  Raises ConfigError, with the nearest known name."""
    if name not in LOSSES:
        raise ConfigError(f"loss.name: {_unknown(name, list(LOSSES))}")
    known = list(inspect.signature(LOSSES[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise ConfigError(f"loss.options of {name}: {_unknown(option, known)}")
    loss = partial(LOSSES[name], **{"ignore_above": target.ignore_above, **options})
    try:
        loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))
    except TypeError as error:
        raise ConfigError(f"loss.options of {name}: {options} is not of the right type ({error})") from error
    return loss


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"{name!r} is unknown; nearest: {near[0]!r}, all: {', '.join(known)}"


def _errors(pred: Tensor, target: Tensor, ignore_above: float | None) -> tuple[Tensor, Tensor]:
    """pred − target with 0 where ignored or without target, and where it counts (bool); both [B,H,W]."""
    if pred.ndim != 4 or pred.shape[1] != 1 or pred[:, 0].shape != target.shape:
        raise ValueError(f"pred must be [B,1,H,W] and target [B,H,W], not {list(pred.shape)} and {list(target.shape)}")
    exact = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    error = pred[:, 0].to(exact) - target.to(exact)
    counts = target.isfinite()
    if ignore_above is not None:
        counts &= target < ignore_above
    return error.masked_fill(~counts, 0), counts


def _sqrt(mean_square: Tensor) -> Tensor:
    """Square root with gradient 0 instead of infinity at 0."""
    zero = mean_square == 0
    return mean_square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
