"""The packed form as a source for the loader.

On the CPU its blocks are decoded by `engine.data.store.cpu_batches`; packed with --lossless it is read as from its
TIFFs instead (Sentinel-1 is float32 then and cannot lie among integers).  On the GPU it is the file's bytes and where
each block lies in them.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.base.errors import DataError
from engine.data.dataset import Dataset, Sensor
from engine.data.index import Chip
from engine.data.source import ALL_NODATA, UPRIGHT, Cache, Stack, Turn, empty_stack, present_months
from engine.data.store import chip_file
from engine.data.store.chip_file import FIRST_STEP, LABEL, LABEL_PLANES, STATIC, is_coded

DIRECT = "direct"  # the form that `engine.data.store.cpu_batches` takes, and no DALI pipeline

_THREAD = threading.local()


class Filling(NamedTuple):
    """Blocks of one byte each, which follow a file's bytes on their way to the GPU and stand for what is not stored."""

    data: np.ndarray  # [n] uint8
    offsets: np.ndarray  # [n + 1] int64: where each begins
    of: np.ndarray  # [planes] int64: which stands for a plane of an image that is not there
    zero: int  # which is of zeros


@functools.lru_cache(maxsize=16)
def filling(dataset: Dataset, values: str) -> Filling:
    planes, absent = chip_file.planes_of(dataset, values), []
    for sensor in dataset.sensors:
        stored = absent_codes(sensor) if is_coded(sensor, values) else sensor.absent
        absent += list(np.ascontiguousarray(stored).view(np.uint8).reshape(-1))
    assert len(absent) == len(planes.band)
    kinds, of = np.unique([0, *absent], return_inverse=True)
    blocks = [chip_file.lz4.block.compress(bytes([byte]) * dataset.tile ** 2, store_size=False) for byte in kinds]
    return Filling(np.frombuffer(b"".join(blocks), np.uint8), np.cumsum([0, *map(len, blocks)]), of[1:], int(of[0]))


def absent_codes(sensor: Sensor) -> np.ndarray:
    """[bands] uint16: what stands in codes where there is no image."""
    code = sensor.code_nodata
    return (sensor.code_low if code is None else np.full(len(sensor.bands), code)).astype(np.uint16)


class Stored(NamedTuple):
    """Kept steps and label of a chip, as they lie in its file."""

    data: np.ndarray  # [n] uint8: the label's blocks, static images', then each step's, then as many as were asked for
    offsets: np.ndarray  # [K, planes] int64: where each plane's block begins
    sizes: np.ndarray  # [K, planes] uint32: its bytes, 0 where none is stored
    label_sizes: np.ndarray  # [LABEL_PLANES] uint32
    months: np.ndarray  # [K] int64


class Blocks(NamedTuple):
    """A chip as stored: bytes [n] uint8, and (offsets, sizes) int32 of blocks for each of `tables`: all bands and
    label, or, where not all are in codes, each sensor and label.  A table is step by step, band by band, byte by
    byte."""

    data: np.ndarray
    tables: tuple[np.ndarray, ...]
    months: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.data, *self.tables


