"""Reads the stored form of chips into arrays for the pipeline, ahead of time, on threads.

Only the months that the plan keeps are read.  The TIFFs of BioMassters are uncompressed and pixel-interleaved, so
reading is all the decoding there is: bytes go from the page cache to the place DALI takes them from.  The packed form
is read by `engine.data.packed`; `open_source` tells them apart.

On the CPU, a chip whose transform is one of the eight flips and quarter turns is turned here, while its values are
moved anyway, and does not pass through the warp.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.data import tiff
from engine.data.bands import AGBM_DTYPE, S1, S1_NODATA, S2, SENSORS, TILE, T
from engine.data.index import Chip
from engine.data.plan import dihedral
from engine.data.store import EXACT
from engine.errors import DataError


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
        """Which arrays it gives: a key of `engine.data.pipeline.FORMS`, or `engine.data.packed.DIRECT`."""

    @property
    def s1(self) -> str:
        """How exact Sentinel-1 is: `engine.data.store` EXACT or STEPS."""

    def buffer(self) -> Any:
        """Memory for one chip."""

    def read(self, chip: Chip, keep: np.ndarray, into: Any, turn: Turn | None = UPRIGHT) -> Stored:
        """Read the months of `chip` where `keep` [T] bool, into `into`, turned by `turn` (None: to be warped)."""

    def stack(self, chip: Chip) -> Stack:
        """The whole chip, for people and pictures."""


def open_source(chips: Sequence[Chip], *, nodata_months: str = "fail", cache_gb: float = 0.0,
                backend: str = "cpu") -> Source:
    """The source that `chips`, all of one index, are read from.  `backend`: where DALI works."""
    if chips and chips[0].packed is not None:
        from engine.data.packed import PackedSource

        return PackedSource(chips[0].packed, nodata_months, cache_gb, backend)
    return TiffSource(nodata_months, cache_gb)


def read_label(chip: Chip) -> np.ndarray:
    """[TILE, TILE] float32, t/ha, of a chip that has one, of either form."""
    label = np.empty((TILE, TILE), AGBM_DTYPE)
    if chip.packed is not None:
        from engine.data.packed import label_into

        label_into(chip, label)
    else:
        assert chip.label is not None
        tiff.read_into(chip.label, label)
    return label


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


class TiffSource:
    """The TIFF tree as downloaded.

    `nodata_months`: what to do with a month whose file holds no value at all: "fail", or "mask" it like a month
    without files.
    """

    form, s1 = "stack", EXACT

    def __init__(self, nodata_months: str = "fail", cache_gb: float = 0.0):
        self.nodata_months = nodata_months
        self._cache = Cache(cache_gb)

    def buffer(self) -> Stack:
        return empty_stack()

    def stack(self, chip: Chip) -> Stack:
        return self.read(chip, np.ones(T, bool), empty_stack())

    def read(self, chip: Chip, keep: np.ndarray, into: Stack, turn: Turn | None = UPRIGHT) -> Stack:
        """Raises DataError naming the file that is missing, damaged, of another shape or dtype, NaN or all nodata."""
        turn = turn or UPRIGHT
        months: list[int] = []
        for t in present_months(chip, keep):
            if self._read_month(chip, t, into, len(months), turn):
                months.append(t)
        if not months:
            raise DataError(f"chip {chip.id} in {chip.folder}: no month holds any data; remove the chip")
        if chip.label is None:
            into.label.fill(0)
        else:
            self._load(chip.label, into.label[..., 0], turn)
            if not np.isfinite(into.label).all():
                raise DataError(f"{chip.label}: the label holds NaN or infinity; download it again or remove the chip")
        k = len(months)
        return Stack(into.s1[:k], into.s2[:k], into.label, np.array(months))

    def _read_month(self, chip: Chip, month: int, into: Stack, slot: int, turn: Turn) -> bool:
        """False where the month holds no value and such months are to be masked."""
        s1, s2 = into.s1[slot], into.s2[slot]
        has_s1, has_s2 = (chip.months[s][month] for s in range(len(SENSORS)))
        if has_s1:
            self._load(chip.path(0, month), s1, turn)
            if np.isnan(s1.sum()):  # a sum sees every NaN, and is cheaper than a mask
                raise DataError(f"{chip.path(0, month)}: holds NaN; download it again, or write nodata as {S1_NODATA}")
        else:
            s1.fill(S1_NODATA)
        if has_s2:
            self._load(chip.path(1, month), s2, turn)
        else:
            s2.fill(0)
            if s1[0, 0].max() == S1_NODATA and s1.max() == S1_NODATA:
                if self.nodata_months == "mask":
                    return False
                raise DataError(f"{chip.path(0, month)}: every value is nodata and the month has no Sentinel-2 image; "
                                f"delete the file (the month then counts as missing) or set data.nodata_months: mask")
        return True

    def _load(self, path: Any, out: np.ndarray, turn: Turn) -> None:
        values = self._cache.get(path)
        if values is None:
            keep = self._cache.wants(out.nbytes)
            values = out if turn == UPRIGHT and not keep else np.empty(out.shape, out.dtype)
            tiff.read_into(path, values)
            if keep:
                self._cache.put(path, values, values.nbytes)
        if values is not out:
            np.copyto(out, turn.view(values))


class Job(NamedTuple):
    """What to read."""

    chip: Chip
    keep: np.ndarray  # [T] bool
    turn: Turn | None  # None: to be warped


class Fed(NamedTuple):
    """What was read."""

    arrays: tuple[np.ndarray, ...]
    months: np.ndarray


class ReadAhead:
    """Iterates over batches of `Job`s, `depth` batches ahead of the consumer, on `threads` threads.

    Buffers are reused: what an iteration yields stays untouched for `hold` further iterations, which has to cover
    the consumer's own queue.
    """

    def __init__(self, source: Source, jobs: Iterable[list[Job]], threads: int, depth: int, hold: int):
        self._source = source
        self._jobs = iter(jobs)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pending: deque[list[tuple[Future[Fed], Any]]] = deque()
        self._held: deque[list[Any]] = deque()
        self._free: list[Any] = []
        self._depth, self._hold = depth, hold

    def __iter__(self) -> Iterator[list[Fed]]:
        try:
            self._submit()
            while self._pending:
                batch = self._pending.popleft()
                fed = [future.result() for future, _ in batch]
                self._held.append([buffer for _, buffer in batch])
                if len(self._held) > self._hold:
                    self._free += self._held.popleft()
                self._submit()
                yield fed
        finally:
            self.close()

    def _submit(self) -> None:
        while len(self._pending) < self._depth:
            jobs = next(self._jobs, None)
            if jobs is None:
                return
            batch = []
            for job in jobs:
                buffer = self._free.pop() if self._free else self._source.buffer()
                batch.append((self._pool.submit(self._read, job, buffer), buffer))
            self._pending.append(batch)

    def _read(self, job: Job, buffer: Any) -> Fed:
        stored = self._source.read(job.chip, job.keep, buffer, job.turn)
        return Fed(stored.arrays(), stored.months)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
