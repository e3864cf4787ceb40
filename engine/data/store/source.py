"""The packed form as a source for the loader.

On the CPU its blocks are decoded by `engine.data.store.cpu_batches`; packed with --lossless it is read as from its
TIFFs instead (Sentinel-1 is float32 then and cannot lie among integers).  On the GPU it is the file's bytes and where
each block lies in them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import S1, S1_NODATA, S2, TILE, T
from engine.data.index import Chip
from engine.data.source import UPRIGHT, Cache, Stack, Turn, empty_stack, present_months
from engine.data.store import chip_file

DIRECT = "direct"  # the form that `engine.data.store.cpu_batches` takes, and no DALI pipeline

# A block that is not stored is one of these, which follow the file's bytes on their way to the GPU: a plane of zeros,
# and the byte-planes of −9999.0
_NODATA_BYTES = np.array(S1_NODATA, S1.dtype).tobytes()
_FILL = [chip_file.lz4.block.compress(bytes([byte]) * chip_file.PLANE, store_size=False)
         for byte in (0, *_NODATA_BYTES)]
_FILL_OFFSETS = np.cumsum([0, *map(len, _FILL)])
_FILL_BYTES = np.frombuffer(b"".join(_FILL), np.uint8)


_THREAD = threading.local()


class Stored(NamedTuple):
    """Kept months and label of a chip, as they lie in its file."""

    data: np.ndarray  # [n] uint8: the label's blocks, then each month's, then as many bytes as were asked for
    starts: np.ndarray  # [K] int64: where each month's begin
    sizes: np.ndarray  # [K, planes] uint32: bytes of each block, 0 where none is stored
    label_sizes: np.ndarray  # [LABEL_PLANES] uint32
    months: np.ndarray  # [K] int64


class Blocks(NamedTuple):
    """A chip as stored: bytes [n] uint8, and (offsets, sizes) int32 of blocks for each of `tables`: bands and
    label, or S1, S2 and label where Sentinel-1 is float32.  A table is month by month, band by band, byte by byte."""

    data: np.ndarray
    tables: tuple[np.ndarray, ...]
    months: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.data, *self.tables


class PackedSource:
    """Chips of one store.  `packed` is any of its files: all are packed with the same settings.

    Each section of a file is compared with its checksum when this object reads it first.  Raises DataError as
    `engine.data.store.chip_file` does, and for months without any value like `engine.data.tiff.source.TiffSource`.
    """

    def __init__(self, packed: Path, nodata_months: str = "fail", cache_gb: float = 0.0,
                 backend: str = "cpu"):
        self.s1 = chip_file.read_head(packed).s1
        self.nodata_months = nodata_months
        exact = self.s1 == chip_file.EXACT
        self.form = ("blocks_float" if exact else "blocks") if backend == "gpu" else "stack" if exact else DIRECT
        self._heads: dict[str, chip_file.Head] = {}
        self._checked: set[tuple[str, int]] = set()
        self._cache = Cache(cache_gb)

    def buffer(self) -> Stack | list[np.ndarray]:
        return empty_stack() if self.form == "stack" else []  # filled by the first chip

    def read(self, chip: Chip, keep: np.ndarray, into: object, turn: Turn | None = UPRIGHT) -> Stack | Blocks:
        if isinstance(into, Stack):
            with _Open(self, chip) as file:
                return file.stack(self._months(chip, keep, file.head), into, turn or UPRIGHT)
        assert isinstance(into, list)
        return _blocks(self.stored(chip, keep, into, extra=len(_FILL_BYTES)))

    def stored(self, chip: Chip, keep: np.ndarray, into: list[np.ndarray], extra: int = 0) -> Stored:
        """The months of `chip` where `keep` [T] bool; `into` is empty or what an earlier call left there."""
        with _Open(self, chip) as file:
            return file.stored(self._months(chip, keep, file.head), into, extra)

    def stack(self, chip: Chip) -> Stack:
        with _Open(self, chip) as file:
            return file.stack(self._months(chip, np.ones(T, bool), file.head), empty_stack(), UPRIGHT)

    def _months(self, chip: Chip, keep: np.ndarray, head: chip_file.Head) -> list[int]:
        months = []
        for t in present_months(chip, keep):
            if head.months[1, t] or (head.nodata[t] < 2).any():
                months.append(t)
            elif self.nodata_months != "mask":
                raise DataError(f"{chip.packed}: month {t:02d}: every value is nodata and the month has no Sentinel-2 "
                                f"image; set data.nodata_months: mask, or delete the TIFF and pack the chip again")
        if not months:
            raise DataError(f"{chip.packed}: no month holds any data; remove the chip")
        return months


class _Open:
    """One chip's file, open while it is read."""

    def __init__(self, source: PackedSource, chip: Chip):
        assert chip.packed is not None
        self.source, self.chip, self.path = source, chip, chip.packed
        self._descriptor: int | None = None
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise

    def _prepare(self) -> None:
        source, chip = self.source, self.chip
        self._cached: memoryview | None = source._cache.get(chip.id)
        head = source._heads.get(chip.id)
        if head is None:
            head = self._head()
            source._heads[chip.id] = head
        self.head = head
        size = head.end - head.start
        if self._cached is None and source._cache.wants(size):
            whole = memoryview(bytearray(size))
            for number in range(T + 1):
                first, size = self._place(number)
                self._read(number, whole[first:first + size])
            self._cached = whole
            source._cache.put(chip.id, whole, len(whole))

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    @property
    def descriptor(self) -> int:
        if self._descriptor is None:
            self._descriptor = chip_file.open_file(self.path)
        return self._descriptor

    def _head(self) -> chip_file.Head:
        head = chip_file.head_of(self.descriptor, self.path)
        if head.chip != self.chip.id or head.s1 != self.source.s1:
            raise DataError(f"{self.path}: holds chip {head.chip}, Sentinel-1 as {head.s1}, where chip {self.chip.id} "
                            f"as {self.source.s1} belongs; {chip_file.REMEDY}")
        there = tuple(tuple(bool(month) for month in row) for row in head.months)
        if there != self.chip.months:
            raise DataError(f"{self.path}: holds other months than {chip_file.MANIFEST} says; {chip_file.REMEDY}")
        return head._replace(sources={})  # thousands of heads stay in memory

    def _place(self, number: int) -> tuple[int, int]:
        """(first byte, size) of a section, counted from the first block."""
        first, size = self.head.section(number)
        return first - self.head.start, size

    def section(self, number: int) -> memoryview:
        """The blocks of a section, checked if this is the first time."""
        first, size = self._place(number)
        if self._cached is not None:
            return self._cached[first:first + size]
        data = memoryview(bytearray(size))
        self._read(number, data)
        return data

    def _read(self, number: int, out: memoryview) -> None:
        key = self.chip.id, number
        check = key not in self.source._checked
        chip_file.read_into(self.descriptor, self.head, number, out, self.path, check)
        self.source._checked.add(key)

    def stored(self, months: list[int], into: list[np.ndarray], extra: int) -> Stored:
        head, numbers = self.head, [0, *(1 + t for t in months)]
        sizes = [self._place(number)[1] for number in numbers]
        ends = np.cumsum(sizes)
        whole = int(ends[-1]) + extra
        if not into or into[0].size < whole:
            into[:] = [np.empty(max(whole, head.end - head.start + extra), np.uint8)]
        data = into[0][:whole]
        view = memoryview(data)  # type: ignore[arg-type]  # numpy arrays are buffers from Python 3.12 on, to mypy
        for number, size, end in zip(numbers, sizes, ends.tolist()):
            if self._cached is not None:
                view[end - size:end] = self.section(number)
            else:
                self._read(number, view[end - size:end])
        return Stored(data, ends[:-1], head.sizes[months], head.label_sizes, np.array(months))

    def label(self, out: np.ndarray, turn: Turn = UPRIGHT) -> None:
        """Into [H, W] float32; zeros where the chip has none."""
        sizes = self.head.label_sizes
        if sizes.any():
            _merge(_inflate(self.section(0), sizes, self.path), turn, out)
        else:
            out.fill(0)

    def month(self, t: int, s1: np.ndarray, s2: np.ndarray, turn: Turn, nodata: float) -> None:
        """Month t into [H, W, 4] of codes or float32, and [H, W, 11].  `nodata`: what stands for it in `s1`."""
        section, sizes = self.section(1 + t), self.head.sizes[t]
        planes, at = self.head.s1_planes, 0
        bands = [s1[..., band] for band in range(len(S1.bands))] + [s2[..., band] for band in range(len(S2.bands))]
        for band, out in enumerate(bands):
            first, at = at, at + (planes if band < len(S1.bands) else S2.dtype.itemsize)
            block = int(sizes[first:at].sum())
            if block:
                _merge(_inflate(section[:block], sizes[first:at], self.path), turn, out)
                section = section[block:]
            else:
                out.fill(nodata if band < len(S1.bands) else 0)

    def stack(self, months: list[int], into: Stack, turn: Turn) -> Stack:
        """As the TIFFs have it; to half a step where Sentinel-1 is stored in steps."""
        k = len(months)
        codes = np.empty(S1.shape, np.uint16) if self.head.s1 == chip_file.STEPS else None
        for slot, t in enumerate(months):
            if codes is None:
                self.month(t, into.s1[slot], into.s2[slot], turn, S1_NODATA)
            else:
                self.month(t, codes, into.s2[slot], turn, chip_file.CODE_NODATA)
                into.s1[slot] = chip_file.s1_db(codes)
        self.label(into.label[..., 0], turn)
        return Stack(into.s1[:k], into.s2[:k], into.label, np.array(months))