class PackedSource:
    """Chips of one store.  `packed` is any of its files: all are packed with the same settings.

    Each section of a file is compared with its checksum when this object reads it first.  Raises DataError as
    `engine.data.store.chip_file` does, and for months without any value and labels without target like
    `engine.data.tiff.source.TiffSource`.
    """

    def __init__(self, packed: Path, nodata_months: str = "fail", cache_gb: float = 0.0,
                 backend: str = "cpu", need_target: bool = False):
        head = chip_file.read_head(packed)
        self.dataset, self.values = head.dataset, head.values
        self.nodata_months = nodata_months
        self.need_target = need_target
        self.coded = all(is_coded(sensor, self.values) for sensor in self.dataset.sensors)
        self.form = (("blocks" if self.coded else "blocks_apart") if backend == "gpu"
                     else DIRECT if self.coded else "stack")
        self._heads: dict[str, chip_file.Head] = {}
        self._checked: set[tuple[str, int]] = set()
        self._cache = Cache(cache_gb)

    def buffer(self) -> Stack | list[np.ndarray]:
        return empty_stack(self.dataset) if self.form == "stack" else []  # filled by the first chip

    def read(self, chip: Chip, keep: np.ndarray | None, into: object, turn: Turn | None = UPRIGHT) -> Stack | Blocks:
        if isinstance(into, Stack):
            with _Open(self, chip) as file:
                return file.stack(self._months(chip, keep, file.head), into, turn or UPRIGHT)
        assert isinstance(into, list)
        filled = filling(self.dataset, self.values)
        return self._blocks(self.stored(chip, keep, into, extra=len(filled.data)), filled)

    def stored(self, chip: Chip, keep: np.ndarray | None, into: list[np.ndarray], extra: int = 0) -> Stored:
        """The steps of `chip` where `keep` [T] bool (None: all); `into` is empty or what an earlier call left there."""
        with _Open(self, chip) as file:
            return file.stored(self._months(chip, keep, file.head), into, extra)

    def stack(self, chip: Chip) -> Stack:
        with _Open(self, chip) as file:
            return file.stack(self._months(chip, None, file.head), empty_stack(self.dataset), UPRIGHT)

    def _months(self, chip: Chip, keep: np.ndarray | None, head: chip_file.Head) -> list[int]:
        months, moving = [], np.unique(head.planes.band[~head.planes.static])
        for t in present_months(chip, keep):
            if (head.nodata[t, moving] < 2).any():
                months.append(t)
            elif self.nodata_months != "mask":
                raise DataError(f"{chip.packed}: month {t:02d}: every value is nodata and the month has no other "
                                f"image; set data.nodata_months: mask, or delete the TIFF and pack the chip again")
        if not months:
            raise DataError(f"{chip.packed}: no month holds any data; remove the chip")
        return months


    def _blocks(self, stored: Stored, filled: Filling) -> Blocks:
        """Nothing is inflated; the filling blocks follow the chip's."""
        at = stored.data.size - len(filled.data)
        stored.data[at:] = filled.data
        offsets, sizes = _filled(stored.offsets, stored.sizes.astype(np.int64), filled, filled.of, at)
        label_sizes = stored.label_sizes.astype(np.int64)
        label = _filled(np.cumsum(label_sizes) - label_sizes, label_sizes, filled,
                        np.full(LABEL_PLANES, filled.zero), at)
        ends = [0, sizes.shape[1]]
        if not self.coded:
            counts = np.bincount(chip_file.planes_of(self.dataset, self.values).sensor)
            ends = [0, *np.cumsum(counts).tolist()]
        tables = [table[:, a:b] for a, b in itertools.pairwise(ends) for table in (offsets, sizes)]
        return Blocks(stored.data, tuple(np.ascontiguousarray(x.reshape(-1), np.int32) for x in (*tables, *label)),
                      stored.months)


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
            for number in range(FIRST_STEP + head.dataset.months):
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
        if head.chip != self.chip.id or head.values != self.source.values:
            raise DataError(f"{self.path}: holds chip {head.chip}, floats as {head.values}, where chip {self.chip.id}, "
                            f"floats as {self.source.values}, belongs; {chip_file.REMEDY}")
        if not head.dataset.alike(self.source.dataset):
            raise DataError(f"{self.path}: is of data set {head.dataset.name!r} as it was described then, the store of "
                            f"{self.source.dataset.name!r}; {chip_file.REMEDY}")
        there = tuple(tuple(bool(month) for month in row) for row in head.months)
        if (there, head.split, head.label is None) != (self.chip.months, self.chip.split, self.chip.label is None):
            raise DataError(f"{self.path}: holds other months than {chip_file.MANIFEST} says, or is of another split, "
                            f"with or without a label; {chip_file.REMEDY}")
        if self.source.need_target and head.label is not None and head.label["mean"] is None:
            raise DataError(f"{self.path}: {ALL_NODATA}")
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
        head, numbers = self.head, [LABEL, STATIC, *(FIRST_STEP + t for t in months)]
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
        blocks, static = head.sizes[months], head.planes.static
        lengths, offsets = blocks.astype(np.int64), np.empty(blocks.shape, np.int64)
        for where, first in ((~static, ends[STATIC:-1, None]), (static, np.full((len(months), 1), ends[LABEL]))):
            part = lengths[:, where]
            offsets[:, where] = first + np.cumsum(part, axis=1) - part
        return Stored(data, offsets, blocks, head.label_sizes, np.array(months))

    def label(self, out: np.ndarray, turn: Turn = UPRIGHT) -> None:
        """Into [tile, tile] float32, NaN for nodata; zeros where the chip has none."""
        sizes = self.head.label_sizes
        if sizes.any():
            _merge(_inflate(self.section(LABEL), sizes, out.size, self.path), turn, out)
            self.head.dataset.target.hide_nodata(out)
        else:
            out.fill(0)

    def stack(self, months: list[int], into: Stack, turn: Turn) -> Stack:
        """As the TIFFs have it; to half a step where floats are stored in steps."""
        k, dataset = len(months), self.head.dataset
        for slot, t in enumerate(months):
            self._section(FIRST_STEP + t, self.head.sizes[t], False, [images[slot] for images in into.images], turn)
        self._section(STATIC, self.head.sizes[0], True, [images[0] for images in into.images], turn)
        for sensor, images in zip(dataset.sensors, into.images):
            if sensor.static:
                images[1:k] = images[0]
        self.label(into.label[..., 0], turn)
        return Stack(dataset, tuple(images[:k] for images in into.images), into.label, np.array(months))

    def _section(self, number: int, sizes: np.ndarray, static: bool, into: list[np.ndarray], turn: Turn) -> None:
        """Images of the sensors that are `static`, or of the others, into those of `into` [tile, tile, bands]."""
        planes, dataset = self.head.planes, self.head.dataset
        section = None
        for index, (sensor, out) in enumerate(zip(dataset.sensors, into)):
            if sensor.static != static:
                continue
            section = self.section(number) if section is None else section
            coded, size = is_coded(sensor, self.head.values), planes.bytes[index]
            values = np.empty(out.shape, np.uint16) if coded else out
            absent = absent_codes(sensor) if coded else sensor.absent
            for band, blocks in enumerate(sizes[planes.sensor == index].reshape(-1, size)):
                taken = int(blocks.sum())
                if taken:
                    _merge(_inflate(section[:taken], blocks, dataset.tile ** 2, self.path), turn, values[..., band])
                    section = section[taken:]
                else:
                    values[..., band].fill(absent[band])
            if coded:
                out[...] = chip_file.decoded(values, sensor)


