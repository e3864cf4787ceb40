"""The packed form as a source for the loader: kept months inflated on threads (CPU), or handed on compressed (GPU).

On the CPU a chip comes in one of three shapes, none of which costs another pass over its values:
- to be warped: four groups of at most 4 interleaved bands, which is what DALI's warp takes;
- upright, flipped or turned: all 15 bands interleaved, ready to be scaled;
- packed with --lossless: as from its TIFFs (Sentinel-1 is float32 then and cannot lie among integers).
On the GPU it is the file's bytes and where each block lies in them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data import store
from engine.data.bands import AGBM_DTYPE, S1, S1_NODATA, S2, TILE, C, T
from engine.data.index import Chip
from engine.data.source import UPRIGHT, Cache, Stack, Turn, empty_stack, present_months
from engine.errors import DataError

GROUPS = ((0, 4), (4, 8), (8, 12), (12, 15))  # bands of each group, in the order of the model's channels
_NOTHING = np.zeros((1, 1, 1, 1), np.uint16)

# A block that is not stored is one of these, which follow the file's bytes on their way to the GPU: a plane of zeros,
# and the byte-planes of −9999.0
_NODATA_BYTES = np.array(S1_NODATA, S1.dtype).tobytes()
_FILL = [store.lz4.block.compress(bytes([byte]) * store.PLANE, store_size=False) for byte in (0, *_NODATA_BYTES)]
_FILL_OFFSETS = np.cumsum([0, *map(len, _FILL)])
_FILL_BYTES = np.frombuffer(b"".join(_FILL), np.uint8)

_THREAD = threading.local()


class Codes(NamedTuple):
    """A chip in integer codes.  `parts`: the four groups [K, H, W, 4 or 3], or all bands [K, H, W, 15] and three
    empty parts; uint16, nodata replaced by what scales to 0."""

    parts: tuple[np.ndarray, ...]
    label: np.ndarray  # [H, W, 1] float32
    months: np.ndarray  # [K]

    def arrays(self) -> tuple[np.ndarray, ...]:
        return *self.parts, self.label


class Blocks(NamedTuple):
    """A chip as stored: bytes [n] uint8, and (offsets, sizes) int32 of blocks for each of `tables`: bands and
    label, or S1, S2 and label where Sentinel-1 is float32.  A table is month by month, band by band, byte by byte."""

    data: np.ndarray
    tables: tuple[np.ndarray, ...]
    months: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.data, *self.tables


class _Buffer(NamedTuple):
    codes: np.ndarray  # [T × H × W × C] uint16
    label: np.ndarray  # [H, W, 1] float32


class PackedSource:
    """Chips of one store.  `packed` is any of its files: all are packed with the same settings.

    Each section of a file is compared with its checksum when this object reads it first.  Raises DataError as
    `engine.data.store` does, and for months without any value like `engine.data.source.TiffSource`.
    """

    def __init__(self, packed: Path, nodata_months: str = "fail", cache_gb: float = 0.0,
                 backend: str = "cpu"):
        self.s1 = store.read_head(packed).s1
        self.nodata_months = nodata_months
        exact = self.s1 == store.EXACT
        self.form = ("blocks_float" if exact else "blocks") if backend == "gpu" else ("stack" if exact else "codes")
        self._heads: dict[str, store.Head] = {}
        self._checked: set[tuple[str, int]] = set()
        self._cache = Cache(cache_gb)

    def buffer(self) -> Stack | _Buffer | list[np.ndarray]:
        if self.form == "stack":
            return empty_stack()
        if self.form == "codes":
            return _Buffer(np.empty(T * store.PLANE * C, np.uint16), np.empty((TILE, TILE, 1), AGBM_DTYPE))
        return []  # filled by the first chip

    def read(self, chip: Chip, keep: np.ndarray, into: object, turn: Turn | None = UPRIGHT) -> Codes | Stack | Blocks:
        with _Open(self, chip) as file:
            months = self._months(chip, keep, file.head)
            if isinstance(into, Stack):
                return file.stack(months, into, turn or UPRIGHT)
            if isinstance(into, _Buffer):
                return file.codes(months, into, turn)
            assert isinstance(into, list)
            return file.blocks(months, into)

    def stack(self, chip: Chip) -> Stack:
        with _Open(self, chip) as file:
            return file.stack(self._months(chip, np.ones(T, bool), file.head), empty_stack(), UPRIGHT)

    def _months(self, chip: Chip, keep: np.ndarray, head: store.Head) -> list[int]:
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
        self._cached: bytes | None = source._cache.get(chip.id)
        head = source._heads.get(chip.id)
        if head is None:
            head = self._head()
            source._heads[chip.id] = head
        self.head = head
        if self._cached is None and source._cache.wants(head.end - head.start):
            sections = [self.section(number) for number in range(T + 1)]
            self._cached = b"".join(sections)
            source._cache.put(chip.id, self._cached, len(self._cached))

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    @property
    def descriptor(self) -> int:
        if self._descriptor is None:
            self._descriptor = store.open_file(self.path)
        return self._descriptor

    def _head(self) -> store.Head:
        head = store.head_of(self.descriptor, self.path)
        if head.chip != self.chip.id or head.s1 != self.source.s1:
            raise DataError(f"{self.path}: holds chip {head.chip}, Sentinel-1 as {head.s1}, where chip {self.chip.id} "
                            f"as {self.source.s1} belongs; {store.REMEDY}")
        there = tuple(tuple(bool(month) for month in row) for row in head.months)
        if there != self.chip.months:
            raise DataError(f"{self.path}: holds other months than {store.MANIFEST} says; {store.REMEDY}")
        return head._replace(sources={})  # thousands of heads stay in memory

    def section(self, number: int) -> memoryview:
        """The blocks of a section, checked if this is the first time."""
        if self._cached is not None:
            first, size = self.head.section(number)
            first -= self.head.start
            return memoryview(self._cached)[first:first + size]
        key = self.chip.id, number
        check = key not in self.source._checked
        data = store.read_section(self.descriptor, self.head, number, self.path, check)
        if check:
            self.source._checked.add(key)
        return memoryview(data)

    def label(self, out: np.ndarray, turn: Turn = UPRIGHT) -> None:
        """Into [H, W] float32; zeros where the chip has none."""
        sizes = self.head.label_sizes
        if sizes.any():
            _merge(_inflate(self.section(0), sizes, self.path), turn, out)
        else:
            out.fill(0)

    def month(self, t: int, s1: list[np.ndarray], s2: list[np.ndarray], turn: Turn, nodata: np.ndarray) -> None:
        """Month t into a [H, W] array for each band, of integers or float32.  `nodata` [4]: what stands for it."""
        section, sizes = self.section(1 + t), self.head.sizes[t]
        planes, at = self.head.s1_planes, 0
        for band, out in enumerate(s1 + s2):
            count = planes if band < len(s1) else 2
            first, at = at, at + count
            block = int(sizes[first:at].sum())
            if block:
                values = _inflate(section[:block], sizes[first:at], self.path)
                section = section[block:]
                _merge(values, turn, out)
                if band < len(s1) and self.head.nodata[t, band] == 1 and out.dtype == np.uint16:
                    np.copyto(out, out.dtype.type(nodata[band]), where=out == store.CODE_NODATA)
            else:
                out.fill(nodata[band] if band < len(s1) else 0)

    def codes(self, months: list[int], into: _Buffer, turn: Turn | None) -> Codes:
        k = len(months)
        flat = into.codes[:k * store.PLANE * C]
        if turn is None:
            groups, at = [], 0
            for first, last in GROUPS:
                size = k * store.PLANE * (last - first)
                groups.append(flat[at:at + size].reshape(k, TILE, TILE, last - first))
                at += size
        else:
            groups = [flat.reshape(k, TILE, TILE, C)]
        for slot, t in enumerate(months):
            bands = [group[slot, :, :, band] for group in groups for band in range(group.shape[3])]
            self.month(t, bands[:len(S1.bands)], bands[len(S1.bands):], turn or UPRIGHT, store.CODE_LOW)
        self.label(into.label[..., 0], turn or UPRIGHT)
        parts = tuple(groups) if turn is None else (groups[0], *[_NOTHING] * (len(GROUPS) - 1))
        return Codes(parts, into.label, np.array(months))

    def stack(self, months: list[int], into: Stack, turn: Turn) -> Stack:
        """As the TIFFs have it; to half a step where Sentinel-1 is stored in steps."""
        k = len(months)
        steps = self.head.s1 == store.STEPS
        s1 = np.empty(S1.shape, np.uint16) if steps else None
        for slot, t in enumerate(months):
            target = into.s1[slot] if s1 is None else s1
            nodata = np.full(len(S1.bands), S1_NODATA if s1 is None else store.CODE_NODATA)
            self.month(t, [target[..., band] for band in range(len(S1.bands))],
                       [into.s2[slot, ..., band] for band in range(len(S2.bands))], turn, nodata)
            if s1 is not None:
                into.s1[slot] = store.s1_db(s1)
        self.label(into.label[..., 0], turn)
        return Stack(into.s1[:k], into.s2[:k], into.label, np.array(months))

    def blocks(self, months: list[int], into: list[np.ndarray]) -> Blocks:
        """The sections of the label and of `months`, end to end, then the filling blocks; nothing is inflated."""
        head, numbers = self.head, [0, *(1 + t for t in months)]
        size = sum(head.section(number)[1] for number in numbers) + len(_FILL_BYTES)
        if not into or into[0].size < size:
            into[:] = [np.empty(max(size, head.end - head.start + len(_FILL_BYTES)), np.uint8)]
        data = into[0][:size]
        at, starts = 0, []
        for number in numbers:
            section = self.section(number)
            data[at:at + len(section)] = np.frombuffer(section, np.uint8)
            starts.append(at)
            at += len(section)
        data[at:] = _FILL_BYTES
        planes, n = head.s1_planes, head.s1_planes * len(S1.bands)
        sizes = head.sizes[months].astype(np.int64)  # [K, planes]
        offsets = np.array(starts[1:])[:, None] + np.cumsum(sizes, axis=1) - sizes
        fill = np.zeros(sizes.shape, np.int64)
        if planes == AGBM_DTYPE.itemsize:
            fill[:, :n] = 1 + np.arange(n) % planes
        offsets, sizes = _filled(offsets, sizes, fill, at)
        label_sizes = head.label_sizes.astype(np.int64)
        label = _filled(np.cumsum(label_sizes) - label_sizes, label_sizes, np.zeros(store.LABEL_PLANES, np.int64), at)
        cuts = ((0, n), (n, sizes.shape[1])) if planes == AGBM_DTYPE.itemsize else ((0, sizes.shape[1]),)
        tables = [table[:, a:b] for a, b in cuts for table in (offsets, sizes)]
        return Blocks(data, tuple(np.ascontiguousarray(x.reshape(-1), np.int32) for x in (*tables, *label)),
                      np.array(months))


def _filled(offsets: np.ndarray, sizes: np.ndarray, fill: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Where no block is stored, that one of `_FILL`, which lie at `end`."""
    stored = sizes > 0
    return (np.where(stored, offsets, end + _FILL_OFFSETS[fill]),
            np.where(stored, sizes, np.diff(_FILL_OFFSETS)[fill]))


