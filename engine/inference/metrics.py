"""Metrics, the same to the last bit however the chips are spread over batches, ranks and devices.

`ChipTable` holds one row of float64 sums per chip.  A rank fills the rows of the chips it saw and leaves the others
zero, so adding the ranks' tables is exact (x + 0 = x), and the final numbers come from the whole table in one order.
Sums over a chip's pixels are taken by halving, which fixes the order of additions where torch's own reduction
chooses it by batch size and device.  `engine.inference.chips` fills the table, for training and prediction alike.

A pixel counts where its label is finite (NaN: no target there), and a chip that has such a pixel.

Names, errors are prediction − label, in the target's unit:
    rmse_per_chip  mean over chips of a chip's RMSE: the leaderboard's score; a chip counts once, a pixel as any other
    rmse_pooled    RMSE over all pixels of all chips
    mae, bias      mean absolute error, mean error, over all pixels
    rmse_of_mean   what rmse_per_chip would be, had every pixel been predicted as the mean label of all of them
    r2             1 − Σ error² / Σ (label − mean label)², over all pixels; NaN if all labels are one value
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.base.errors import DataError

# spread: Σ (label − the chip's mean label)²; kept instead of Σ label², whose difference to the mean² cancels
COLUMNS = ("seen", "pixels", "error", "error2", "abs_error", "label", "spread")


class ChipTable:
    """Sums per chip of an evaluation set of `n_chips`, on `device` (which must know float64: CPU or CUDA)."""

    def __init__(self, n_chips: int, device: torch.device | str = "cpu"):
        self.n_chips = n_chips
        # One row more than there are chips takes what padding would write: choosing rows would sync with the host.
        self.table = torch.zeros(n_chips + 1, len(COLUMNS), dtype=torch.float64, device=device)
        self._reduced = False

    @torch.no_grad()
    def update(self, rows: Tensor, pred: Tensor, target: Tensor, valid: Tensor, labelled: Tensor | None = None) -> None:
        """Fill the rows of a batch; no host sync if all is on the table's device.

        rows [B] int64: chips' places in the set, each once over all ranks; pred [B,1,H,W]; target [B,H,W];
        valid [B] bool: False for padding, which is not written; labelled [B] bool: False for chips without a label,
        which count as seen but not in the metrics (None: all have one).
        """
        if pred.ndim != 4 or pred[:, 0].shape != target.shape:
            raise ValueError(f"pred must be [B,1,H,W], target [B,H,W], not {list(pred.shape)}, {list(target.shape)}")
        rows, valid, pred, target = (x.to(self.table.device, non_blocking=True) for x in (rows, valid, pred, target))
        sums = chip_sums(pred[:, 0], target)
        if labelled is not None:
            sums = torch.where(labelled.to(sums.device, non_blocking=True)[:, None], sums, 0.0)
        values = torch.cat([torch.ones_like(sums[:, :1]), sums], 1)
        self.table.index_add_(0, torch.where(valid, rows, self.n_chips), values)

    def reduce(self) -> None:
        """Add the tables of all ranks (a collective: every rank calls it, once).  Nothing to do in one process.

        Raises DataError if a chip was not evaluated, or more than once.
        """
        if self._reduced:
            raise RuntimeError("this table has been reduced before: its rows would be counted again")
        self._reduced = True
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.table)
        seen = self.table[:-1, 0].cpu().numpy()
        for wrong, what in ((seen == 0, "evaluated by no rank"), (seen > 1, "evaluated more than once")):
            if wrong.any():
                first, more = ", ".join(map(str, np.flatnonzero(wrong)[:5])), " ..." if wrong.sum() > 5 else ""
                raise DataError(f"{wrong.sum()} of {self.n_chips} chips were {what} (rows {first}{more}); "
                                "every chip of an evaluation set must be evaluated exactly once")

    def per_chip(self) -> np.ndarray:
        """One record per chip that counts, in order of `row`: rmse, mae, bias, mean_label; float64, target's unit."""
        row, column = self._labelled()
        records = np.empty(len(row), [("row", np.int64), *((name, np.float64) for name in
                                                           ("rmse", "mae", "bias", "mean_label"))])
        records["row"] = row
        records["rmse"] = np.sqrt(column["error2"] / column["pixels"])
        for name, source in (("mae", "abs_error"), ("bias", "error"), ("mean_label", "label")):
            records[name] = column[source] / column["pixels"]
        return records

    def metrics(self) -> dict[str, float]:
        """The numbers of this module's docstring, and `n_chips` that count.  Raises DataError if none does."""
        row, column = self._labelled()
        if not len(row):
            raise DataError("no chip of the evaluation set has a label with a pixel of target: there is nothing to "
                            "score")
        total = {name: _total(values) for name, values in column.items()}
        pixels, mean = total["pixels"], total["label"] / total["pixels"]
        between = column["pixels"] * np.square(column["label"] / column["pixels"] - mean)
        spread = total["spread"] + _total(between)
        of_mean = np.sqrt((column["spread"] + between) / column["pixels"])
        return {
            "rmse_per_chip": _total(self.per_chip()["rmse"]) / len(row),
            "rmse_pooled": math.sqrt(total["error2"] / pixels),
            "rmse_of_mean": _total(of_mean) / len(row),
            "mae": total["abs_error"] / pixels,
            "r2": 1 - total["error2"] / spread if spread else math.nan,
            "bias": total["error"] / pixels,
            "n_chips": len(row),
        }

    def _labelled(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        table = self.table[:-1].cpu().numpy()
        rows = np.flatnonzero(table[:, 1])
        return rows, {name: table[rows, i] for i, name in enumerate(COLUMNS)}


def per_chip_rmse(prediction: np.ndarray | Tensor, label: np.ndarray | Tensor) -> np.ndarray:
    """[B] float64, in the label's unit, of maps [B,H,W]; their mean is the challenge's score.

    Pixels whose label is NaN are left out; NaN for a chip of no other.
    """
    prediction, label = (torch.as_tensor(maps) for maps in (prediction, label))
    if prediction.ndim != 3 or prediction.shape != label.shape:
        raise DataError(f"prediction and label must be maps [B,H,W], not {list(prediction.shape)} and "
                        f"{list(label.shape)}")
    pixels, _, squared, *_ = chip_sums(prediction, label).unbind(1)
    return (squared / pixels).sqrt().numpy(force=True)


def _total(values: np.ndarray) -> float:
    """Correctly rounded sum, whatever the order; inf or NaN as numpy has it (fsum refuses inf − inf)."""
    return math.fsum(values) if np.isfinite(values).all() else float(values.sum())


def chip_sums(pred: Tensor, target: Tensor) -> Tensor:
    """COLUMNS without `seen`, for each chip of [B,H,W] maps: float64 [B,6], independent of the batch around it."""
    pred, target = pred.flatten(1).double(), target.flatten(1).double()
    none = ~target.isfinite()
    error = (pred - target).masked_fill(none, 0)
    pixels = (~none).sum(1).double()
    label = halving_sum(target.masked_fill(none, 0))
    spread = halving_sum((target - (label / pixels)[:, None]).masked_fill(none, 0).square())
    return torch.stack([pixels, halving_sum(error), halving_sum(error.square()), halving_sum(error.abs()),
                        label, spread], 1)


def halving_sum(x: Tensor) -> Tensor:
    """[B,P] -> [B]: sum over P by adding the second half to the first until one is left; elementwise, so exact in
    order on every device."""
    x = F.pad(x, (0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]))
    while x.shape[1] > 1:
        first, second = x.chunk(2, 1)
        x = first + second
    return x[:, 0]
