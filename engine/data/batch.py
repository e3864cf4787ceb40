"""A batch on its way: what a loader is asked for, what those that make batches give it, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from engine.base.errors import DataError
from engine.data.index import Chip
from engine.data.plan import IDENTITY, Draw


class Request(NamedTuple):
    """One chip of a batch, and what to do to it.  What travels along: `row`, the chip's place in a table of results;
    for training, `step`, which wants it (from 1 on), and `others`, the chips that may take its place, in this order."""

    chip: Chip
    draw: Draw = IDENTITY
    row: int = 0
    valid: bool = True
    step: int = 0
    others: Callable[[], Iterator[Chip]] | None = None


class BadChip(DataError):
    """A chip that cannot be read.  `request`: what it was wanted for; `error`: what is wrong."""

    def __init__(self, request: Request, error: DataError | OSError):
        super().__init__(str(error))
        self.request, self.error = request, error


T = TypeVar("T")


def read_for(request: Request, read: Callable[..., T], *args: Any) -> T:
    """`read(*args)`, which reads the chip of `request`.  Raises BadChip."""
    try:
        return read(*args)
    except (DataError, OSError) as error:
        raise BadChip(request, error) from None


class Produced(NamedTuple):
    """A batch before it is moved to the device."""

    requests: list[Request]
    kept: list[int]  # months of each chip
    images: torch.Tensor  # [B, T, H, W, C]
    label: torch.Tensor  # [B, H, W] float32


class Producer(Protocol):
    def batches(self, requests: Iterable[list[Request]]) -> Iterator[Produced]:
        """One for each list of requests, in order."""


class Batch(NamedTuple):
    """Slot k of chip b holds its k-th kept month; the slots after the last are zero and `dropped`.

    Attention over months does not depend on their order, so kept months are simply moved to the front.
    """

    images: torch.Tensor  # [B, T, C, H, W], training precision, channels_last in memory
    dropped: torch.Tensor  # [B, T] bool, on the host: the model counts kept months without waiting for the device
    label: torch.Tensor  # [B, H, W] float32, in the target's unit
    rows: torch.Tensor  # [B] int64
    valid: torch.Tensor  # [B] bool; False marks padding of the last evaluation batch
    chips: list[Chip]