def _inflate(blocks: memoryview, sizes: np.ndarray, path: object) -> list[np.ndarray]:
    planes, at = [], 0
    for size in sizes.tolist():
        planes.append(store.inflate(blocks[at:at + size], str(path)))
        at += size
    return planes


def _merge(planes: list[np.ndarray], turn: Turn, out: np.ndarray) -> None:
    """Byte-planes into values: `out` [H, W] of uint16 or float32, with any strides."""
    values = _scratch(len(planes))
    if len(planes) == 2:
        np.left_shift(planes[1], 8, out=values, dtype=np.uint16, casting="unsafe")
        np.bitwise_or(values, planes[0], out=values)
    else:
        bytewise = values.view(np.uint8).reshape(store.PLANE, -1)
        for place, plane in enumerate(planes):
            bytewise[:, place] = plane
    np.copyto(out, turn.view(values.view(out.dtype).reshape(TILE, TILE)))


def _scratch(itemsize: int) -> np.ndarray:
    """[PLANE] unsigned integers, this thread's own: fresh memory of this size costs as much as filling it."""
    if not hasattr(_THREAD, f"u{itemsize}"):
        setattr(_THREAD, f"u{itemsize}", np.empty(store.PLANE, f"u{itemsize}"))
    return getattr(_THREAD, f"u{itemsize}")


def label_into(chip: Chip, out: np.ndarray) -> None:
    """The label [H, W] float32 of a packed chip, checked."""
    assert chip.packed is not None
    with _Open(PackedSource(chip.packed), chip) as file:
        file.label(out)


def bytes_stored(head: store.Head) -> dict[str, int]:
    """Bytes that the blocks of each sensor and of the label take."""
    n = head.s1_planes * len(S1.bands)
    return {S1.name: int(head.sizes[:, :n].sum()), S2.name: int(head.sizes[:, n:].sum()),
            "label": int(head.label_sizes.sum())}
