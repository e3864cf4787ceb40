"""What a stored form of chips has to offer: a `Source` reads the months that the plan keeps into arrays for the
pipeline.

`engine.data.tiff.source` and `engine.data.store.source` are the two that there are; `engine.data.forms` tells them
apart.

On the CPU, a chip whose transform is one of the eight flips and quarter turns is turned as it is read, while its values
are moved anyway, and does not pass through the warp.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.data.dataset import AGBM_DTYPE, S1, S1_NODATA, S2, TILE, T
from engine.data.index import Chip
from engine.data.plan import dihedral


class Turn(NamedTuple):
    """One of the eight ways a tile can lie: flipped or not, then turned by quarter turns."""

    flip: bool
    quarters: int

    def view(self, image: np.ndarray) -> np.ndarray:
        """[H, W, …] turned, without moving a value."""
        return np.rot90(image[:, ::-1] if self.flip else image, self.quarters) if self != UPRIGHT else image


UPRIGHT = Turn(False, 0)
_TURNS = {turn: dihedral(turn.flip, turn.quarters, np.eye(3)) for turn in map(Turn._make, np.ndindex(2, 4))}


def turn_of(matrix: np.ndarray) -> Turn | None:
    """Which flip and quarter turn `matrix` (of a `Draw`) is exactly; None where it is none of them."""
    return next((turn for turn, exact in _TURNS.items() if np.array_equal(matrix, exact)), None)


class Stack(NamedTuple):
    """One chip as in its TIFFs.  K kept months, in the order of the calendar."""

    s1: np.ndarray  # [K, TILE, TILE, 4] float32, dB, S1_NODATA where there is nothing
    s2: np.ndarray  # [K, TILE, TILE, 11] uint16, zeros where the month has no file
    label: np.ndarray  # [TILE, TILE, 1] float32, t/ha; zeros where the chip has none
    months: np.ndarray  # [K] int64

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the pipeline takes.  Nodata becomes the value that scales to 0 (in place), since a warp would mix
        −9999 into its neighbours."""
        for month in self.s1:
            if month.min() == S1_NODATA:  # a look is cheaper than a mask
                np.copyto(month, S1.low, where=month == S1_NODATA)
        return self.s1, self.s2, self.label


class Stored(Protocol):
    """One chip as a source gives it to the pipeline."""

    @property
    def months(self) -> np.ndarray:
        """[K] int64: the kept months that there are."""

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What `engine.data.pipeline` takes of the source's form."""


class Source(Protocol):
    """A stored form: the TIFF tree, or a packed store."""

    @property
    def form(self) -> str:
        """Which arrays it gives: a key of `engine.data.pipeline.FORMS`, or `engine.data.store.source.DIRECT`."""

    @property
    def s1(self) -> str:
        """How exact Sentinel-1 is: `engine.data.store.chip_file` EXACT or STEPS."""

    def buffer(self) -> Any:
        """Memory for one chip."""

    def read(self, chip: Chip, keep: np.ndarray, into: Any, turn: Turn | None = UPRIGHT) -> Stored:
        """Read the months of `chip` where `keep` [T] bool, into `into`, turned by `turn` (None: to be warped)."""

    def stack(self, chip: Chip) -> Stack:
        """The whole chip, for people and pictures."""


class Cache:
    """What was read, kept in memory until `gigabytes` are full.  Nothing is thrown out again: every epoch reads
    every chip once, in a new order, so the first ones are as good as any."""

    def __init__(self, gigabytes: float):
        self._left = int(gigabytes * 1e9)
        self._held: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        return self._held.get(key)

    def wants(self, size: int) -> bool:
        return size <= self._left

    def put(self, key: Any, value: Any, size: int) -> None:
        with self._lock:
            if size <= self._left and key not in self._held:
                self._left -= size
                self._held[key] = value


def empty_stack() -> Stack:
    return Stack(np.empty((T, *S1.shape), S1.dtype), np.empty((T, *S2.shape), S2.dtype),
                 np.empty((TILE, TILE, 1), AGBM_DTYPE), np.arange(T))


def present_months(chip: Chip, keep: np.ndarray) -> list[int]:
    """The kept months of which there is an image; all that there are, where every kept one is missing."""
    there = [t for t in range(T) if any(have[t] for have in chip.months)]
    return [t for t in there if keep[t]] or there
