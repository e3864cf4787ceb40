"""Reads the stored form of chips into arrays for the pipeline, ahead of time, on threads.

Only the months that the plan keeps are read.  The TIFFs of BioMassters are uncompressed and pixel-interleaved, so
reading is all the decoding there is: bytes go from the page cache to the place DALI takes them from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from engine.data import tiff
from engine.data.bands import AGBM_DTYPE, S1, S1_NODATA, S2, SENSORS, TILE, T
from engine.data.index import Chip
from engine.errors import DataError


class Stack(NamedTuple):
    """One chip as stored.  K kept months, in the order of the calendar."""

    s1: np.ndarray  # [K, TILE, TILE, 4] float32, dB, S1_NODATA where there is nothing
    s2: np.ndarray  # [K, TILE, TILE, 11] uint16, zeros where the month has no file
    label: np.ndarray  # [TILE, TILE, 1] float32, t/ha; zeros where the chip has none
    months: np.ndarray  # [K] int64


class Source(Protocol):
    """A stored form: the TIFF tree, or a packed store."""

    def read(self, chip: Chip, keep: np.ndarray, into: Stack) -> Stack:
        """Read the months of `chip` where `keep` [T] bool, into the (larger) arrays of `into`."""


def empty_stack() -> Stack:
    return Stack(np.empty((T, *S1.shape), S1.dtype), np.empty((T, *S2.shape), S2.dtype),
                 np.empty((TILE, TILE, 1), AGBM_DTYPE), np.arange(T))


class TiffSource:
    """The TIFF tree as downloaded.

    `nodata_months`: what to do with a month whose file holds no value at all: "fail", or "mask" it like a month
    without files.
    """

    def __init__(self, nodata_months: str = "fail"):
        self.nodata_months = nodata_months

    def read(self, chip: Chip, keep: np.ndarray, into: Stack) -> Stack:
        """Raises DataError naming the file that is missing, damaged, of another shape or dtype, NaN or all nodata."""
        present = [t for t in range(T) if keep[t] and any(have[t] for have in chip.months)]
        if not present:  # all kept months are ones the chip does not have: take what it has
            present = [t for t in range(T) if any(have[t] for have in chip.months)]
        months: list[int] = []
        for t in present:
            if self._read_month(chip, t, into, slot=len(months)):
                months.append(t)
        if not months:
            raise DataError(f"chip {chip.id} in {chip.folder}: no month holds any data; remove the chip")
        if chip.label is None:
            into.label.fill(0)
        else:
            tiff.read_into(chip.label, into.label.reshape(TILE, TILE))
            if not np.isfinite(into.label).all():
                raise DataError(f"{chip.label}: the label holds NaN or infinity; download it again or remove the chip")
        k = len(months)
        return Stack(into.s1[:k], into.s2[:k], into.label, np.array(months))

    def _read_month(self, chip: Chip, month: int, into: Stack, slot: int) -> bool:
        """False where the month holds no value and such months are to be masked."""
        s1, s2 = into.s1[slot], into.s2[slot]
        has_s1, has_s2 = (chip.months[s][month] for s in range(len(SENSORS)))
        if has_s1:
            tiff.read_into(chip.path(0, month), s1)
            if np.isnan(s1.sum()):  # a sum sees every NaN, and is cheaper than a mask
                raise DataError(f"{chip.path(0, month)}: holds NaN; download it again, or write nodata as {S1_NODATA}")
        else:
            s1.fill(S1_NODATA)
        if has_s2:
            tiff.read_into(chip.path(1, month), s2)
        else:
            s2.fill(0)
            if s1[0, 0].max() == S1_NODATA and s1.max() == S1_NODATA:
                if self.nodata_months == "mask":
                    return False
                raise DataError(f"{chip.path(0, month)}: every value is nodata and the month has no Sentinel-2 image; "
                                f"delete the file (the month then counts as missing) or set data.nodata_months: mask")
        return True


class ReadAhead:
    """Iterates over batches of (chip, keep) requests, `depth` batches ahead of the consumer, on `threads` threads.

    Buffers are reused: what an iteration yields stays untouched for `hold` further iterations, which has to cover
    the consumer's own queue.
    """

    def __init__(self, source: Source, requests: Iterable[list[tuple[Chip, np.ndarray]]], threads: int, depth: int,
                 hold: int):
        self._source = source
        self._requests = iter(requests)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pending: deque[list[tuple[Future[Stack], Stack]]] = deque()
        self._held: deque[list[Stack]] = deque()
        self._free: list[Stack] = []
        self._depth, self._hold = depth, hold

    def __iter__(self) -> Iterator[list[Stack]]:
        try:
            self._submit()
            while self._pending:
                batch = self._pending.popleft()
                stacks = [future.result() for future, _ in batch]
                self._held.append([buffer for _, buffer in batch])
                if len(self._held) > self._hold:
                    self._free += self._held.popleft()
                self._submit()
                yield stacks
        finally:
            self.close()

    def _submit(self) -> None:
        while len(self._pending) < self._depth:
            request = next(self._requests, None)
            if request is None:
                return
            batch = []
            for chip, keep in request:
                buffer = self._free.pop() if self._free else empty_stack()
                batch.append((self._pool.submit(self._source.read, chip, keep, buffer), buffer))
            self._pending.append(batch)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