def _blocks(stored: Stored) -> Blocks:
    """Nothing is inflated; the filling blocks follow the chip's."""
    at = stored.data.size - len(_FILL_BYTES)
    stored.data[at:] = _FILL_BYTES
    sizes = stored.sizes.astype(np.int64)
    exact = sizes.shape[1] > chip_file.s1_planes(chip_file.STEPS) * len(S1.bands) + S2.dtype.itemsize * len(S2.bands)
    n = chip_file.s1_planes(chip_file.EXACT if exact else chip_file.STEPS) * len(S1.bands)
    offsets = stored.starts[:, None] + np.cumsum(sizes, axis=1) - sizes
    fill = np.zeros(sizes.shape, np.int64)
    if exact:
        fill[:, :n] = 1 + np.arange(n) % S1.dtype.itemsize
    offsets, sizes = _filled(offsets, sizes, fill, at)
    label_sizes = stored.label_sizes.astype(np.int64)
    label = _filled(np.cumsum(label_sizes) - label_sizes, label_sizes, np.zeros(chip_file.LABEL_PLANES, np.int64), at)
    cuts = ((0, n), (n, sizes.shape[1])) if exact else ((0, sizes.shape[1]),)
    tables = [table[:, a:b] for a, b in cuts for table in (offsets, sizes)]
    return Blocks(stored.data, tuple(np.ascontiguousarray(x.reshape(-1), np.int32) for x in (*tables, *label)),
                  stored.months)


