"""A model run over chips: validation during training and `launch/predict.py` both come through here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.base.distributed import rank, world
from engine.base.errors import ConfigError
from engine.base.sections import HERE
from engine.data.batch import Batch, Request
from engine.data.forms import read_label
from engine.data.index import Chip
from engine.data.loader import DTYPES, Loader
from engine.data.plan import Sharding, evaluation_batches
from engine.inference.metrics import ChipTable

Forward = Callable[[Tensor, Tensor], Tensor]


def evaluation_requests(chips: Sequence[Chip], micro_batch: int) -> Iterator[list[Request]]:
    """This rank's share of `chips`, each once, unaugmented; padded to full batches with invalid requests."""
    for items in evaluation_batches(len(chips), Sharding(micro_batch, world=world(), rank=rank())):
        yield [Request(chips[item.chip], row=item.chip, valid=item.valid) for item in items]


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a model of float32 parameters runs at `precision`."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


class View(NamedTuple):
    """One of the eight ways to lay a square on itself: rows and columns of [..., H, W] exchanged, then a flip."""

    flip: tuple[int, ...]
    transposed: bool = False

    def of(self, maps: Tensor) -> Tensor:
        return (maps.mT if self.transposed else maps).flip(self.flip)

    def undone(self, maps: Tensor) -> Tensor:
        """`maps`, as `of` left them, upright again."""
        maps = maps.flip(self.flip)
        return maps.mT if self.transposed else maps


# Test-time augmentation.  h: left and right exchanged; v: top and bottom; hv: both, half a turn; t: mirrored at the
# diagonal from the upper left, a: at the other; r90, r270: turned counter-clockwise
VIEWS = {"id": View(()), "h": View((-1,)), "v": View((-2,)), "hv": View((-2, -1)),
         "t": View((), True), "r90": View((-2,), True), "r270": View((-1,), True), "a": View((-2, -1), True)}
ALL = "d4"  # the group of all eight


def chosen_views(tta: Sequence[str]) -> tuple[str, ...]:
    """Keys of VIEWS, "d4" written out.  Raises ConfigError for no view, an unknown one, or one that comes twice."""
    names = [] if isinstance(tta, str) else [name for given in tta for name in (VIEWS if given == ALL else [given])]
    if not names or set(names) - VIEWS.keys() or len(set(names)) < len(names):
        raise ConfigError(f"tta {tta!r}: give a list of one or more of {', '.join(VIEWS)}, each once, or {ALL} for "
                          f"all of them")
    return tuple(names)


@torch.inference_mode()
def predict_views(forward: Forward, batch: Batch, tta: Sequence[str], precision: str,
                  at_once: int = 1) -> Iterator[Tensor]:
    """The prediction [B, 1, H, W] float32, in the target's unit, from each view of `tta` (keys of VIEWS), upright, in
    their order.

    at_once: how many views share a forward pass, as one larger batch; images are square then.
    """
    for first in range(0, len(tta), at_once):
        views = [VIEWS[name] for name in tta[first:first + at_once]]
        images = torch.cat([view.of(batch.images) for view in views]) if views != [VIEWS["id"]] else batch.images
        with autocast(images.device, precision):
            out = forward(images, batch.dropped.repeat(len(views), 1))
        HERE.moved()
        for view, maps in zip(views, out.float().chunk(len(views))):
            yield view.undone(maps)


@torch.inference_mode()
def predict_batch(forward: Forward, batch: Batch, tta: Sequence[str], precision: str, views_at_once: int = 1) -> Tensor:
    """The mean of `predict_views`, added in the order of `tta`."""
    total = torch.zeros((), device=batch.images.device)
    for prediction in predict_views(forward, batch, tta, precision, views_at_once):
        total = total + prediction
    return total / len(tta)


def predict_chips(forward: Forward, loader: Loader, chips: Sequence[Chip], *, micro_batch: int, tta: Sequence[str],
                  precision: str, device: torch.device, views_at_once: int = 1,
                  each: Callable[[Batch, Tensor], None] | None = None,
                  made: Callable[[list[Chip]], np.ndarray | None] | None = None) -> ChipTable:
    """Predict every chip once over all ranks; score those that have a label.

    `each(batch, prediction)` is called on the rank that has the batch (padding included: see `batch.valid`).
    `made(chips)`: the maps [N, H, W] float32 of a batch that has been predicted before, which are scored as they are;
    None where it has not.  Returns the table of all chips, reduced over ranks.
    """
    table = ChipTable(len(chips), device)
    asked: Iterable[list[Request]] = evaluation_requests(chips, micro_batch)
    if made is not None:
        asked = [requests for requests in asked if not _score_made(table, requests, made)]
    for batch in loader.batches(asked):
        prediction = predict_batch(forward, batch, tta, precision, views_at_once)
        labelled = torch.tensor([chip.label is not None for chip in batch.chips])
        table.update(batch.rows, prediction, batch.label, batch.valid, labelled)
        if each is not None:
            each(batch, prediction)
    table.reduce()
    return table


def _score_made(table: ChipTable, requests: list[Request],
                made: Callable[[list[Chip]], np.ndarray | None]) -> bool:
    """Whether a batch is made, or is nothing but padding."""
    wanted = [request for request in requests if request.valid]
    maps = made([request.chip for request in wanted])
    if maps is None:
        return False
    for request, values in zip(wanted, maps):
        labelled = request.chip.label is not None
        label = read_label(request.chip) if labelled else np.zeros_like(values)
        table.update(torch.tensor([request.row]), torch.from_numpy(values)[None, None], torch.from_numpy(label)[None],
                     torch.tensor([True]), torch.tensor([labelled]))
    return True
