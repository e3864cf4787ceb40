"""What a stored form of chips has to offer: a `Source` reads the steps that the plan keeps into arrays for the
pipeline.

`engine.data.tiff.source` and `engine.data.store.source` are the two that there are; `engine.data.forms` tells them
apart.

On the CPU, a chip whose transform is one of the eight flips and quarter turns is turned as it is read, while its values
are moved anyway, and does not pass through the warp.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.data.dataset import CODE_ZERO, LABEL_DTYPE, NO_TARGET, Dataset
from engine.data.index import Chip
from engine.data.plan import dihedral

ALL_NODATA = ("every pixel of the label is nodata, so there is nothing to train on; remove the chip, or set "
              "data.bad_chips: quarantine")


class Turn(NamedTuple):
    """One of the eight ways a tile can lie: flipped or not, then turned by quarter turns."""

    flip: bool
    quarters: int

    def view(self, image: np.ndarray) -> np.ndarray:
        """[H, W, …] turned, without moving a value."""
        return np.rot90(image[:, ::-1] if self.flip else image, self.quarters) if self != UPRIGHT else image


UPRIGHT = Turn(False, 0)


@functools.cache
def _turns(tile: int) -> dict[Turn, np.ndarray]:
    return {turn: dihedral(tile, turn.flip, turn.quarters, np.eye(3)) for turn in map(Turn._make, np.ndindex(2, 4))}


def turn_of(matrix: np.ndarray, tile: int) -> Turn | None:
    """Which flip and quarter turn of a tile `matrix` (of a `Draw`) is exactly; None where it is none of them."""
    return next((turn for turn, exact in _turns(tile).items() if np.array_equal(matrix, exact)), None)


class Stack(NamedTuple):
    """One chip as in its TIFFs.  K kept steps, in their order."""

    dataset: Dataset
    images: tuple[np.ndarray, ...]  # of each sensor [K, tile, tile, bands] in its dtype, `Sensor.absent` for no image
    label: np.ndarray  # [tile, tile, 1] float32, in the target's unit, NaN for nodata; zeros where the chip has none
    months: np.ndarray  # [K] int64

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the pipeline takes: float32, or 16-bit codes of integers.

        Nodata becomes the value that scales to 0 (in place), since a warp would mix it into its neighbours, and
        NO_TARGET in the label.
        """
        for sensor, images in zip(self.dataset.sensors, self.images):
            if sensor.nodata is None:
                continue
            nodata = sensor.values.type(sensor.nodata)
            lowest = sensor.nodata < min(sensor.low)
            for image in images:
                if not lowest or image.min() <= nodata:  # a look is cheaper than a mask
                    np.copyto(image, sensor.zero.astype(sensor.values), where=image == nodata)
        if self.dataset.target.nodata is not None:
            np.copyto(self.label, NO_TARGET, where=np.isnan(self.label))
        return *map(_codes, self.images), self.label


def _codes(images: np.ndarray) -> np.ndarray:
    """Integers as uint16 codes (see `Sensor.code_zero`), in place where they have 16 bits; floats as they are.

    DALI's warp on a CPU rounds places in int16 images to a 32nd of a pixel (seen: 33 counts off where 1 was right).
    """
    if images.dtype == np.int16:
        found = images.view(np.uint16)
        np.bitwise_xor(found, CODE_ZERO, out=found)  # + CODE_ZERO
        return found
    return images.astype(np.uint16) if images.dtype == np.uint8 else images


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
        """Which arrays it gives: the name of an `engine.data.pipeline.Form`, or `engine.data.store.source.DIRECT`."""

    @property
    def dataset(self) -> Dataset:
        """What it holds."""

    @property
    def values(self) -> str:
        """How exact floats are: `engine.data.store.chip_file` EXACT or STEPS."""

    def buffer(self) -> Any:
        """Memory for one chip."""

    def read(self, chip: Chip, keep: np.ndarray | None, into: Any, turn: Turn | None = UPRIGHT) -> Stored:
        """Read the steps of `chip` where `keep` [T] bool (None: all), into `into`, turned by `turn` (None: to be
        warped)."""

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


def empty_stack(dataset: Dataset) -> Stack:
    images = tuple(np.empty((dataset.months, *dataset.shape(sensor)), sensor.values) for sensor in dataset.sensors)
    label = np.empty((dataset.tile, dataset.tile, 1), LABEL_DTYPE)
    return Stack(dataset, images, label, np.arange(dataset.months))


def present_months(chip: Chip, keep: np.ndarray | None) -> list[int]:
    """The kept steps of which there is an image; all that there are, where every kept one is missing."""
    there = chip.there
    return there if keep is None else [t for t in there if keep[t]] or there


def fill(image: np.ndarray, values: np.ndarray) -> None:
    """[…, bands] with a value a band."""
    if (values == values[0]).all():
        image.fill(values[0])  # many times as quick
    else:
        image[...] = values