def _filled(offsets: np.ndarray, sizes: np.ndarray, fill: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Where no block is stored, that one of `_FILL`, which lie at `end`."""
    stored = sizes > 0
    return (np.where(stored, offsets, end + _FILL_OFFSETS[fill]),
            np.where(stored, sizes, np.diff(_FILL_OFFSETS)[fill]))


def _inflate(blocks: memoryview, sizes: np.ndarray, path: object) -> list[np.ndarray]:
    planes, at = [], 0
    for size in sizes.tolist():
        planes.append(chip_file.inflate(blocks[at:at + size], str(path)))
        at += size
    return planes


def _merge(planes: list[np.ndarray], turn: Turn, out: np.ndarray) -> None:
    """Byte-planes into values: `out` [H, W] of uint16 or float32, with any strides."""
    values = _scratch(len(planes))
    if len(planes) == 2:
        np.left_shift(planes[1], 8, out=values, dtype=np.uint16, casting="unsafe")
        np.bitwise_or(values, planes[0], out=values)
    else:
        bytewise = values.view(np.uint8).reshape(chip_file.PLANE, -1)
        for place, plane in enumerate(planes):
            bytewise[:, place] = plane
    np.copyto(out, turn.view(values.view(out.dtype).reshape(TILE, TILE)))


def _scratch(itemsize: int) -> np.ndarray:
    """[PLANE] unsigned integers, this thread's own: fresh memory of this size costs as much as filling it."""
    if not hasattr(_THREAD, f"u{itemsize}"):
        setattr(_THREAD, f"u{itemsize}", np.empty(chip_file.PLANE, f"u{itemsize}"))
    return getattr(_THREAD, f"u{itemsize}")


def label_into(chip: Chip, out: np.ndarray) -> None:
    """The label [H, W] float32 of a packed chip, checked."""
    assert chip.packed is not None
    with _Open(PackedSource(chip.packed), chip) as file:
        file.label(out)


def bytes_stored(head: chip_file.Head) -> dict[str, int]:
    """Bytes that the blocks of each sensor and of the label take."""
    n = head.s1_planes * len(S1.bands)
    return {S1.name: int(head.sizes[:, :n].sum()), S2.name: int(head.sizes[:, n:].sum()),
            "label": int(head.label_sizes.sum())}
