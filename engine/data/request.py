"""What a loader is asked for, and what those that make batches give it."""

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
