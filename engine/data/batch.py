"""A batch on its way: what a loader is asked for, what those that make batches give it, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from engine.data.index import Chip
from engine.data.plan import IDENTITY, Draw


class Request(NamedTuple):
    """One chip of a batch, and what to do to it.  `row` travels along: the chip's place in a table of results."""

    chip: Chip
    draw: Draw = IDENTITY
    row: int = 0
    valid: bool = True


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
