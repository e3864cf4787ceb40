"""A model run over chips: validation during training and `launch/predict.py` both come through here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from engine.base.distributed import rank, world
from engine.data.batch import Batch, Request
from engine.data.index import Chip
from engine.data.loader import DTYPES, Loader
from engine.data.plan import Sharding, evaluation_batches
from engine.inference.metrics import ChipTable

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Test-time augmentation: flips of [..., H, W], each its own inverse
FLIPS: dict[str, tuple[int, ...]] = {"id": (), "h": (-1,), "v": (-2,), "hv": (-2, -1)}


def evaluation_requests(chips: Sequence[Chip], micro_batch: int) -> Iterator[list[Request]]:
    """This rank's share of `chips`, each once, unaugmented; padded to full batches with invalid requests."""
    for items in evaluation_batches(len(chips), Sharding(micro_batch, world=world(), rank=rank())):
        yield [Request(chips[item.chip], row=item.chip, valid=item.valid) for item in items]


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a model of float32 parameters runs at `precision`."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


@torch.inference_mode()
def predict_batch(forward: Forward, batch: Batch, tta: Sequence[str], precision: str,
                  flips_at_once: int = 1) -> torch.Tensor:
    """Predictions [B, 1, H, W] float32, in the target's unit, averaged over the flips `tta` (keys of FLIPS).

    flips_at_once: how many flips share a forward pass, as one larger batch.
    """
    total = torch.zeros((), device=batch.images.device)
    for first in range(0, len(tta), flips_at_once):
        flips = [FLIPS[name] for name in tta[first:first + flips_at_once]]
        images = torch.cat([batch.images.flip(flip) for flip in flips]) if flips != [()] else batch.images
        with autocast(images.device, precision):
            out = forward(images, batch.dropped.repeat(len(flips), 1))
        for flip, view in zip(flips, out.float().chunk(len(flips))):
            total = total + view.flip(flip)
    return total / len(tta)


def predict_chips(forward: Forward, loader: Loader, chips: Sequence[Chip], *, micro_batch: int, tta: Sequence[str],
                  precision: str, device: torch.device, flips_at_once: int = 1,
                  each: Callable[[Batch, torch.Tensor], None] | None = None) -> ChipTable:
    """Predict every chip once over all ranks; score those that have a label.

    `each(batch, prediction)` is called on the rank that has the batch (padding included: see `batch.valid`).
    Returns the table of all chips, reduced over ranks.
    """
    table = ChipTable(len(chips), device)
    for batch in loader.batches(evaluation_requests(chips, micro_batch)):
        prediction = predict_batch(forward, batch, tta, precision, flips_at_once)
        labelled = torch.tensor([chip.label is not None for chip in batch.chips])
        table.update(batch.rows, prediction, batch.label, batch.valid, labelled)
        if each is not None:
            each(batch, prediction)
    table.reduce()
    return table