def _filled(offsets: np.ndarray, sizes: np.ndarray, filled: Filling, of: np.ndarray,
            end: int) -> tuple[np.ndarray, np.ndarray]:
    """Where no block is stored, that one of `filled`, which lie at `end`."""
    stored = sizes > 0
    return (np.where(stored, offsets, end + filled.offsets[of]),
            np.where(stored, sizes, np.diff(filled.offsets)[of]))


def _inflate(blocks: memoryview, sizes: np.ndarray, size: int, path: object) -> list[np.ndarray]:
    """[size] uint8 each, of blocks that lie end to end."""
    planes, at = [], 0
    for taken in sizes.tolist():
        planes.append(chip_file.inflate(blocks[at:at + taken], size, str(path)))
        at += taken
    return planes


def _merge(planes: list[np.ndarray], turn: Turn, out: np.ndarray) -> None:
    """Byte-planes into values: `out` [tile, tile] of uint16 or float32, with any strides."""
    values = _scratch(len(planes), out.size)
    if len(planes) == 2:
        np.left_shift(planes[1], 8, out=values, dtype=np.uint16, casting="unsafe")
        np.bitwise_or(values, planes[0], out=values)
    else:
        bytewise = values.view(np.uint8).reshape(out.size, -1)
        for place, plane in enumerate(planes):
            bytewise[:, place] = plane
    np.copyto(out, turn.view(values.view(out.dtype).reshape(out.shape)))


def _scratch(itemsize: int, size: int) -> np.ndarray:
    """[size] unsigned integers, this thread's own: fresh memory of this size costs as much as filling it."""
    name = f"u{itemsize}"
    if getattr(_THREAD, name, np.empty(0)).size != size:
        setattr(_THREAD, name, np.empty(size, name))
    scratch: np.ndarray = getattr(_THREAD, name)
    return scratch


def label_into(chip: Chip, out: np.ndarray) -> None:
    """The label [tile, tile] float32 of a packed chip, checked."""
    assert chip.packed is not None
    with _Open(PackedSource(chip.packed), chip) as file:
        file.label(out)


def bytes_stored(head: chip_file.Head) -> dict[str, int]:
    """Bytes that the blocks of each sensor and of the label take."""
    of = head.planes.sensor
    taken = {sensor.name: int((head.sizes[:1] if sensor.static else head.sizes)[:, of == number].sum())
             for number, sensor in enumerate(head.dataset.sensors)}
    return {**taken, "label": int(head.label_sizes.sum())}
